"""The VQModel of diffusers: `config.json` beside `diffusion_pytorch_model.safetensors`."""

from typing import Any

from torch import Tensor

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count
from lexel.convert.vqgan import CODEBOOK, END, PROJECTIONS, TABLE, one_of, table_config
from lexel.errors import UsageError

BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "shortcut"}
ATTENTION = {
    "group_norm": "norm",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    r"to_out\.0": "out",
    "query": "query",
    "key": "key",
    "value": "value",
    "proj_attn": "out",  # before diffusers 0.17
}
OUTSIDE = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
MIDDLE = {"0": "block1", "1": "block2"}
# Options of the published configuration with the only values that our design has.
FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group"}


def rules(names: Names) -> list[Rule]:
    """Decoder levels are numbered in the order they run, ours by resolution."""
    last = count(names, r"decoder\.up_blocks\.(\d+)\..*") - 1

    def level(part: str, number: str) -> int:
        return int(number) if part == "encoder" else last - int(number)

    return [
        (rf"(encoder|decoder)\.{one_of(OUTSIDE)}\.{END}", lambda m: f"{m[1]}.{OUTSIDE[m[2]]}.{m[3]}"),
        (
            rf"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.levels.{level(m[1], m[2])}.blocks.{m[3]}.{BLOCK[m[4]]}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.attentions\.(\d+)\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.levels.{level(m[1], m[2])}.attentions.{m[3]}.{_attention(m[4])}.{m[5]}",
        ),
        (
            rf"(encoder|decoder)\.mid_block\.resnets\.{one_of(MIDDLE)}\.{one_of(BLOCK)}\.{END}",
            lambda m: f"{m[1]}.middle.{MIDDLE[m[2]]}.{BLOCK[m[3]]}.{m[4]}",
        ),
        (
            rf"(encoder|decoder)\.mid_block\.attentions\.0\.{one_of(ATTENTION)}\.{END}",
            lambda m: f"{m[1]}.middle.attention.{_attention(m[2])}.{m[3]}",
        ),
        (rf"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.{END}", r"encoder.downsamples.\1.\2"),
        (
            rf"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.{END}",
            lambda m: f"decoder.upsamples.{last - 1 - int(m[1])}.{m[2]}",
        ),
        *PROJECTIONS,
        *CODEBOOK,
    ]


def _attention(name: str) -> str:
    return ATTENTION[name.replace(".", r"\.")]


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


def config(tensors: Names, source: str) -> dict[str, Any]:
    return table_config("vq", tensors, source)


LAYOUT = Layout("diffusers", rules, {}, [], TABLE, config)
FAMILY = Family(
    "diffusers",
    "diffusers VQModel",
    lambda names: {"encoder.mid_block.resnets.0.conv1.weight", "quantize.embedding.weight"} <= names.keys(),
    convert,
)
