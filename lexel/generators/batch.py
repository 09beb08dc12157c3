"""A batch of images to sample: what a family is given, and its images' own random numbers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators.sampling import filter_logits, guide, sample_index, uniform_stream
from lexel.runtime import ProgressCallback

MEMINFO = Path("/proc/meminfo")  # of Linux


class SampleBatch(NamedTuple):
    """Images that are made together, and how."""

    condition: Tensor  # (B, ...), checked
    null: Tensor | None  # (B, ...), the null condition; None without guidance
    tokens: Tensor  # (B, T), FREE where a token is to be sampled; the family may write to it
    scales: list[list[float]]  # of guidance, for each sub-vocabulary, for each decision
    filters: list[dict[str, Any]]  # arguments of `filter_logits`, for each sub-vocabulary
    seed: int
    numbers: list[int]  # of the images in the random stream
    options: Any  # the family's SampleOptions
    dtype: torch.dtype | None
    report: Callable[[float], None]  # told the share of the work that is done

    @property
    def guided(self) -> bool:
        """Whether guidance is on at any decision."""
        return self.null is not None

    def guided_at(self, decision: int) -> bool:
        """Whether guidance is on at a decision."""
        return any(scales[decision] != 1 for scales in self.scales)

    @property
    def conditions(self) -> list[Tensor]:
        """Conditions of the network: the condition, and with guidance the null condition after it."""
        return [self.condition] if self.null is None else [self.condition, self.null]

    def draw(self, logits: Tensor, decision: int, uniforms: Tensor, part: int = 0) -> Tensor:
        """Tokens (B, ...) drawn from logits, guided and filtered as the user wants.

        Args:
            logits: (B, ..., V), or (2 B, ..., V) with those of the null condition after the others.
            decision: where in the schedule of guidance.
            uniforms: (B, ...) random numbers, of `uniforms`.
            part: of a factorised vocabulary.
        """
        count = len(self.tokens)
        if len(logits) > count:
            logits = guide(logits[:count], logits[count:], self.scales[part][decision])
        rows = filter_logits(logits.flatten(0, -2).to(uniforms.device), **self.filters[part])
        return sample_index(rows, uniforms.flatten()).view(logits.shape[:-1]).to(self.tokens.device)

    def law(self, logits: Tensor, decisions: Tensor, part: int = 0) -> Tensor:
        """Log-probabilities of what `draw` draws: float64 (B, n, V), on the device of `decisions`.

        Args:
            logits: (B, n, V), or (2 B, n, V) with those of the null condition after the others.
            decisions: (B, n), where each is in the schedule of guidance.
            part: of a factorised vocabulary.
        """
        count, logits = len(self.tokens), logits.to(decisions.device)
        if len(logits) > count:
            scales = torch.tensor(self.scales[part], dtype=logits.dtype, device=logits.device)[decisions][..., None]
            logits = torch.where(scales == 1, logits[:count], guide(logits[:count], logits[count:], scales))
        rows = filter_logits(logits.flatten(0, -2), **self.filters[part])
        return rows.double().log_softmax(-1).view(logits.shape)

    def uniforms(self, block: int, count: int) -> Tensor:
        """The block-th `count` random numbers of every image: float64 (B, count) in [0, 1).

        Each image reads its own stream, so a family that draws from nothing else makes the same images in any batch.
        """
        random = uniform_stream(self.seed, self.numbers, count, block)
        # Apple's GPUs have no float64: there the draw is the CPU's.
        return random if self.tokens.device.type == "mps" else random.to(self.tokens.device)


def for_each(value: float | Sequence[float], parts: int, name: str) -> list[float]:
    """A number for each sub-vocabulary, from one for all or a sequence."""
    values = [float(value)] * parts if isinstance(value, int | float) else [float(each) for each in value]
    if len(values) != parts or not all(math.isfinite(each) for each in values):
        raise UsageError(f"{name} must be a number, or {parts} of them (one for each sub-token), got {value}")
    return values


def reporter(
    progress: ProgressCallback | None, watch: Callable[[Tensor], None] | None, tokens: Tensor, before: int, count: int
) -> Callable[[float], None]:
    """What is told of a batch's tokens (b, T), with so many of `count` images before it: the share that is done.

    `progress` is called with tokens done of tokens in all, `watch` with the tokens as they are.
    """
    images, length = tokens.shape

    def report(share: float) -> None:
        if progress is not None:
            progress(before * length + round(images * length * share), count * length)
        if watch is not None:
            watch(tokens)

    return report


def free_bytes(device: torch.device, held: int) -> int:
    """Memory that is free on a device, with what a model still holds there and would give back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + held
    if MEMINFO.is_file():  # "MemAvailable: 20971520 kB" counts what the system would give back from its file cache
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30  # a system that does not tell
