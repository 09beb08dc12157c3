"""At which times of a path training looks: evenly, or mostly in the middle.

The logit-normal and the mode distribution are those of https://arxiv.org/abs/2403.03206.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lexel.errors import unknown

MODE_SCALE = 0.29


def _logit_normal(uniform: Tensor) -> Tensor:
    return torch.special.ndtri(uniform).sigmoid()


def mode(uniform: Tensor, scale: float = MODE_SCALE) -> Tensor:
    """Times that favour the middle of the path; a scale of 0 is uniform."""
    bend = (math.pi / 2 * uniform).cos().square() - 1 + uniform
    return 1 - uniform - scale * bend


TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda uniform: uniform,
    "logit_normal": _logit_normal,
    "mode": mode,
}


def training_times(uniform: Tensor, distribution: str = "uniform", stratified: bool = False) -> Tensor:
    """Times in [0, 1] of a distribution that is symmetric about 1/2, from uniform draws (N,).

    Args:
        uniform: numbers in (0, 1).
        distribution: a name in TIMES.
        stratified: one draw falls into each of N equal parts, so that a batch covers all times.

    Raises:
        UsageError: the distribution is unknown.
    """
    if distribution not in TIMES:
        raise unknown("distribution of times", distribution, TIMES)
    if stratified:
        uniform = (torch.arange(len(uniform), dtype=uniform.dtype, device=uniform.device) + uniform) / len(uniform)
    return TIMES[distribution](uniform)
