"""Decoding position by position: what a transformer computes for new tokens only, as fast as the machine allows.

The class is constant over an image, so the modulation of every norm is computed once a batch: about 30 % of the weights
leave the decode step. Keys and values lie in static caches. Projections that read the same input are one product, and
their weights lie as the chosen kind of product likes them (LINEARS).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError, unknown
from lexel.transformer import EPSILON, Block, ClassConditional, ClassStart, ConditionalBlock, Factorised, rotate

Linear = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)

# ---------------------------------------------------------------------------------------------- products


def plain(weight: Tensor) -> Linear:
    """The product as PyTorch does it."""
    return lambda x: F.linear(x, weight)


def packed(weight: Tensor) -> Linear:
    """Weights reordered once into the blocks that oneDNN multiplies by; the few rows of a decode step gain the most.

    Raises:
        UsageError: the weights are not on the CPU, or neither float32 nor bfloat16.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"packed weights need the CPU and float32 or bf16, got {weight.device.type} and {weight.dtype}"
        )
    if not torch.backends.mkldnn.is_available():
        raise UsageError("packed weights need a PyTorch with oneDNN; use implementation = 'plain'")
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def int8(weight: Tensor) -> Linear:
    """Weights rounded to 8 bits, one scale for each output; inputs are rounded as they come, one scale for all.

    Raises:
        UsageError: the weights are not float32 on the CPU.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise UsageError(f"int8 weights need the CPU and float32, got {weight.device.type} and {weight.dtype}")
    scales = (weight.abs().amax(1).double() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():  # PyTorch means to move these types elsewhere; the products themselves stay
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    blocks = torch.ops.quantized.linear_prepack(rounded, None)
    # Without VNNI, pairs of 8-bit products are added in 16 bits and saturate: leave them a bit of room.
    reduce_range = not getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return lambda x: torch.ops.quantized.linear_dynamic(x, blocks, reduce_range)


LINEARS: dict[str, Callable[[Tensor], Linear]] = {"plain": plain, "packed": packed, "int8": int8}

# What `implementation` may be: a kind of product, and two ways to leave out the cost of starting kernels on a GPU.
IMPLEMENTATIONS = ("auto", *LINEARS, "graph", "compiled")

# ---------------------------------------------------------------------------------------------- state


class Modulation(NamedTuple):
    """What a class makes of one block, (R, 1, C) each: norms become norm(x) * scale + shift, branches times gamma."""

    scale1: Tensor
    shift1: Tensor
    gamma1: Tensor
    scale2: Tensor
    shift2: Tensor
    gamma2: Tensor


class Sequences(NamedTuple):
    """Sequences under way, one a row. Slices share memory with the whole."""

    keys: list[Tensor]  # a block: (R, heads, slots, head_dim)
    values: list[Tensor]
    start: Tensor  # (R, 1, C), the class's vector, the input at position 0
    blocks: list[Modulation]  # empty for a transformer without modulation
    last: list[Tensor]  # scale and shift of the last norm, (R, 1, C) each; empty likewise

    def rows(self, begin: int, end: int) -> "Sequences":
        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[begin:end] for tensor in tensors]

        blocks = [Modulation(*cut(list(block))) for block in self.blocks]
        return Sequences(cut(self.keys), cut(self.values), self.start[begin:end], blocks, cut(self.last))


def _tensors(sequences: Sequences) -> list[Tensor]:
    modulation = [tensor for block in sequences.blocks for tensor in block]
    return [sequences.start, *modulation, *sequences.last]


class Keep(NamedTuple):
    """Where new keys and values go, and what the new positions may look at."""

    slots: Tensor  # (m,) int64, one for each new position
    length: int  # slots that are looked at
    mask: Tensor | None  # (m, length) bool; None when all of them may be seen


# ---------------------------------------------------------------------------------------------- the decoder


class _Block:
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
        table: Tensor,
        modulation: Modulation | None,
        cache: tuple[Tensor, Tensor] | None,
        keep: Keep | None,
    ) -> Tensor:
        """x (R, m, C) and its rotations, for `_turn`; without a cache the m positions are a whole sequence."""
        width = x.shape[-1]
        if modulation is None:
            y = F.rms_norm(x, (width,), self.norm1, EPSILON)
        else:
            y = torch.addcmul(modulation.shift1, F.rms_norm(x, (width,), None, EPSILON), modulation.scale1)

        qkv = self.qkv(y).unflatten(-1, (3 * self.heads, -1))  # (R, m, 3 * heads, head_dim)
        qk = _turn(qkv[:, :, : 2 * self.heads], table).transpose(1, 2)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        v = qkv[:, :, 2 * self.heads :].transpose(1, 2)
        if cache is None or keep is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = cache
            keys.index_copy_(2, keep.slots, k)
            values.index_copy_(2, keep.slots, v)
            keys, values = keys[:, :, : keep.length], values[:, :, : keep.length]
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=keep.mask)
        y = self.out(mixed.transpose(1, 2).flatten(-2))

        x = x + y if modulation is None else torch.addcmul(x, modulation.gamma1, y)
        if modulation is None:
            y = F.rms_norm(x, (width,), self.norm2, EPSILON)
        else:
            y = torch.addcmul(modulation.shift2, F.rms_norm(x, (width,), None, EPSILON), modulation.scale2)
        gate, up = self.gate_up(y).chunk(2, -1)
        y = self.down(F.silu(gate) * up)
        return x + y if modulation is None else torch.addcmul(x, modulation.gamma2, y)


def _turn(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` by a table (m, head_dim / 2, 2), or in one product by the same as complex numbers (m, head_dim / 2)."""
    if not table.is_complex():
        return rotate(x, table)
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)


class Decoder:
    """Runs a transformer over new positions only.

    Args:
        transformer: the network; its weights are read once, so later changes need a new decoder.
        implementation: of IMPLEMENTATIONS. `auto` is packed for float32 on a CPU with oneDNN, graph on CUDA, plain
            elsewhere. `graph` records the decode step once as CUDA graphs, one for each bucket of cache lengths;
            `compiled` compiles the step before that (on a CPU it only compiles).
        dtype: of weights, caches and arithmetic; the transformer's own by default.

    Raises:
        UsageError: an unknown implementation, or one that the device or dtype has not.
    """

    def __init__(
        self,
        transformer: ClassConditional | ClassStart | Factorised,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", implementation, IMPLEMENTATIONS)
        weight = transformer.classes.weight
        dtype = dtype or weight.dtype
        if implementation == "auto":
            on_cpu = weight.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
            implementation = "packed" if on_cpu else "graph" if weight.device.type == "cuda" else "plain"
        if implementation == "graph" and weight.device.type != "cuda":
            raise UsageError(f"implementation 'graph' needs a CUDA device, the generator is on {weight.device.type}")
        self.transformer = transformer
        self.implementation = implementation
        self.dtype = dtype
        self.device = weight.device
        self.graphs = implementation in ("graph", "compiled") and weight.device.type == "cuda"
        linear = LINEARS.get(implementation, plain)

        config = transformer.config
        self.heads = config.heads
        self.table = transformer.positions(weight.to(dtype)[:0])
        if implementation != "compiled":  # the compiler has no complex numbers, and fuses the six products anyway
            self.table = torch.view_as_complex(self.table)
        self.blocks = [_Block(block, linear, dtype) for block in transformer.blocks]  # type: ignore[arg-type]
        self.classes = transformer.classes.weight.detach()
        self.norm = transformer.norm.weight.detach().to(dtype)
        if isinstance(transformer, Factorised):
            self.embeddings = [embedding.weight.detach().to(dtype) for embedding in transformer.tokens]  # type: ignore[operator]
            self.pair_blocks = [_Block(block, linear, dtype) for block in transformer.pair_blocks]  # type: ignore[arg-type]
            self.heads_out = [linear(head.weight.detach().to(dtype)) for head in transformer.heads]  # type: ignore[operator]
        else:
            self.embeddings = [transformer.tokens.weight.detach().to(dtype)]
            self.pair_blocks = []
            self.heads_out = [linear(transformer.head.weight.detach().to(dtype))]
        self._step: Callable[..., Tensor] = self._run
        if implementation == "compiled":
            self._step = torch.compile(self._run, fullgraph=True)
        self._sequences: Sequences | None = None  # kept from call to call: recorded graphs write to these addresses
        self._graphs: dict[Any, _Graph] = {}

    # ------------------------------------------------------------------------------------------ sequences

    def bytes_per_row(self, slots: int) -> int:
        """Memory that one sequence needs, without the weights."""
        config = self.transformer.config
        cache = 2 * config.layers * slots * config.width
        modulation = 6 * config.layers * config.width if self._is_modulated else 0
        size = torch.empty(0, dtype=self.dtype).element_size()
        return (cache + modulation) * size + 32 * max(config.vocabularies)  # logits, and what filters make of them

    @property
    def _is_modulated(self) -> bool:
        return isinstance(self.transformer, ClassConditional)

    @torch.no_grad()
    def begin(self, class_labels: Tensor, slots: int) -> Sequences:
        """Empty sequences of classes (R,), with room for `slots` positions."""
        unique, row = class_labels.unique(return_inverse=True)
        condition = self.classes[unique][:, None]  # (U, 1, C), in the transformer's own dtype
        blocks: list[Modulation] = []
        last: list[Tensor] = []
        if isinstance(self.transformer, ClassConditional):
            blocks = [
                Modulation(*(part.to(self.dtype)[row] for part in _modulate(block, condition)))  # type: ignore[arg-type]
                for block in self.transformer.blocks
            ]
            scale, shift = self.transformer.modulation(F.silu(condition)).chunk(2, -1)
            scale = self.transformer.norm.weight * (1 + scale)
            last = [part.to(self.dtype)[row] for part in (scale, shift)]
        start = condition.to(self.dtype)[row]

        old = self._sequences
        if old is not None and old.keys[0].shape[0] == len(row) and old.keys[0].shape[2] >= slots:
            new = Sequences(old.keys, old.values, start, blocks, last)
            for kept, fresh in zip(_tensors(old), _tensors(new), strict=True):
                kept.copy_(fresh)
            return old
        self._graphs.clear()
        self._sequences = None  # before its successor: memory for both may not be there
        # Zeros, not garbage: a masked value of NaN would still spoil a weighted sum.
        shape = (len(row), self.heads, slots, self.classes.shape[1] // self.heads)
        keys = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.blocks]
        values = [torch.zeros_like(key) for key in keys]
        sequences = Sequences(keys, values, start, blocks, last)
        if self.graphs:
            self._sequences = sequences
        return sequences

    @property
    def kept_bytes(self) -> int:
        """Memory that caches of the last call still hold and the next call may use."""
        if self._sequences is None:
            return 0
        return sum(tensor.nbytes for tensor in [*self._sequences.keys, *self._sequences.values])

    # ------------------------------------------------------------------------------------------ positions

    def embed(self, sequences: Sequences, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Inputs at positions [begin, end): the class's vector at 0, the token before elsewhere. tokens (R, T)."""
        x = self.embed_tokens(tokens[:, max(begin - 1, 0) : end - 1])
        return torch.cat([sequences.start, x], 1) if begin == 0 else x

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens of any shape: (*shape, C)."""
        if len(self.embeddings) == 1:
            return F.embedding(tokens, self.embeddings[0])
        first = self.transformer.vocabularies[0]
        return F.embedding(tokens % first, self.embeddings[0]) + F.embedding(tokens // first, self.embeddings[1])

    @torch.no_grad()
    def extend(self, sequences: Sequences, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Runs positions [begin, end); those before have run. Returns the hidden state of the last one: (R, C)."""
        if self.graphs and end - begin == 1 and begin > 0:
            return self._replay(sequences, tokens[:, begin - 1], begin)
        x = self.embed(sequences, tokens, begin, end)
        slots = torch.arange(begin, end, device=self.device)
        mask = None
        if end - begin > 1:
            mask = torch.arange(end, device=self.device) <= slots[:, None]
        return self._step(sequences, x, self.table[begin:end], Keep(slots, end, mask))[:, -1]

    @torch.no_grad()
    def run(self, sequences: Sequences, x: Tensor, positions: Tensor, keep: Keep) -> Tensor:
        """Runs inputs x (R, m, C) at positions (m,), wherever these lie: (R, m, C)."""
        return self._step(sequences, x, self.table[positions], keep)

    def _run(self, sequences: Sequences, x: Tensor, table: Tensor, keep: Keep) -> Tensor:
        for number, block in enumerate(self.blocks):
            modulation = sequences.blocks[number] if sequences.blocks else None
            x = block(x, table, modulation, (sequences.keys[number], sequences.values[number]), keep)
        return x

    # ------------------------------------------------------------------------------------------ logits

    @torch.no_grad()
    def logits(self, sequences: Sequences, hidden: Tensor, first: Tensor | None = None) -> Tensor:
        """Logits (R, V) in at least float32 after hidden states (R, C).

        A factorised vocabulary is asked twice: for its first sub-token, then, given `first` (R,), for its second.
        """
        x = hidden[:, None]
        if self._is_modulated:
            scale, shift = sequences.last
            x = torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], None, EPSILON), scale)
        else:
            if first is not None:
                x = torch.cat([x, F.embedding(first, self.embeddings[0])[:, None]], 1)
            for block in self.pair_blocks:
                x = block(x, self.table[: x.shape[1]], None, None, None)
            x = F.rms_norm(x, x.shape[-1:], self.norm, EPSILON)
        logits = self.heads_out[0 if first is None else 1](x[:, -1])
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    # ------------------------------------------------------------------------------------------ CUDA graphs

    def _replay(self, sequences: Sequences, token: Tensor, position: int) -> Tensor:
        """One decode step as a recorded graph; the caches that attention reads grow in quarters."""
        slots = sequences.keys[0].shape[2]
        quarter = -(-slots // 4)
        length = min((position // quarter + 1) * quarter, slots)
        key = (sequences.keys[0].data_ptr(), len(token), length)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, sequences, length)
        return self._graphs[key](token, position)


class _Graph:
    """A decode step over a fixed number of slots, recorded as a CUDA graph: hundreds of kernels start as one.

    Token and position lie at fixed addresses, and what is later than the position is masked.
    """

    def __init__(self, decoder: Decoder, sequences: Sequences, length: int) -> None:
        self.decoder, self.sequences, self.length = decoder, sequences, length
        self.tokens = torch.zeros(len(sequences.start), 1, dtype=torch.long, device=decoder.device)
        self.slots = torch.zeros(1, dtype=torch.long, device=decoder.device)
        self.lengths = torch.arange(length, device=decoder.device)
        self._record()

    def _step(self) -> Tensor:
        decoder = self.decoder
        keep = Keep(self.slots, self.length, self.lengths <= self.slots[:, None])
        x = decoder.embed_tokens(self.tokens)
        return decoder._step(self.sequences, x, decoder.table[self.slots], keep)[:, -1]

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

    def __call__(self, token: Tensor, position: int) -> Tensor:
        self.tokens.copy_(token[:, None])
        self.slots.fill_(position)
        self.graph.replay()
        return self.hidden.clone()  # the next replay writes over it


def _modulate(block: ConditionalBlock, condition: Tensor) -> Modulation:
    """The modulation of a block by conditions (U, 1, C), the weights of its norms folded in."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(F.silu(condition)).chunk(6, -1)
    scale1 = block.attention_norm.weight * (1 + scale1)
    scale2 = block.feed_forward_norm.weight * (1 + scale2)
    return Modulation(scale1, shift1, gamma1, scale2, shift2, gamma2)


def fits(module: nn.Module) -> tuple[Any, ...]:
    """A value that changes when a parameter of the module is written to or replaced: decoders hold copies."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in module.parameters())
