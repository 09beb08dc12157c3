"""The two passes of index backpropagation as autograd and torch.compile's operators take them: tensors and options."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lexel.kernels import tiled
from lexel.kernels.inputs import Inputs

NAME = "index backpropagation"


def forward(*options: Any) -> tuple[Tensor, ...]:
    """z_q, the chosen codes, and the state of `tiled.forward`, from the fields of Inputs and an implementation."""
    inputs = Inputs(*options[:-1])
    state = tiled.forward(inputs, options[-1])
    z_q = F.embedding(state.indices, inputs.keys if inputs.codes is None else inputs.codes)
    return z_q, z_q.clone(), *state


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, codes, *ctx.options = inputs
    ctx.save_for_backward(queries, keys, codes, *output[2:])
    ctx.mark_non_differentiable(output[2], *output[5:])
    ctx.set_materialize_grads(False)  # a loss of one term pays for that term only


def backward(*options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and codes from the fields of Inputs, an implementation, and what came back."""
    *fields, implementation, state, soft, hard, sample, batch = options
    return tiled.backward(Inputs(*fields), tiled.ForwardState(*state), soft, hard, sample, batch, implementation)
