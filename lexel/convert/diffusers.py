"""The VQModel of diffusers: `config.json` beside `diffusion_pytorch_model.safetensors`."""

from functools import partial

from torch import Tensor

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule
from lexel.convert.vqgan import CODEBOOK, PROJECTIONS, TABLE, Spelling, autoencoder_rules, table_config
from lexel.errors import UsageError

SPELLING = Spelling(
    level=r"(?:down|up)_blocks\.(\d+)",
    block=r"resnets\.(\d+)",
    attention=r"attentions\.(\d+)",
    middle=r"mid_block\.resnets",
    middle_attention=r"mid_block\.attentions\.0",
    downsample=r"downsamplers\.0\.conv",
    upsample=r"upsamplers\.0\.conv",
    outside_names={"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"},
    block_names={"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "shortcut"},
    attention_names={
        "group_norm": "norm",
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "out",
        "query": "query",
        "key": "key",
        "value": "value",
        "proj_attn": "out",  # before diffusers 0.17
    },
    middle_names={"0": "block1", "1": "block2"},
    as_run=True,
)
# Options of the published configuration with the only values that our design has.
FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group"}


def rules(names: Names) -> list[Rule]:
    return [*autoencoder_rules(names, SPELLING), *PROJECTIONS, *CODEBOOK]


def convert(request: Request) -> Conversion:
    """Projections of attention are linear in diffusers, 1x1 convolutions here: the weights get two axes more."""
    given = request.published.config
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise UsageError(f"{request.source} has {name} = {given[name]!r}; only {value!r} can be imported")
    tensors = {name: _as_convolution(name, tensor) for name, tensor in request.published.tensors.items()}
    overrides = {"autoencoder.groups": given.get("norm_num_groups", 32), **request.overrides}
    return convert_tokenizer(request._replace(overrides=overrides), LAYOUT, tensors)


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    linear = tensor.dim() == 2 and ".attentions." in name
    return tensor[:, :, None, None] if linear else tensor


LAYOUT = Layout("diffusers", rules, {}, [], TABLE, partial(table_config, "vq"))
FAMILY = Family(
    "diffusers",
    "diffusers VQModel",
    lambda names: {"encoder.mid_block.resnets.0.conv1.weight", "quantize.embedding.weight"} <= names.keys(),
    convert,
)
