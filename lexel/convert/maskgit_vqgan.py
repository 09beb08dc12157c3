"""The tokenizer of MaskGIT, as bytedance/1d-tokenizer and MAGE use it, https://arxiv.org/abs/2202.04200."""

import math
from typing import Any

from lexel.convert.family import Family, Layout, Names, convert_tokenizer
from lexel.convert.names import Rule, count, require
from lexel.convert.vqgan import BLOCK, CODEBOOK, END, TABLE, one_of


def rules(theirs: str, ours: str) -> list[Rule]:
    """Rules for the encoder or the decoder under any names."""
    block = rf"(\d+)\.{one_of(BLOCK)}\.{END}"
    return [
        (rf"{theirs}\.(conv_in|norm_out|conv_out)\.{END}", rf"{ours}.\1.\2"),
        (
            rf"{theirs}\.(?:down|up)\.(\d+)\.block\.{block}",
            lambda m: f"{ours}.levels.{m[1]}.{m[2]}.{BLOCK[m[3]]}.{m[4]}",
        ),
        (rf"{theirs}\.mid\.{block}", lambda m: f"{ours}.middle.{m[1]}.{BLOCK[m[2]]}.{m[3]}"),
        (rf"{theirs}\.up\.(\d+)\.upsample_conv\.{END}", lambda m: f"{ours}.upsamples.{int(m[1]) - 1}.{m[2]}"),
    ]


def sizes(tensors: Names, source: str, decoder: str = "decoder") -> dict[str, Any]:
    """The options of a maskgit autoencoder, as the shapes of its decoder tell them."""
    levels = max(1, count(tensors, rf"{decoder}\.levels\.(\d+)\..*"))
    needed = [f"{decoder}.levels.{level}.0.conv2.weight" for level in range(levels)]
    require(tensors, [*needed, f"{decoder}.conv_in.weight", f"{decoder}.conv_out.weight"], source)
    widths = [tensors[name].shape[0] for name in needed]
    channels = tensors[f"{decoder}.conv_out.weight"].shape[0]
    first = tensors.get("encoder.conv_in.weight") if decoder == "decoder" else None
    width = math.gcd(*widths) if first is None else first.shape[0]  # a decoder alone does not tell its unit
    residual, middle = (count(tensors, rf"{decoder}\.{part}\.(\d+)\..*") for part in (r"levels\.0", "middle"))
    return {
        "kind": "maskgit",
        "channels": channels,
        "width": width,
        "multipliers": [level_width // width for level_width in widths],
        "residual_blocks": residual,
        "middle_blocks": None if middle == residual else middle,
        "z_channels": tensors[f"{decoder}.conv_in.weight"].shape[1],
        "groups": 32,
    }


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, dim = tensors["quantizer.weight"].shape
    return {
        "autoencoder": sizes(tensors, source),
        "quantizer": {"kind": "vq", "codebook_size": size, "codebook_dim": dim},
        "projections": False,
    }


LAYOUT = Layout(
    "maskgit_vqgan",
    lambda _: [*rules("encoder", "encoder"), *rules("decoder", "decoder"), *CODEBOOK],
    {},
    [],
    TABLE,
    config,
)
FAMILY = Family(
    "maskgit_vqgan",
    "MaskGIT's tokenizer (1d-tokenizer, MAGE)",
    lambda names: "encoder.mid.0.conv1.weight" in names and "decoder.up.1.upsample_conv.weight" in names,
    lambda request: convert_tokenizer(request, LAYOUT),
)
