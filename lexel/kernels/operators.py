"""Operators that torch.compile does not look into, so that a step around them compiles without a graph break.

Imported where tensors are traced: registering them looks through all imported modules, a tenth of a command's start.
"""

from typing import Any

import torch
from torch import Tensor

from lexel.kernels import passes, tiled
from lexel.kernels.inputs import Inputs, incoming, second_derivatives
from lexel.kernels.search import best_codes


@torch.library.custom_op("lexel::search", mutates_args=())
def search(queries: Tensor, keys: Tensor, distance: bool, implementation: str) -> Tensor:
    return best_codes(queries, keys, distance, implementation)


@search.register_fake
def _(queries: Tensor, keys: Tensor, distance: bool, implementation: str) -> Tensor:
    return queries.new_empty(len(queries), dtype=torch.int64)


_OPTIONS = (  # the fields of Inputs, and an implementation
    "Tensor queries, Tensor keys, Tensor? codes, bool distance, float temperature, float entropy_temperature, "
    "bool entropy, int rows, int parts, int together, bool half, str implementation"
)
_GRADS = "Tensor? soft, Tensor? hard, Tensor? sample, Tensor? batch"
index_backpropagation = torch.library.custom_op(
    "lexel::index_backpropagation",
    passes.forward,
    mutates_args=(),
    schema=f"({_OPTIONS}) -> ({', '.join(['Tensor'] * 11)})",
)
_backward_operator = torch.library.custom_op(
    "lexel::index_backpropagation_backward",
    passes.backward,
    mutates_args=(),
    schema=f"({_OPTIONS}, Tensor[] state, {_GRADS}) -> (Tensor, Tensor, Tensor)",
)


@index_backpropagation.register_fake
def _(queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(queries, keys, *rest[:-1])
    return torch.empty_like(queries), torch.empty_like(queries), *tiled.empty_state(inputs)


@_backward_operator.register_fake
def _(queries: Tensor, keys: Tensor, codes: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_codes = queries.new_empty(0) if codes is None else torch.empty_like(codes)
    return torch.empty_like(queries), torch.empty_like(keys), d_codes


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, codes, *state = ctx.saved_tensors
    gradients = _backward_operator(queries, keys, codes, *ctx.options, state, *incoming(grads))
    return *gradients[:2], None if codes is None else gradients[2], *[None] * len(ctx.options)


def _no_gradients(ctx: Any, *grads: Tensor | None) -> None:
    raise second_derivatives(passes.NAME)


index_backpropagation.register_autograd(_gradients, setup_context=passes.keep)
_backward_operator.register_autograd(_no_gradients)
