"""Decoding of one block with a KV cache: projections fused, norms folded."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.generators.next_token.blocks import EPSILON, Block, ConditionalBlock, GPTBlock, apply_rope
from lexel.generators.next_token.linears import Linear


class Modulation(NamedTuple):
    """AdaLN of one block, (R, 1, C) each: norms become norm(x) * scale + shift, branches are multiplied by gamma."""

    scale1: Tensor
    shift1: Tensor
    gamma1: Tensor
    scale2: Tensor
    shift2: Tensor
    gamma2: Tensor


class KVCache(NamedTuple):
    """Keys, values and modulation of sequences under way, one a row. Slices share memory with the whole."""

    keys: list[Tensor]  # a block: (R, heads, slots, head_dim)
    values: list[Tensor]
    start: Tensor  # (R, 1, C), the last row of the condition, the input at position 0
    blocks: list[Modulation]  # empty for a transformer without modulation
    last: list[Tensor]  # scale and shift of the last norm, (R, 1, C) each; empty likewise

    def rows(self, begin: int, end: int) -> "KVCache":
        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[begin:end] for tensor in tensors]

        blocks = [Modulation(*cut(list(block))) for block in self.blocks]
        return KVCache(cut(self.keys), cut(self.values), self.start[begin:end], blocks, cut(self.last))


def tensors_of(cache: KVCache) -> list[Tensor]:
    modulation = [tensor for block in cache.blocks for tensor in block]
    return [cache.start, *modulation, *cache.last]


class CacheWrite(NamedTuple):
    """Cache positions of new keys and values, and the attention mask of the new positions."""

    slots: Tensor  # (m,) int64, one for each new position; (R, m) where sequences have got to different places
    length: int  # slots that are looked at
    mask: Tensor | None  # (m, length) bool, or (R, 1, m, length); None when all of them may be seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Writes keys and values (R, heads, m, head_dim) to the cache, and attends to it with q of the same shape."""
        keys, values = cache
        if self.slots.dim() == 1:
            keys.index_copy_(2, self.slots, k)
            values.index_copy_(2, self.slots, v)
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            keys[rows, :, self.slots] = k.transpose(1, 2)
            values[rows, :, self.slots] = v.transpose(1, 2)
        keys, values = keys[:, :, : self.length], values[:, :, : self.length]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)


class FusedBlock:
    """One block of the transformer, its projections fused."""

    def __init__(self, block: Block, linear: Callable[[Tensor], Linear], dtype: torch.dtype) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.qkv = linear(attention.qkv.weight.detach().to(dtype))
        self.out = linear(attention.out.weight.detach().to(dtype))
        gate_up = torch.cat([feed_forward.gate.weight.detach(), feed_forward.up.weight.detach()])
        self.gate_up = linear(gate_up.to(dtype))
        self.down = linear(feed_forward.down.weight.detach().to(dtype))
        self.norm1 = block.attention_norm.weight.detach().to(dtype)
        self.norm2 = block.feed_forward_norm.weight.detach().to(dtype)

    def __call__(
        self,
        x: Tensor,
        rope: Tensor,
        modulation: Modulation | None,
        cache: tuple[Tensor, Tensor] | None,
        write: CacheWrite | None,
    ) -> Tensor:
        """x (R, m, C) and its rotary table, for `_rotate`; without a cache the m positions are a whole sequence."""
        width = x.shape[-1]
        if modulation is None:
            y = F.rms_norm(x, (width,), self.norm1, EPSILON)
        else:
            y = torch.addcmul(modulation.shift1, F.rms_norm(x, (width,), None, EPSILON), modulation.scale1)

        qkv = self.qkv(y).unflatten(-1, (3 * self.heads, -1))  # (R, m, 3 * heads, head_dim)
        qk = _rotate(qkv[:, :, : 2 * self.heads], rope).transpose(1, 2)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        v = qkv[:, :, 2 * self.heads :].transpose(1, 2)
        if cache is None or write is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            attended = write.attend(q, k, v, cache)
        y = self.out(attended.transpose(1, 2).flatten(-2))

        x = x + y if modulation is None else torch.addcmul(x, modulation.gamma1, y)
        if modulation is None:
            y = F.rms_norm(x, (width,), self.norm2, EPSILON)
        else:
            y = torch.addcmul(modulation.shift2, F.rms_norm(x, (width,), None, EPSILON), modulation.scale2)
        gate, up = self.gate_up(y).chunk(2, -1)
        y = self.down(F.silu(gate) * up)
        return x + y if modulation is None else torch.addcmul(x, modulation.gamma2, y)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """`apply_rope` by a table (m, head_dim / 2, 2), or the same in one product of complex numbers (m, head_dim / 2)."""
    if not rope.is_complex():
        return apply_rope(x, rope)
    pairs = torch.view_as_complex(x.to(rope.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[..., None, :]).flatten(-2).to(x.dtype)


class FusedGPTBlock:
    """One block of a GPT."""

    def __init__(self, block: GPTBlock, linear: Callable[[Tensor], Linear], dtype: torch.dtype) -> None:
        self.heads = block.attention.heads
        layers = {"qkv": block.attention.qkv, "out": block.attention.out, "fc1": block.fc1, "fc2": block.fc2}
        self.products = {name: linear(layer.weight.detach().to(dtype)) for name, layer in layers.items()}
        self.biases = {name: layer.bias.detach().to(dtype) for name, layer in layers.items()}
        norms = (block.attention_norm, block.feed_forward_norm)
        self.norms = [(norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)) for norm in norms]

    def _apply(self, name: str, x: Tensor) -> Tensor:
        return self.products[name](x) + self.biases[name]

    def __call__(
        self,
        x: Tensor,
        rope: Tensor,
        modulation: Modulation | None,
        cache: tuple[Tensor, Tensor],
        write: CacheWrite,
    ) -> Tensor:
        """x (R, m, C), which has its positions in it already."""
        qkv = self._apply("qkv", F.layer_norm(x, x.shape[-1:], *self.norms[0], EPSILON))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (R, heads, m, head_dim)
        attended = write.attend(q, k, v, cache)
        x = x + self._apply("out", attended.transpose(1, 2).flatten(-2))
        y = F.layer_norm(x, x.shape[-1:], *self.norms[1], EPSILON)
        return x + self._apply("fc2", F.gelu(self._apply("fc1", y)))


def modulate(block: ConditionalBlock, condition: Tensor) -> Modulation:
    """The modulation of a block by conditions (U, 1, C), the weights of its norms folded in."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(F.silu(condition)).chunk(6, -1)
    scale1 = block.attention_norm.weight * (1 + scale1)
    scale2 = block.feed_forward_norm.weight * (1 + scale2)
    return Modulation(scale1, shift1, gamma1, scale2, shift2, gamma2)
