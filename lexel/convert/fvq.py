"""FVQ tokenizers, https://arxiv.org/abs/2509.10140: LlamaGen's autoencoder, and a codebook through a bridge.

The released code has two bridges: the paper's, and an older one that most of its scripts train, modulated by a class
label. Where that label is always the same, the older bridge is a constant and its result, a plain table, is imported.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lexel.convert import llamagen
from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, infer_autoencoder
from lexel.convert.vqgan import END, TABLE, table_config
from lexel.errors import UsageError

BRIDGE = "quantize.qbridge."
HEADS = 4  # of every published bridge
RULES: list[Rule] = [
    (r"quantize\.qbridge\.x_embedder\.proj\.(weight|bias)", r"quantizer.bridge.compress.\1"),
    (rf"quantize\.qbridge\.blocks\.(\d+)\.attn\.qkv\.{END}", r"quantizer.bridge.blocks.\1.qkv.\2"),
    (rf"quantize\.qbridge\.blocks\.(\d+)\.attn\.proj\.{END}", r"quantizer.bridge.blocks.\1.out.\2"),
    (rf"quantize\.qbridge\.blocks\.(\d+)\.mlp\.fc1\.{END}", r"quantizer.bridge.blocks.\1.widen.\2"),
    (rf"quantize\.qbridge\.blocks\.(\d+)\.mlp\.fc2\.{END}", r"quantizer.bridge.blocks.\1.narrow.\2"),
    (rf"quantize\.qbridge\.final_layer\.linear\.{END}", r"quantizer.bridge.recover.\1"),
    (rf"quantize\.qbridge\.linear\.{END}", r"quantizer.bridge.0.\1"),
    (rf"quantize\.qbridge\.linear_5\.(\d)\.{END}", r"quantizer.bridge.\1.\2"),
]
EMBEDDING = "quantize.embedding.weight"
BAKED_LAYOUT = llamagen.LAYOUT._replace(family="fvq_baked", config=partial(table_config, "vq"))
COMPRESS = BRIDGE + "x_embedder.proj.weight"
LABELS = BRIDGE + "y_embedder.embedding_table.weight"


def convert(request: Request) -> Conversion:
    tensors = request.published.tensors
    if LABELS in tensors:
        return _convert_modulated(request)
    if COMPRESS not in tensors:
        return convert_tokenizer(request, LAYOUT)
    # The patches come as a convolution (width, D, p, p); ours is linear, over (row, column, channel).
    patches = tensors[COMPRESS].permute(0, 2, 3, 1).flatten(1)
    overrides = {"quantizer.patch": tensors[COMPRESS].shape[-1], **request.overrides}
    return convert_tokenizer(request._replace(overrides=overrides), LAYOUT, {**tensors, COMPRESS: patches})


def config(tensors: Names, source: str) -> dict[str, Any]:
    size, dim = tensors["quantizer.weight"].shape
    table: dict[str, Any] = {"kind": "fvq", "codebook_size": size, "codebook_dim": dim}
    if "quantizer.bridge.compress.weight" in tensors:
        table["width"] = tensors["quantizer.bridge.compress.weight"].shape[0]
        table["depth"] = count(tensors, r"quantizer\.bridge\.blocks\.(\d+)\..*")
    else:
        table["bridge"] = "mlp" if "quantizer.bridge.2.weight" in tensors else "linear"
    return {"autoencoder": infer_autoencoder(tensors, source), "quantizer": table}


def _convert_modulated(request: Request) -> Conversion:
    tensors = request.published.tensors
    if len(tensors[LABELS]) != 1:
        raise UsageError(
            f"{request.source} has a codebook for each of {len(tensors[LABELS]) - 1} classes, "
            "which a tokenizer of images alone cannot use"
        )
    table = modulated_codebook(tensors, request.source)
    bridge = dict.fromkeys(
        (name for name in tensors if name.startswith(BRIDGE)), "the bridge, a constant: its codebook is imported"
    )
    rest = {name: tensor for name, tensor in tensors.items() if name not in bridge}
    conversion = convert_tokenizer(request, BAKED_LAYOUT, {**rest, EMBEDDING: table})
    return conversion._replace(family="fvq", left_out=conversion.left_out | bridge)


def modulated_codebook(tensors: Mapping[str, Tensor], source: str) -> Tensor:
    """The codebook (K, D) that the older bridge makes of its table: blocks modulated by the one label's vector."""
    part = {name.removeprefix(BRIDGE): tensor.float() for name, tensor in tensors.items() if name.startswith(BRIDGE)}
    known = r"pos_embed", "y_embedder.embedding_table.weight"
    depth = count(part, r"blocks\.(\d+)\..*")
    expected = {
        *known,
        *_layer("x_embedder.proj"),
        *_layer("final_layer.linear"),
        *_layer("final_layer.adaLN_modulation.1"),
    }
    for block in range(depth):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected |= _layer(f"blocks.{block}.{layer}")
    if part.keys() != expected:
        raise UsageError(f"{source} has a bridge that is not known: {', '.join(sorted(part.keys() ^ expected)[:3])}")

    codes = tensors[EMBEDDING].float()
    width, dim, patch, _ = part["x_embedder.proj.weight"].shape
    side = round(len(codes) ** 0.5)
    label = F.silu(part["y_embedder.embedding_table.weight"])  # (1, width)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    picture = codes.T.reshape(1, dim, side, side)
    x = F.conv2d(picture, part["x_embedder.proj.weight"], part["x_embedder.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)[0] + part["pos_embed"][0]  # (tokens, width)
    for block in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{block}.adaLN_modulation.1", label).chunk(6, 1)
        qkv = linear(f"blocks.{block}.attn.qkv", modulated(x, shift1, scale1))
        query, key, value = qkv.view(len(x), 3, HEADS, width // HEADS).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        x = x + gate1 * linear(f"blocks.{block}.attn.proj", mixed)
        hidden = F.gelu(linear(f"blocks.{block}.mlp.fc1", modulated(x, shift2, scale2)), approximate="tanh")
        x = x + gate2 * linear(f"blocks.{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", label).chunk(2, 1)
    squares = linear("final_layer.linear", modulated(x, shift, scale))
    grid = side // patch
    return squares.view(grid, grid, patch, patch, dim).transpose(1, 2).reshape(codes.shape)


def _layer(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


LAYOUT = Layout("fvq", lambda names: [*llamagen.rules(names), *RULES], llamagen.LEFT_OUT, [], TABLE, config)
FAMILY = Family(
    "fvq",
    "FVQ tokenizers",
    lambda names: EMBEDDING in names and any(name.startswith(BRIDGE) for name in names),
    convert,
)


def _fits_baked(names: Names) -> bool:
    """LlamaGen's names, and codes of more than its 8 dimensions."""
    needed = {"encoder.conv_blocks.0.res.0.conv1.weight", EMBEDDING} <= names.keys()
    return needed and names[EMBEDDING].shape[1] != 8 and not any(name.startswith(BRIDGE) for name in names)


BAKED = Family(
    "fvq_baked",
    "FVQ tokenizers with the bridge folded into the codebook",
    _fits_baked,
    lambda request: convert_tokenizer(request, BAKED_LAYOUT),
)
