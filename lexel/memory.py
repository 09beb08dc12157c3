"""Estimates of the memory that a tokenizer needs for images of a size, before any is allocated."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lexel.errors import UsageError
from lexel.runtime import Runtime, without_weights
from lexel.shapes import Shapes, Uncompiled
from lexel.tokenizer import Tokenizer

UNQUESTIONED = 2**22  # pixels in a batch that are not worth an estimate
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def check_memory(tokenizer: Tokenizer, runtime: Runtime, height: int, width: int, batch_size: int) -> None:
    """Refuses images of which a batch cannot fit in memory.

    Args:
        tokenizer: any; what its networks hold at a time is counted on the meta device.
        runtime: device and precision.
        height, width: of an image, in pixels; a size that the tokenizer takes.
        batch_size: images at a time.

    Raises:
        UsageError: the estimate is more than the device has.
    """
    if batch_size * height * width <= UNQUESTIONED:
        return
    there = available_bytes(runtime.device)
    if there is None:
        return
    needed = needed_bytes(tokenizer, height, width, batch_size, runtime.half)
    if needed > there:
        raise UsageError(
            f"out of memory: {batch_size} images of {width:,} x {height:,} pixels at a time need at least "
            f"{gib(needed)} GiB, {runtime.device} has {gib(there)} GiB; lower the size or the batch size"
        )


def needed_bytes(
    tokenizer: Tokenizer, height: int, width: int, batch_size: int, half: torch.dtype | None = None
) -> int:
    """The most bytes that a batch of images holds at a time on its way through encoder and decoder.

    A lower bound: weights, the search for codes and what libraries need for themselves are not counted. Attention
    counts with its inputs and results, as fused kernels compute it: it grows with the pixels, not with their square.
    """
    config = tokenizer.config
    with without_weights():
        shape = Tokenizer(config).eval()
    with torch.device("meta"):
        images = torch.empty(batch_size, config.autoencoder.channels, height, width)
    with torch.no_grad(), Shapes(), _Live() as live, FusedAttention():
        shape.decoder(decodable(shape, encoded(shape, images)))
    peak, pixels = live.peak, images.numel()
    return (peak // 2 if half is not None else peak) + pixels * 4 + pixels  # the images too: floats, and bytes


def encoded(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """The encoder's latents without a search for codes: a finer level sees latents in their place."""
    if tokenizer.autoencoder.shares is None:
        return tokenizer.encoder(images)
    return tokenizer.encoder(images, lambda level, latents: latents)


def decodable(tokenizer: Tokenizer, z: Tensor) -> Tensor:
    """An input of the decoder for the grid of an encoder's result, without values."""
    return z.new_empty(len(z), tokenizer.autoencoder.decoder_channels, *z.shape[2:])


def available_bytes(device: torch.device) -> int | None:
    """Bytes of memory that a device could still give; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [_machine_bytes(), _group_bytes(), _process_bytes()]
    return min((limit for limit in limits if limit is not None), default=None)


def _machine_bytes() -> int | None:
    """Free memory and swap of the machine."""
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree") if name in lines)
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes() -> int | None:
    """Bytes that a container's limit leaves."""
    numbers = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return max(0, min(numbers)) if numbers else None


def _process_bytes() -> int | None:
    """Bytes that `ulimit -v` leaves."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    return max(0, soft - used)


def gib(size: int) -> str:
    """Bytes in GiB, for people."""
    return f"{size / 2**30:,.1f}"


class _Live(Uncompiled):
    """Counts the bytes of tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._held: dict[int, int] = {}  # by storage: tensors that lie in it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._held:
                    self.bytes += size
                self._held[key] = self._held.get(key, 0) + 1
                finalize(tensor, self._release, key, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def _release(self, key: int, size: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            self.bytes -= size


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it on memory: a result, and nothing of N x N."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)
