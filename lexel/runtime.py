"""Device, precision, exact float32, cache folder, peak memory."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from lexel.errors import UsageError
from lexel.registry import lookup
from lexel.regular import expanded

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Beyond these a network is a typing error; the largest published ones have a hundredth of either.
MOST_MODULES = 10_000
MOST_NUMBERS = 2**40


ProgressCallback = Callable[[int, int | None], None]
"""Called with what is done and with how much there is; None where that is not known."""


class Runtime(NamedTuple):
    """A device, and the half precision of its matrix products if any."""

    device: torch.device
    half: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which models run; indices are decided in float32 inside it all the same."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)


def runtime(device: str = "auto", precision: str = "float32") -> Runtime:
    """The device and precision for names from a command line.

    Args:
        device: `auto` (CUDA, then Apple's GPU, then the CPU), or a torch device such as `cpu` or `cuda:1`.
        precision: a key of PRECISIONS.

    Raises:
        UsageError: this machine has no such device, or there is no such precision.
    """
    half = lookup(PRECISIONS, precision, "precision")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind in there if there[kind]]  # the best first
    if device == "auto":
        device = here[0]
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; this machine has {', '.join(here)}") from None
    if found.type not in here or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"no device {device!r} on this machine; it has {', '.join(here)}")
    return Runtime(found, half)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """True float32 for what runs inside: no autocast, and no TF32, which CUDA's convolutions otherwise use."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves meta tensors as they are where they would be drawn at random, scaled or normalised."""

    FILLING = (Tensor.normal_, Tensor.uniform_, Tensor.mul_, Tensor.div_, F.normalize)
    MAKING = (torch.rand, torch.randn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in self.FILLING:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        if func in self.MAKING and not kwargs.keys() & {"device", "generator"}:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The context in which results are computed in the precision of their inputs; also on the meta device."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have shapes and no values (meta tensors); no random state is touched.

    Drawing values for meta tensors would import PyTorch's compiler and sympy, seconds for nothing. So does arithmetic
    with them, such as `torch.randn(n) * 0.02`; in place, `torch.randn(n).mul_(0.02)`, it does not, to the same bits.

    Raises:
        UsageError: a network of a size that no machine has room for, as soon as it is that large.
    """
    with torch.device("meta"), _WithoutInitialisation(), _bounded():
        yield


def on_meta() -> bool:
    """Whether new tensors have shapes only, as inside `without_weights`: files of weights need not be read."""
    return torch.empty(0).is_meta


@contextmanager
def _bounded() -> Iterator[None]:
    """Counts the modules and the numbers of what this thread builds, and ends it where they are too many."""
    thread, modules, numbers = threading.get_ident(), 0, 0

    def count(_: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        nonlocal modules, numbers
        if threading.get_ident() != thread:
            return
        modules += isinstance(part, nn.Module)
        numbers += part.numel() if isinstance(part, Tensor) else 0
        if modules > MOST_MODULES:
            raise UsageError(f"the network has more than {MOST_MODULES:,} layers; lower the number of layers or blocks")
        if numbers > MOST_NUMBERS:
            raise UsageError(f"the network has more than {MOST_NUMBERS:,} weights; lower its widths")

    hooks = (
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cache_folder() -> Path:
    """The cache folder of downloads, drawings, converted weights and statistics; it need not exist.

    LEXEL_CACHE; else `lexel` in XDG_CACHE_HOME; else ~/.cache/lexel.
    """
    given = os.environ.get("LEXEL_CACHE")
    if given:
        return expanded(given)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lexel"


def is_cached(path: Path) -> bool:
    """Whether a file of the cache is there; False where the folder may not be entered."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def one_thread() -> Iterator[None]:
    """The context in which PyTorch computes on one thread, so that numbers do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PeakMemory:
    """The most memory that was in use since this was made: of the GPU where there is one, else of the process."""

    PEAK = Path("/proc/self/status")
    RESET = Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.measurable = self.RESET.exists() and self.PEAK.exists()
        if self.measurable:
            try:
                self.RESET.write_text("5")  # Linux: forget the process's peak so far
            except OSError:  # not allowed here: no number is better than one of another run
                self.measurable = False

    def read(self, device: torch.device) -> int | None:
        """Bytes; None where this system does not tell."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        if not self.measurable:
            return None
        lines = self.PEAK.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
