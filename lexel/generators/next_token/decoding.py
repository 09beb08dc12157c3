"""Decoding position by position: what a transformer computes for new tokens only, as fast as the machine allows.

The condition is constant over an image, so the modulation of every norm is computed once a batch: about 30 % of the
weights leave the decode step. Keys and values lie in static caches. Projections that read the same input are one
product, and weights are stored in the layout of the chosen kind of product (`linears.LINEARS`).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError, unknown
from lexel.generators.next_token.blocks import EPSILON, Block, ConditionalBlock, GPTBlock
from lexel.generators.next_token.fused import (
    CacheWrite,
    FusedBlock,
    FusedGPTBlock,
    KVCache,
    Modulation,
    modulate,
    tensors_of,
)
from lexel.generators.next_token.linears import LINEARS, plain
from lexel.generators.next_token.network import Transformer

# What `implementation` may be: a kind of product, and two ways to leave out the cost of starting kernels on a GPU.
IMPLEMENTATIONS = ("auto", *LINEARS, "graph", "compiled", "triton")


class Decoder:
    """Runs a transformer over new positions only.

    Args:
        transformer: the network; its weights are read once, so later changes need a new decoder.
        implementation: of IMPLEMENTATIONS. `auto` is packed for float32 on a CPU with oneDNN, graph on CUDA, plain
            elsewhere. `graph` records the decode step once as CUDA graphs, one for each bucket of cache lengths;
            `compiled` compiles the step before that (on a CPU it only compiles); `triton` records kernels of Lexel's
            own where at most 16 rows are decoded in half precision.
        dtype: of weights, caches and arithmetic; the transformer's own by default.

    Raises:
        UsageError: an unknown implementation, or one that the device or dtype has not.
    """

    def __init__(
        self,
        transformer: Transformer,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", implementation, IMPLEMENTATIONS)
        weight = transformer.norm.weight
        dtype = dtype or weight.dtype
        if implementation == "auto":
            on_cpu = weight.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
            implementation = "packed" if on_cpu else "graph" if weight.device.type == "cuda" else "plain"
        if implementation in ("graph", "triton") and weight.device.type != "cuda":
            raise UsageError(
                f"implementation {implementation!r} needs a CUDA device, the generator is on {weight.device.type}"
            )
        own = implementation == "triton" and dtype in (torch.bfloat16, torch.float16)
        if own and find_spec("triton") is None:
            raise UsageError("implementation 'triton' needs the triton package; install it or use 'graph'")
        self.transformer = transformer
        self.implementation = implementation
        self.dtype = dtype
        self.device = weight.device
        self.graphs = implementation in ("graph", "compiled", "triton") and weight.device.type == "cuda"
        linear = LINEARS.get(implementation, plain)

        self.heads = transformer.config.heads
        self.offset = (
            transformer.condition.length - 1
        )  # rows of the condition before the one that position 0 stands for
        self.learned = transformer.learned_positions is not None
        self.rope = transformer.positions(weight.to(dtype)[:0]).detach()
        self.pair_rope = transformer.pair_positions(weight.to(dtype)[:0])
        # The compiler has no complex numbers, and fuses the six products anyway.
        if implementation != "compiled" and not self.learned:
            self.rope, self.pair_rope = torch.view_as_complex(self.rope), torch.view_as_complex(self.pair_rope)
        head = transformer.prediction
        self.blocks: list[FusedBlock | FusedGPTBlock] = [
            FusedGPTBlock(block, linear, dtype)
            if isinstance(block, GPTBlock)
            else _block_class(own)(cast(Block, block), linear, dtype)
            for block in transformer.blocks
        ]
        self.pair_blocks = [FusedBlock(block, linear, dtype) for block in head.blocks(transformer)]
        self.norm = transformer.norm.weight.detach().to(dtype)
        self.norm_bias = (
            transformer.norm.bias.detach().to(dtype) if isinstance(transformer.norm, nn.LayerNorm) else None
        )
        self.embeddings = [embedding.weight.detach().to(dtype) for embedding in head.embeddings(transformer)]
        self.outputs = [linear(output.weight.detach().to(dtype)) for output in head.outputs(transformer)]
        self._step: Callable[..., Tensor] = self._run
        if implementation == "compiled":
            self._step = torch.compile(self._run, fullgraph=True)
        self._cache: KVCache | None = None  # kept from call to call: recorded graphs write to these addresses
        self._graphs: dict[Any, _Graph] = {}

    # ------------------------------------------------------------------------------------------ caches

    def bytes_per_row(self, slots: int) -> int:
        """Memory that one sequence needs, without the weights."""
        config = self.transformer.config
        cache = 2 * config.layers * (slots + self.offset) * config.width
        modulation = 6 * config.layers * config.width if config.adaptive else 0
        size = torch.empty(0, dtype=self.dtype).element_size()
        return (cache + modulation) * size + 32 * max(config.vocabularies)  # logits, and what filters make of them

    @torch.inference_mode(False)  # caches that stay for the next call must be writable there
    @torch.no_grad()
    def start(self, condition: Tensor, slots: int) -> KVCache:
        """The caches of new sequences with conditions (R, ...), with room for `slots` positions."""
        unique, row = condition.unique(dim=0, return_inverse=True)
        rows = self.transformer.condition(unique)  # (U, L, C), in the transformer's own dtype
        blocks: list[Modulation] = []
        last: list[Tensor] = []
        if self.transformer.modulation is not None:
            vector = self.transformer.condition.pooled(rows)  # (U, 1, C)
            blocks = [
                Modulation(*(part.to(self.dtype)[row] for part in modulate(cast(ConditionalBlock, block), vector)))
                for block in self.transformer.blocks
            ]
            scale, shift = self.transformer.modulation(F.silu(vector)).chunk(2, -1)
            scale = self.transformer.norm.weight * (1 + scale)
            last = [part.to(self.dtype)[row] for part in (scale, shift)]
        before, start = rows.to(self.dtype)[row].split([self.offset, 1], 1)

        old, slots = self._cache, slots + self.offset
        if old is not None and old.keys[0].shape[0] == len(row) and old.keys[0].shape[2] >= slots:
            for held, fresh in zip(tensors_of(old), tensors_of(KVCache([], [], start, blocks, last)), strict=True):
                held.copy_(fresh)
            self._prefill(old, before)
            return old
        self._graphs.clear()
        self._cache = None  # before its successor: memory for both may not be there
        # Zeros, not garbage: a masked value of NaN would still spoil a weighted sum.
        shape = (len(row), self.heads, slots, start.shape[-1] // self.heads)
        keys = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.blocks]
        values = [torch.zeros_like(key) for key in keys]
        cache = KVCache(keys, values, start, blocks, last)
        if self.graphs:
            self._cache = cache
        self._prefill(cache, before)
        return cache

    def _prefill(self, cache: KVCache, rows: Tensor) -> None:
        """Keys and values of the condition's rows (R, offset, C) before the last, which position 0 stands for."""
        if rows.shape[1]:
            slots = torch.arange(rows.shape[1], device=self.device)
            self._run(cache, rows, self.rope[slots], CacheWrite(slots, len(slots), slots <= slots[:, None]))

    @property
    def kept_bytes(self) -> int:
        """Memory that caches of the last call still hold and the next call may use."""
        if self._cache is None:
            return 0
        return sum(tensor.nbytes for tensor in [*self._cache.keys, *self._cache.values])

    # ------------------------------------------------------------------------------------------ positions

    def embed(self, cache: KVCache, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Inputs at positions [begin, end): the condition's last row at 0, else the token before. tokens (R, T)."""
        x = self.embed_tokens(tokens[:, max(begin - 1, 0) : end - 1])
        return torch.cat([cache.start, x], 1) if begin == 0 else x

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens of any shape: (*shape, C)."""
        if len(self.embeddings) == 1:
            return F.embedding(tokens, self.embeddings[0])
        first = self.transformer.vocabularies[0]
        return F.embedding(tokens % first, self.embeddings[0]) + F.embedding(tokens // first, self.embeddings[1])

    @torch.no_grad()
    def decode(self, cache: KVCache, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Runs positions [begin, end); those before have run. Returns the hidden state of the last one: (R, C)."""
        if self.graphs and end - begin == 1 and begin > 0:
            return self._replay(cache, tokens[:, begin - 1], begin + self.offset)
        x = self.embed(cache, tokens, begin, end)
        slots = torch.arange(begin + self.offset, end + self.offset, device=self.device)
        length, mask = end + self.offset, None
        if end - begin > 1:
            mask = torch.arange(length, device=self.device) <= slots[:, None]
        return self._step(cache, x, self.rope[begin + self.offset : length], CacheWrite(slots, length, mask))[:, -1]

    @torch.no_grad()
    def run(self, cache: KVCache, x: Tensor, positions: Tensor, write: CacheWrite) -> Tensor:
        """Runs inputs x (R, m, C) at positions (m,), or (R, m), wherever these lie: (R, m, C).

        `write` counts from position 0.
        """
        if self.offset:  # the rows of the condition before it are in the cache, and everything sees them
            mask = None if write.mask is None else F.pad(write.mask, (self.offset, 0), value=True)
            write = CacheWrite(write.slots + self.offset, write.length + self.offset, mask)
        return self._step(cache, x, self.rope[positions + self.offset], write)

    def _run(self, cache: KVCache, x: Tensor, rope: Tensor, write: CacheWrite) -> Tensor:
        if self.learned:
            x = x + rope
        for number, block in enumerate(self.blocks):
            modulation = cache.blocks[number] if cache.blocks else None
            x = block(x, rope, modulation, (cache.keys[number], cache.values[number]), write)
        return x

    # ------------------------------------------------------------------------------------------ logits

    @torch.no_grad()
    def logits(self, cache: KVCache, hidden: Tensor, first: Tensor | None = None) -> Tensor:
        """Logits (R, [m,] V) in at least float32 after hidden states (R, [m,] C).

        A factorised vocabulary is asked twice: for its first sub-token, then, given `first` (R, [m]), for its second.
        """
        if cache.last:
            scale, shift = cache.last
            x = hidden if hidden.dim() == 3 else hidden[:, None]  # (R, m, C)
            x = torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], None, EPSILON), scale).view_as(hidden)
        else:
            x = hidden.unsqueeze(-2).flatten(0, -3)  # (R * m, 1, C): a row for each sub-token
            if first is not None:
                x = torch.cat([x, F.embedding(first.flatten(), self.embeddings[0])[:, None]], 1)
            for block in self.pair_blocks:
                x = block(x, self.pair_rope[: x.shape[1]], None, None, None)
            if self.norm_bias is None:
                x = F.rms_norm(x, x.shape[-1:], self.norm, EPSILON)
            else:
                x = F.layer_norm(x, x.shape[-1:], self.norm, self.norm_bias, EPSILON)
            x = x[:, -1].view_as(hidden)
        logits = self.outputs[0 if first is None else 1](x)
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    # ------------------------------------------------------------------------------------------ CUDA graphs

    def _replay(self, cache: KVCache, token: Tensor, slot: int) -> Tensor:
        """One decode step as a recorded graph; the caches that attention reads grow in quarters."""
        slots = cache.keys[0].shape[2]
        quarter = -(-slots // 4)
        length = min((slot // quarter + 1) * quarter, slots)
        key = (cache.keys[0].data_ptr(), len(token), length)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, cache, length)
        return self._graphs[key](token, slot)


def _block_class(own: bool) -> type[FusedBlock]:
    if not own:
        return FusedBlock
    from lexel.generators.next_token.triton_block import TritonBlock  # needs the triton package

    return cast(type[FusedBlock], TritonBlock)


class _Graph:
    """A decode step over a fixed number of slots, recorded as a CUDA graph: hundreds of kernels start as one.

    Token and position lie at fixed addresses, and what is later than the position is masked.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, length: int) -> None:
        self.decoder, self.cache, self.length = decoder, cache, length
        self.tokens = torch.zeros(len(cache.start), 1, dtype=torch.long, device=decoder.device)
        self.slots = torch.zeros(1, dtype=torch.long, device=decoder.device)
        self.lengths = torch.arange(length, device=decoder.device)
        self._record()

    def _step(self) -> Tensor:
        decoder = self.decoder
        write = CacheWrite(self.slots, self.length, self.lengths <= self.slots[:, None])
        x = decoder.embed_tokens(self.tokens)
        return decoder._step(self.cache, x, decoder.rope[self.slots], write)[:, -1]

    def _record(self) -> None:
        device = self.decoder.device
        self.slots.fill_(self.length - 1)  # not in use yet: the step at this position will write over what comes here
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries set up what they cannot while recording
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self._step()

    def __call__(self, token: Tensor, slot: int) -> Tensor:
        self.tokens.copy_(token[:, None])
        self.slots.fill_(slot)
        self.graph.replay()
        return self.hidden.clone()  # the next replay writes over it


def weights_version(module: nn.Module) -> tuple[Any, ...]:
    """A value that changes when a parameter is written to or replaced, because decoders hold copies.

    Parameters made in `torch.inference_mode()` do not count what is written to them: the value is then never the same
    again.
    """
    parameters = list(module.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return (object(),)
    return tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
