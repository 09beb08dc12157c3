"""VQ-VAE-2 as rosinality/vq-vae-2-pytorch publishes it, https://arxiv.org/abs/1906.00446."""

from collections.abc import Sequence
from typing import Any

import torch

from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, require
from lexel.convert.vqgan import END, one_of

NETWORKS = {"enc_b": "encoder.bottom", "enc_t": "encoder.top", "dec_t": "encoder.from_top", "dec": "decoder.pixels"}
LAYERS = {
    "quantize_conv_t": "encoder.to_top",
    "quantize_conv_b": "encoder.to_bottom",
    "upsample_t": "decoder.upsample",
}
TABLES = {"embed": "weight", "cluster_size": "counts", "embed_avg": "sums", "steps": "steps"}
LEVELS = {"t": 0, "b": 1}
RULES: Sequence[Rule] = [
    (rf"{one_of(NETWORKS)}\.blocks\.(\d+)\.{END}", lambda m: f"{NETWORKS[m[1]]}.{m[2]}.{m[3]}"),
    (
        rf"{one_of(NETWORKS)}\.blocks\.(\d+)\.conv\.([13])\.{END}",
        lambda m: f"{NETWORKS[m[1]]}.{m[2]}.conv{'1' if m[3] == '1' else '2'}.{m[4]}",
    ),
    (rf"{one_of(LAYERS)}\.{END}", lambda m: f"{LAYERS[m[1]]}.{m[2]}"),
    (rf"quantize_([tb])\.{one_of(TABLES)}", lambda m: f"quantizer.parts.{LEVELS[m[1]]}.{TABLES[m[2]]}"),
]
NEEDED = ["quantizer.parts.0.weight", "encoder.bottom.0.weight", "encoder.bottom.2.weight"]


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, dim = tensors["quantizer.parts.0.weight"].shape
    blocks = count(tensors, r"encoder\.bottom\.(\d+)\.conv1\.weight") - 5  # after five layers
    if blocks > 0:
        require(tensors, ["encoder.bottom.5.conv1.weight"], source)
    inner = tensors["encoder.bottom.5.conv1.weight"].shape[0] if blocks > 0 else 1
    return {
        "autoencoder": {
            "kind": "vqvae2",
            "channels": tensors["encoder.bottom.0.weight"].shape[1],
            "width": tensors["encoder.bottom.2.weight"].shape[0],
            "residual_blocks": max(0, blocks),
            "residual_width": inner,
            "z_channels": dim,
        },
        "quantizer": {"kind": "ema", "codebook_size": size, "codebook_dim": dim, "order": "look_up_first"},
        "projections": False,
    }


LAYOUT = Layout("vqvae2", lambda _: RULES, {}, [], NEEDED, config)


def convert(request: Request) -> Conversion:
    """Codebooks come as (dimension, codes), here they are (codes, dimension); the number of batches is not told."""
    tensors = dict(request.published.tensors)
    for level in LEVELS:
        for name in ("embed", "embed_avg"):
            if f"quantize_{level}.{name}" in tensors:
                tensors[f"quantize_{level}.{name}"] = tensors[f"quantize_{level}.{name}"].T.contiguous()
    made = {f"quantize_{level}.steps": torch.zeros((), dtype=torch.int64) for level in LEVELS}
    return convert_tokenizer(request, LAYOUT, tensors, made)


FAMILY = Family(
    "vqvae2",
    "VQ-VAE-2 (rosinality)",
    lambda names: "enc_b.blocks.0.weight" in names and "quantize_t.embed" in names,
    convert,
)
