"""DQ-VAE as CrossmodalGroup/DynamicVectorQuantization publishes it, https://arxiv.org/abs/2305.11718."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, published_section, require
from lexel.convert.vqgan import ATTENTION, BLOCK, END, MIDDLE, PROJECTIONS, autoencoder_rules, one_of
from lexel.errors import UsageError

TABLES = {"weight": "weight", "cluster_size_ema": "counts", "embed_ema": "sums", "steps": "steps"}
ROUTER = {
    "feature_norm_coarse": "norm_coarse",
    "feature_norm_fine": "norm_fine",
    "gate.0": "hidden",
    "gate.2": "logits",
    "gate": "logits",  # where it is the only layer
}
GRAINS = "(coarse|fine)"
OWN: Sequence[Rule] = [
    (
        rf"encoder\.mid_{GRAINS}\.{one_of(MIDDLE)}\.{one_of(BLOCK)}\.{END}",
        lambda m: f"encoder.{m[1]}.middle.{MIDDLE[m[2]]}.{BLOCK[m[3]]}.{m[4]}",
    ),
    (
        rf"encoder\.mid_{GRAINS}\.attn_1\.{one_of(ATTENTION)}\.{END}",
        lambda m: f"encoder.{m[1]}.middle.attention.{ATTENTION[m[2]]}.{m[3]}",
    ),
    (rf"encoder\.(norm_out|conv_out)_{GRAINS}\.{END}", r"encoder.\2.\1.\3"),
    (
        rf"encoder\.router\.{one_of(ROUTER)}\.{END}",
        lambda m: f"encoder.router.{ROUTER[m[1]]}.{m[2]}",
    ),
    (rf"decoder\.position_bias(?:_fourier)?\.lff\.ffm\.conv\.{END}", r"decoder.positions.fourier.frequencies.\1"),
    (r"decoder\.position_bias_learned\.row_embed\.weight", "decoder.positions.learned.rows"),
    (r"decoder\.position_bias_learned\.col_embed\.weight", "decoder.positions.learned.columns"),
    (rf"quantize\.codebook\.{one_of(TABLES)}", lambda m: f"quantizer.{TABLES[m[1]]}"),
]
CODEBOOK = "quantize.codebook.weight"
STEPS = "quantize.codebook.steps"
LEFT_OUT = {
    r"loss\..*": "the loss and its discriminator, used in training only",
    r"decoder\.position_bias\.(row|col)_embed\.weight": "positions that the published network never adds",
}
NEEDED = ["quantizer.weight", "encoder.conv_in.weight", "encoder.coarse.conv_out.weight"]


def rules(names: Names) -> list[Rule]:
    return [*OWN, *autoencoder_rules(names), *PROJECTIONS]


def router(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """How the published router normalises: by 32 groups, where a configuration says nothing else."""
    kind = published_section(published_section(options, "encoder"), "router_config").get(
        "normalization_type", "group-32"
    )
    if kind == "none":
        return {"router_groups": 0}
    groups = re.fullmatch(r"group-(\d+)", str(kind))
    if groups is None:
        raise UsageError(f"{source} has a router with normalization_type = {kind!r}; known are none and group-N")
    return {} if groups[1] == "32" else {"router_groups": int(groups[1])}


def config(tensors: Names, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as shapes and the published configuration tell them; 32 groups and 256 pixels a side if neither does."""
    levels = count(tensors, r"encoder\.levels\.(\d+)\..*")
    needed = [f"encoder.levels.{level}.blocks.0.conv1.weight" for level in range(levels)]
    require(tensors, needed, source)
    width = tensors["encoder.conv_in.weight"].shape[0]
    table: dict[str, Any] = {
        "kind": "dynamic",
        "channels": tensors["encoder.conv_in.weight"].shape[1],
        "width": width,
        "multipliers": [tensors[name].shape[0] // width for name in needed],
        "residual_blocks": count(tensors, r"encoder\.levels\.0\.blocks\.(\d+)\..*"),
        "attention_levels": attention(tensors, "encoder"),
        "decoder_attention_levels": attention(tensors, "decoder"),
        "z_channels": tensors["encoder.coarse.conv_out.weight"].shape[0],
        "positions": [kind for kind in ("fourier", "learned") if any(f"positions.{kind}." in name for name in tensors)],
    }
    if "encoder.router.hidden.weight" not in tensors:
        table["router_hidden"] = False
    resolution = published_section(options, "encoder").get("resolution")
    if isinstance(resolution, int):
        table["size"] = resolution
    sides = [tensors.get(f"decoder.positions.learned.{axis}") for axis in ("rows", "columns")]
    if sides[0] is not None and sides[1] is not None:
        table["size"] = [side.shape[0] * 2 ** (levels - 2) for side in sides if side is not None]
    size, dim = tensors["quantizer.weight"].shape
    given = published_section(options, "quantizer") or published_section(options, "vq")
    quantizer = {"kind": "ema", "codebook_size": size, "codebook_dim": dim, "order": "look_up_first"}
    quantizer["decay"] = given.get("decay", 0.99)
    if given.get("restart_unused_codes"):
        quantizer["restart_below"] = 1.0
    return {"autoencoder": {**table, **router(options, source)}, "quantizer": quantizer}


def attention(tensors: Names, side: str) -> list[int]:
    """The levels of one side that have attention."""
    levels = count(tensors, rf"{side}\.levels\.(\d+)\..*")
    return [level for level in range(levels) if f"{side}.levels.{level}.attentions.0.out.bias" in tensors]


def convert(request: Request) -> Conversion:
    """The codebook loses its last row, which is padding; the number of batches is not told."""
    tensors = dict(request.published.tensors)
    if "encoder.mid_median.block_1.conv1.weight" in tensors:
        raise UsageError(f"{request.source} has three granularities; the dynamic autoencoder has two")
    if CODEBOOK in tensors:
        tensors[CODEBOOK] = tensors[CODEBOOK][:-1]
    options = request.published.config
    layout = Layout("dqvae", rules, LEFT_OUT, [], NEEDED, lambda names, source: config(names, source, options))
    return convert_tokenizer(request, layout, tensors, {STEPS: torch.zeros((), dtype=torch.int64)})


FAMILY = Family(
    "dqvae",
    "DQ-VAE (DynamicVectorQuantization)",
    lambda names: "encoder.mid_coarse.block_1.conv1.weight" in names and CODEBOOK in names,
    convert,
)
