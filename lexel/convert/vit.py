"""ViT-VQGAN as thuanz123/enhancing-transformers publishes it, https://arxiv.org/abs/2110.04627."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lexel.autoencoders.vision_transformer import sincos
from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, integer, published_section, require
from lexel.convert.vqgan import END, one_of
from lexel.errors import UsageError

BLOCK = {"0.norm": "norm1", "0.fn.to_qkv": "qkv", "0.fn.to_out": "out", "1.norm": "norm2", "1.fn.net.0": "fc1"}
BLOCK |= {"1.fn.net.2": "fc2"}
RULES: Sequence[Rule] = [
    (rf"encoder\.to_patch_embedding\.0\.{END}", r"encoder.patches.\1"),
    (
        rf"(encoder|decoder)\.transformer\.layers\.(\d+)\.{one_of(BLOCK)}\.{END}",
        lambda m: f"{m[1]}.blocks.{m[2]}.{BLOCK[m[3]]}.{m[4]}",
    ),
    (rf"(encoder|decoder)\.transformer\.norm\.{END}", r"\1.norm.\2"),
    (rf"decoder\.to_pixel\.1\.{END}", r"decoder.pixels.\1"),
    (rf"pre_quant\.{END}", r"to_codes.\1"),
    (rf"post_quant\.{END}", r"from_codes.\1"),
]
TABLES = ("quantizer.weight", "quantizer.levels.0.weight")  # of a plain quantizer, of a residual one
POSITIONS = {"encoder.en_pos_embedding": "encoder", "decoder.de_pos_embedding": "decoder"}
LEFT_OUT = {
    r"(encoder\.en|decoder\.de)_pos_embedding": "fixed sines and cosines, computed from the grid",
    r"loss\..*": "the loss and its discriminator, used in training only",
}
NEEDED = ["encoder.patches.weight", "decoder.pixels.weight"]
SIDES = ("encoder", "decoder")


def quantizer_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Codes on the sphere as published, or as a configuration says otherwise; one book for all residual levels."""
    given = published_section(options, "quantizer")
    table = {"kind": "cosine", "raw_gradient": True} if given.get("use_norm", True) else {"kind": "vq"}
    if not given.get("use_residual"):
        return table
    base = table.pop("kind")
    return {
        "kind": "residual",
        "depth": given["num_quantizers"],
        "base": base,
        "base_options": table,
        "shared": True,
    }


def config(tensors: Names, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as shapes tell them; heads as a configuration says, else of the published 64 channels."""
    require(tensors, [f"{side}.blocks.0.{part}.weight" for side in SIDES for part in ("qkv", "fc1")], source)
    quantizer = quantizer_of(options)
    size, dim = tensors[TABLES[quantizer["kind"] == "residual"]].shape
    sizes: dict[str, Any] = {}
    for side in SIDES:
        hidden, width = tensors[f"{side}.blocks.0.fc1.weight"].shape
        inner = tensors[f"{side}.blocks.0.qkv.weight"].shape[0] // 3
        heads = integer(published_section(options, side), "heads", 0) or inner // 64
        sizes["head_width"] = inner // max(heads, 1)
        depth = count(tensors, rf"{side}\.blocks\.(\d+)\..*")
        sizes[side] = {"width": width, "depth": depth, "heads": heads, "mlp": hidden}
    patches = tensors["encoder.patches.weight"]
    return {
        "autoencoder": {"kind": "vit", "patch": patches.shape[2], "channels": patches.shape[1], **sizes},
        "quantizer": {**quantizer, "codebook_size": size, "codebook_dim": dim},
    }


def convert(request: Request) -> Conversion:
    """The projections come as linear layers, here they are 1x1 convolutions; positions must be the fixed ones."""
    tensors = dict(request.published.tensors)
    for name in POSITIONS.keys() & tensors.keys():
        check_positions(name, tensors[name], request.source)
    for name in ("pre_quant.weight", "post_quant.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:, :, None, None]
    options = request.published.config
    table = TABLES[quantizer_of(options)["kind"] == "residual"]
    layout = Layout(
        "vit_vqgan",
        lambda _: [*RULES, (r"quantizer\.embedding\.weight", table)],
        LEFT_OUT,
        [],
        [*NEEDED, table],
        lambda names, source: config(names, source, options),
    )
    return convert_tokenizer(request, layout, tensors, identity_outputs(tensors))


def identity_outputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output layers that change nothing, for blocks without one: those of one head as wide as the block."""
    found: dict[str, Tensor] = {}
    for name, qkv in tensors.items():
        layer, _, kind = name.rpartition(".to_qkv.")
        if kind == "weight" and f"{layer}.to_out.weight" not in tensors and qkv.shape[0] == 3 * qkv.shape[1]:
            width = qkv.shape[1]
            found[f"{layer}.to_out.weight"] = torch.eye(width, device=qkv.device, dtype=qkv.dtype)
            found[f"{layer}.to_out.bias"] = torch.zeros(width, device=qkv.device, dtype=qkv.dtype)
    return found


def check_positions(name: str, table: Tensor, source: str) -> None:
    """Refuses positions (1, h w, C) that are not the fixed sines and cosines of a grid."""
    count, width = table.shape[1:] if table.dim() == 3 else (0, 0)
    if count and width % 4 == 0:
        grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
        tables = (sincos(*grid, width) for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])))
        if table.is_meta or any(torch.allclose(table[0].float(), found, rtol=0, atol=1e-5) for found in tables):
            return
    raise UsageError(f"{source}: {name} is not the fixed table of sines and cosines of a grid")


FAMILY = Family(
    "vit_vqgan",
    "ViT-VQGAN (enhancing-transformers)",
    lambda names: "encoder.to_patch_embedding.0.weight" in names and "pre_quant.weight" in names,
    convert,
)
