"""States that stream: sums of samples, checking what a saved one holds, and adding those of every process."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor

from lexel.distributed import all_sum, gather, processes
from lexel.errors import UsageError

Shape = tuple[int | None, ...]  # None stands for any length


class Sums:
    """Base of states that are tensors of fixed types and shapes, each a sum over samples.

    Attributes:
        what: the state is of, for errors.
        parts: names of the tensors.
    """

    what: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def merge(self, other: Self) -> None:
        """Adds the sums of another state; the two must not share samples."""
        for mine, theirs in zip(self.state_dict().values(), other.state_dict().values(), strict=True):
            mine += theirs.to(mine.device)

    def all_reduce(self) -> None:
        """Adds the sums of every process, if there are several."""
        for part in self.state_dict().values():
            all_sum(part)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            UsageError: a tensor is missing, or of another type or shape than its own.
        """
        expected = {name: (part.dtype, tuple(part.shape)) for name, part in self.state_dict().items()}
        for name, part in zip(self.parts, restored(state, self.what, **expected), strict=True):
            setattr(self, name, part)


def merge_processes(state: Any, empty: Callable[[], Any]) -> None:
    """Makes a state that of all processes, by its own `merge`; `empty` makes another like it that holds nothing."""
    if processes() == 1:
        return
    parts = gather(state.state_dict())
    state.load_state_dict(parts[0])
    for part in parts[1:]:
        other = empty()
        other.load_state_dict(part)
        state.merge(other)


def is_texts(value: Any) -> TypeGuard[dict[str, str]]:
    """Whether it is a table of texts, such as reasons by name."""
    return isinstance(value, dict) and all(isinstance(part, str) for item in value.items() for part in item)


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
