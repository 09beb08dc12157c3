"""The tokenizer of VAR, https://arxiv.org/abs/2404.02905: VQGAN's autoencoder around codes of several scales."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, infer_autoencoder
from lexel.convert.vqgan import END, PROJECTIONS, autoencoder_rules
from lexel.errors import UsageError
from lexel.quantizers.multiscale import PUBLISHED

QUANTIZER: list[Rule] = [
    (r"quantize\.embedding\.weight", "quantizer.base.weight"),
    (rf"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.{END}", r"quantizer.smoothers.\1.\2"),
    (rf"quantize\.quant_resi\.qresi\.{END}", r"quantizer.smoothers.0.\1"),
]
LEFT_OUT = {r"quantize\.ema_vocab_hit_SV": "how often codes were chosen, used in training only"}
NEEDED = ["quantizer.base.weight", "to_codes.weight"]
JOINT = re.compile(r"(.*)\.qkv\.(weight|bias)")


def config(tensors: Names, source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as shapes tell them; scales and the search are the published ones unless a configuration tells."""
    size, dim = tensors["quantizer.base.weight"].shape
    smoothers = count(tensors, r"quantizer\.smoothers\.(\d+)\..*")
    options = {"similarity": "cosine"} if given.get("using_znorm", False) else {}
    quantizer = {
        "kind": "multiscale",
        "codebook_size": size,
        "codebook_dim": dim,
        "scales": list(given.get("v_patch_nums", PUBLISHED)),
        "base_options": options,
        "smoothing": abs(given.get("quant_resi", 0.5)),
        "smoothers": smoothers,
    }
    if not smoothers:
        raise UsageError(f"{source} has no quantize.quant_resi: smoothing without convolutions is not supported")
    autoencoder = infer_autoencoder(tensors, source)
    return {
        "autoencoder": {**autoencoder, "projection_kernel": tensors["to_codes.weight"].shape[-1]},
        "quantizer": quantizer,
    }


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as three layers where the published attention has one."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = JOINT.fullmatch(name)
        if match and not tensor.shape[0] % 3:
            result |= {
                f"{match[1]}.{part}.{match[2]}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            result[name] = tensor
    return result


def smoother(dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a smoothing layer."""
    return {"weight": (dim, dim, 3, 3), "bias": (dim,)}


def convert(request: Request) -> Conversion:
    given = request.published.config
    layout = Layout(
        "var_vqvae",
        lambda names: [*autoencoder_rules(names), *PROJECTIONS, *QUANTIZER],
        LEFT_OUT,
        [],
        NEEDED,
        lambda tensors, source: config(tensors, source, given),
    )
    tensors = separate(request.published.tensors)
    codes = tensors.get("quantize.embedding.weight")
    made = {}
    if codes is not None and given.get("quant_resi") == 0:  # nothing is smoothed, so a file has no layers for it
        dim = codes.shape[1]
        made = {f"quantize.quant_resi.0.{kind}": codes.new_zeros(size) for kind, size in smoother(dim).items()}
    conversion = convert_tokenizer(request, layout, tensors, made)
    for ours, theirs in conversion.origins.items():
        if theirs not in request.published.tensors:  # a third of a joint layer
            conversion.origins[ours] = re.sub(r"\.[qkv]\.(weight|bias)$", r".qkv.\1", theirs)
    return conversion


FAMILY = Family(
    "var_vqvae",
    "VAR tokenizers",
    lambda names: (
        "quantize.embedding.weight" in names and any(name.startswith("quantize.quant_resi") for name in names)
    ),
    convert,
)
