"""Published models written down from their formulas, for tests: shapes under published names, and float64 arithmetic.

Nothing here uses the package: a wrong table or network in it cannot hide behind a shared mistake.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32  # of every published autoencoder

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Random float32 weights, small enough that activations stay of size 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
        value = torch.randn(shape, generator=generator) / fan_in**0.5
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = value + 1 if norm else value
    return state


def meta_state(shapes: Shapes) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def double(state: State) -> State:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------- parts


def convolution(shapes: Shapes, name: str, out: int, into: int, size: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (out, into, size, size)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def vector(shapes: Shapes, name: str, width: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def block(shapes: Shapes, name: str, into: int, out: int, shortcut: str = "nin_shortcut", bias: bool = True) -> None:
    vector(shapes, f"{name}.norm1", into)
    convolution(shapes, f"{name}.conv1", out, into, 3, bias)
    vector(shapes, f"{name}.norm2", out)
    convolution(shapes, f"{name}.conv2", out, out, 3, bias)
    if into != out:
        convolution(shapes, f"{name}.{shortcut}", out, into, 1, bias)


def attention(shapes: Shapes, name: str, width: int) -> None:
    vector(shapes, f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        convolution(shapes, f"{name}.{part}", width, width, 1)


def conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Written out: mean and variance of each group of channels, over its channels and all positions."""
    grouped = x.reshape(len(x), GROUPS, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    normal = ((grouped - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def run_block(state: State, name: str, x: Tensor) -> Tensor:
    y = conv(state, f"{name}.conv1", swish(group_norm(state, f"{name}.norm1", x)), padding=1)
    y = conv(state, f"{name}.conv2", swish(group_norm(state, f"{name}.norm2", y)), padding=1)
    return (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x) + y


def run_attention(state: State, name: str, x: Tensor) -> Tensor:
    if f"{name}.q.weight" not in state:
        return x
    y = group_norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", y).flatten(2) for part in "qkv")  # (B, C, positions)
    weights = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(x.shape)
    return x + conv(state, f"{name}.proj_out", mixed)


def halve(state: State, name: str, x: Tensor) -> Tensor:
    """Zeros right and below, then every second position."""
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
    padded[..., :-1, :-1] = x
    return conv(state, name, padded, stride=2)


def repeat(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """(B, h, w) for z (B, D, h, w): the whole table of distances."""
    return (z.movedim(1, -1)[..., None, :] - codebook).square().sum(-1).argmin(-1)


def grid(vectors: Tensor) -> Tensor:
    """(B, D, h, w) from (B, h, w, D)."""
    return vectors.movedim(-1, 1)


# ---------------------------------------------------------------------------------------------- VQGAN's naming


def vqgan_shapes(
    width: int,
    multipliers: list[int],
    blocks: int,
    attended: list[int],
    z: int,
    dim: int,
    patch: int = 1,
    halvings: int | None = None,
) -> Shapes:
    """`encoder.*`, `decoder.*`, `quant_conv`, `post_quant_conv` of VQGAN, IBQ, VQGAN-LC, Emu3.5 and Cosmos."""
    shapes: Shapes = {}
    levels = len(multipliers)
    halvings = levels - 1 if halvings is None else halvings
    widths = [width, *(width * multiplier for multiplier in multipliers)]
    convolution(shapes, "encoder.conv_in", width, 3 * patch**2, 3)
    for level in range(levels):
        for number in range(blocks):
            into = widths[level] if number == 0 else widths[level + 1]
            block(shapes, f"encoder.down.{level}.block.{number}", into, widths[level + 1])
            if level in attended:
                attention(shapes, f"encoder.down.{level}.attn.{number}", widths[level + 1])
        if level < halvings:
            convolution(shapes, f"encoder.down.{level}.downsample.conv", widths[level + 1], widths[level + 1], 3)
    for part in ("encoder", "decoder"):
        block(shapes, f"{part}.mid.block_1", widths[-1], widths[-1])
        attention(shapes, f"{part}.mid.attn_1", widths[-1])
        block(shapes, f"{part}.mid.block_2", widths[-1], widths[-1])
    vector(shapes, "encoder.norm_out", widths[-1])
    convolution(shapes, "encoder.conv_out", z, widths[-1], 3)
    convolution(shapes, "decoder.conv_in", widths[-1], z, 3)
    before = widths[-1]
    for level in reversed(range(levels)):
        for number in range(blocks + 1):
            block(shapes, f"decoder.up.{level}.block.{number}", before, widths[level + 1])
            before = widths[level + 1]
            if level in attended:
                attention(shapes, f"decoder.up.{level}.attn.{number}", before)
        if level >= levels - halvings:
            convolution(shapes, f"decoder.up.{level}.upsample.conv", before, before, 3)
    vector(shapes, "decoder.norm_out", before)
    convolution(shapes, "decoder.conv_out", 3 * patch**2, before, 3)
    convolution(shapes, "quant_conv", dim, z, 1)
    convolution(shapes, "post_quant_conv", z, dim, 1)
    return shapes


def vqgan_latents(state: State, images: Tensor) -> Tensor:
    x = conv(state, "encoder.conv_in", images, padding=1)
    level = 0
    while f"encoder.down.{level}.block.0.norm1.weight" in state:
        number = 0
        while f"encoder.down.{level}.block.{number}.norm1.weight" in state:
            x = run_block(state, f"encoder.down.{level}.block.{number}", x)
            x = run_attention(state, f"encoder.down.{level}.attn.{number}", x)
            number += 1
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            x = halve(state, f"encoder.down.{level}.downsample.conv", x)
        level += 1
    x = vqgan_middle(state, "encoder", x)
    x = conv(state, "encoder.conv_out", swish(group_norm(state, "encoder.norm_out", x)), padding=1)
    return conv(state, "quant_conv", x)


def vqgan_middle(state: State, part: str, x: Tensor) -> Tensor:
    x = run_block(state, f"{part}.mid.block_1", x)
    x = run_attention(state, f"{part}.mid.attn_1", x)
    return run_block(state, f"{part}.mid.block_2", x)


def vqgan_images(state: State, codes: Tensor) -> Tensor:
    x = conv(state, "decoder.conv_in", conv(state, "post_quant_conv", codes), padding=1)
    x = vqgan_middle(state, "decoder", x)
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up.")})
    for level in reversed(range(levels)):
        number = 0
        while f"decoder.up.{level}.block.{number}.norm1.weight" in state:
            x = run_block(state, f"decoder.up.{level}.block.{number}", x)
            x = run_attention(state, f"decoder.up.{level}.attn.{number}", x)
            number += 1
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            x = conv(state, f"decoder.up.{level}.upsample.conv", repeat(x), padding=1)
    return conv(state, "decoder.conv_out", swish(group_norm(state, "decoder.norm_out", x)), padding=1)


# ---------------------------------------------------------------------------------------------- Open-MAGVIT2, SimVQ


def magvit2_shapes(width: int, multipliers: list[int], blocks: int, z: int, adaptive: bool = True) -> Shapes:
    shapes: Shapes = {}
    levels = len(multipliers)
    widths = [width, *(width * multiplier for multiplier in multipliers)]
    convolution(shapes, "encoder.conv_in", width, 3, 3, bias=False)
    for level in range(levels):
        for number in range(blocks):
            into = widths[level] if number == 0 else widths[level + 1]
            block(shapes, f"encoder.down.{level}.block.{number}", into, widths[level + 1], bias=False)
        if level < levels - 1:
            convolution(shapes, f"encoder.down.{level}.downsample", widths[level + 1], widths[level + 1], 3)
    for number in range(blocks):
        block(shapes, f"encoder.mid_block.{number}", widths[-1], widths[-1], bias=False)
    vector(shapes, "encoder.norm_out", widths[-1])
    convolution(shapes, "encoder.conv_out", z, widths[-1], 1)
    convolution(shapes, "decoder.conv_in", widths[-1], z, 3)
    for number in range(blocks):
        block(shapes, f"decoder.mid_block.{number}", widths[-1], widths[-1], bias=False)
    before = widths[-1]
    for level in reversed(range(levels)):
        if adaptive:
            for part in ("gamma", "beta"):
                shapes[f"decoder.adaptive.{level}.{part}.weight"] = (before, z)
                shapes[f"decoder.adaptive.{level}.{part}.bias"] = (before,)
        for number in range(blocks):
            block(shapes, f"decoder.up.{level}.block.{number}", before, widths[level + 1], bias=False)
            before = widths[level + 1]
        if level > 0:
            convolution(shapes, f"decoder.up.{level}.upsample.conv1", 4 * before, before, 3)
    vector(shapes, "decoder.norm_out", before)
    convolution(shapes, "decoder.conv_out", 3, before, 3)
    return shapes


def magvit2_latents(state: State, images: Tensor) -> Tensor:
    x = conv(state, "encoder.conv_in", images, padding=1)
    level = 0
    while f"encoder.down.{level}.block.0.norm1.weight" in state:
        number = 0
        while f"encoder.down.{level}.block.{number}.norm1.weight" in state:
            x = run_block(state, f"encoder.down.{level}.block.{number}", x)
            number += 1
        if f"encoder.down.{level}.downsample.weight" in state:
            x = conv(state, f"encoder.down.{level}.downsample", x, stride=2, padding=1)
        level += 1
    number = 0
    while f"encoder.mid_block.{number}.norm1.weight" in state:
        x = run_block(state, f"encoder.mid_block.{number}", x)
        number += 1
    return conv(state, "encoder.conv_out", swish(group_norm(state, "encoder.norm_out", x)))


def magvit2_images(state: State, codes: Tensor) -> Tensor:
    x = conv(state, "decoder.conv_in", codes, padding=1)
    number = 0
    while f"decoder.mid_block.{number}.norm1.weight" in state:
        x = run_block(state, f"decoder.mid_block.{number}", x)
        number += 1
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up.")})
    positions = codes.flatten(2)
    mean = positions.mean(2)
    deviation = ((positions - mean[..., None]).square().sum(2) / (positions.shape[2] - 1) + 1e-6).sqrt()
    for level in reversed(range(levels)):
        if f"decoder.adaptive.{level}.gamma.weight" in state:
            scale, shift = (
                F.linear(
                    value,
                    state[f"decoder.adaptive.{level}.{part}.weight"],
                    state[f"decoder.adaptive.{level}.{part}.bias"],
                )
                for part, value in (("gamma", deviation), ("beta", mean))
            )
            ones = {"n.weight": torch.ones_like(scale[0]), "n.bias": torch.zeros_like(scale[0])}
            x = scale[..., None, None] * group_norm(ones, "n", x) + shift[..., None, None]
        number = 0
        while f"decoder.up.{level}.block.{number}.norm1.weight" in state:
            x = run_block(state, f"decoder.up.{level}.block.{number}", x)
            number += 1
        if level > 0:
            wide = conv(state, f"decoder.up.{level}.upsample.conv1", x, padding=1)
            width = x.shape[1]
            x = torch.zeros(len(x), width, 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
            for row in (0, 1):
                for column in (0, 1):
                    first = (2 * row + column) * width
                    x[..., row::2, column::2] = wide[:, first : first + width]
    return conv(state, "decoder.conv_out", swish(group_norm(state, "decoder.norm_out", x)), padding=1)


def sign_index(z: Tensor) -> Tensor:
    """Channel 0 is the lowest bit; zero counts as -1."""
    return sum((z[:, channel] > 0).long() * 2**channel for channel in range(z.shape[1]))


# ---------------------------------------------------------------------------------------------- LlamaGen, FVQ


def llamagen_shapes(width: int, multipliers: list[int], blocks: int, z: int, dim: int) -> Shapes:
    shapes: Shapes = {}
    levels = len(multipliers)
    widths = [width, *(width * multiplier for multiplier in multipliers)]
    convolution(shapes, "encoder.conv_in", width, 3, 3)
    for level in range(levels):
        for number in range(blocks):
            into = widths[level] if number == 0 else widths[level + 1]
            block(shapes, f"encoder.conv_blocks.{level}.res.{number}", into, widths[level + 1])
            if level == levels - 1:
                attention(shapes, f"encoder.conv_blocks.{level}.attn.{number}", widths[level + 1])
        if level < levels - 1:
            convolution(shapes, f"encoder.conv_blocks.{level}.downsample.conv", widths[level + 1], widths[level + 1], 3)
    for part in ("encoder", "decoder"):
        block(shapes, f"{part}.mid.0", widths[-1], widths[-1])
        attention(shapes, f"{part}.mid.1", widths[-1])
        block(shapes, f"{part}.mid.2", widths[-1], widths[-1])
    vector(shapes, "encoder.norm_out", widths[-1])
    convolution(shapes, "encoder.conv_out", z, widths[-1], 3)
    convolution(shapes, "decoder.conv_in", widths[-1], z, 3)
    before = widths[-1]
    for step, level in enumerate(reversed(range(levels))):
        for number in range(blocks + 1):
            block(shapes, f"decoder.conv_blocks.{step}.res.{number}", before, widths[level + 1])
            before = widths[level + 1]
            if level == levels - 1:
                attention(shapes, f"decoder.conv_blocks.{step}.attn.{number}", before)
        if level > 0:
            convolution(shapes, f"decoder.conv_blocks.{step}.upsample.conv", before, before, 3)
    vector(shapes, "decoder.norm_out", before)
    convolution(shapes, "decoder.conv_out", 3, before, 3)
    convolution(shapes, "quant_conv", dim, z, 1)
    convolution(shapes, "post_quant_conv", z, dim, 1)
    return shapes


def as_vqgan(state: State) -> State:
    """LlamaGen's tensors under VQGAN's names, so that one piece of arithmetic serves both.

    The network is the same: the last level has attention, and the decoder's blocks are numbered as they run.
    """
    steps = len({name.split(".")[2] for name in state if name.startswith("decoder.conv_blocks.")})
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] == "conv_blocks":
            level = int(parts[2]) if parts[0] == "encoder" else steps - 1 - int(parts[2])
            rest = [{"res": "block"}.get(part, part) for part in parts[3:]]
            parts = [parts[0], {"encoder": "down", "decoder": "up"}[parts[0]], str(level), *rest]
        elif parts[1] == "mid":
            parts = [parts[0], "mid", {"0": "block_1", "1": "attn_1", "2": "block_2"}[parts[2]], *parts[3:]]
        renamed[".".join(parts)] = tensor
    return renamed
