"""Where and in which precision a model runs."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from lexel.errors import UsageError, unknown

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Place(NamedTuple):
    """A device, and the half precision of its matrix products if any."""

    device: torch.device
    half: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which models run; indices are decided in float32 inside it all the same."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)


def place(device: str = "auto", precision: str = "float32") -> Place:
    """The place for names from a command line.

    Args:
        device: `auto` (CUDA, then Apple's GPU, then the CPU), or a torch device such as `cpu` or `cuda:1`.
        precision: a key of PRECISIONS.

    Raises:
        UsageError: no such device here, or no such precision.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    here = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if device == "auto":
        device = next(kind for kind in ("cuda", "mps", "cpu") if kind in here)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; this machine has {', '.join(here)}") from None
    if found.type not in here or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"no device {device!r} on this machine; it has {', '.join(here)}")
    return Place(found, PRECISIONS[precision])
