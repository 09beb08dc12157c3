"""When running statistics (of EMA, of affine) move: in training, once a batch."""

import contextlib
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lexel.errors import UsageError

_FROZEN: ContextVar[bool] = ContextVar("frozen_statistics", default=False)


@contextlib.contextmanager
def frozen_statistics() -> Iterator[None]:
    """Inside, quantizers in training mode leave their running statistics as they are, for a look ahead at a batch."""
    token = _FROZEN.set(True)
    try:
        yield
    finally:
        _FROZEN.reset(token)


def recomputing() -> bool:
    """Whether this is a forward pass inside a backward pass: activation checkpointing does it a second time."""
    return torch._C._current_graph_task_id() != -1


def statistics_move(z: Tensor) -> bool:
    """Whether a forward pass on latents z in training mode is to move running statistics.

    Raises:
        UsageError: z is inside a function transform of torch.func, which can move nothing.
    """
    if recomputing() or _FROZEN.get():
        return False
    if transformed(z):
        raise UsageError(
            "running statistics cannot move inside torch.func; call eval(), or use lexel.quantizers.frozen_statistics"
        )
    return True


def transformed(tensor: Tensor) -> bool:
    """Whether a function transform of torch.func is at work on a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Recall:
    """Statistics of the forward pass of a batch, kept for activation checkpointing.

    Once statistics have moved on, the same latents would choose other codes. Nothing is kept unless activations are
    checkpointed. A copy or pickle starts empty.
    """

    def __init__(self) -> None:
        self.kept: deque[tuple[Tensor, tuple[Tensor, ...]]] = deque(maxlen=16)
        self.asked = False

    def keep(self, vectors: Tensor, *tensors: Tensor) -> None:
        """Keeps tensors that belong to latents (N, D) if a recomputation may follow."""
        if self.asked:  # the backward pass is over
            self.kept.clear()
            self.asked = False
        # Checkpointing runs without gradients (reentrant) or with hooks on what autograd saves.
        if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            self.kept.append((vectors.detach(), tuple(tensor.detach() for tensor in tensors)))

    def find(self, vectors: Tensor) -> tuple[Tensor, ...] | None:
        """The tensors kept for these latents; None if there are none."""
        self.asked = True
        for known, tensors in self.kept:
            if known.shape == vectors.shape and torch.equal(known, vectors):
                return tensors
        return None

    def __reduce__(self) -> tuple[type["Recall"], tuple[()]]:
        return Recall, ()
