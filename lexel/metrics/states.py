"""Checking what a saved state holds before it is taken over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexel.errors import UsageError

Shape = tuple[int | None, ...]  # None stands for any length


def restored(state: Any, what: str, **expected: tuple[torch.dtype, Shape]) -> list[Tensor]:
    """The tensors of a saved state in the order of `expected`, each of the type and shape that it must have.

    Raises:
        UsageError: one is missing, or of another type or shape.
    """
    tensors = []
    for name, (dtype, shape) in expected.items():
        tensor = state.get(name) if isinstance(state, Mapping) else None
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype != dtype
            or tensor.ndim != len(shape)
            or any(length not in (None, axis) for axis, length in zip(tensor.shape, shape, strict=True))
        ):
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UsageError(f"a saved state of {what} is damaged: {name} is {got}, not {dtype} {shape}")
        tensors.append(tensor)
    return tensors
