"""From logits to tokens: guidance, filters, and random numbers that belong to an image and not to a batch.

Nothing here knows a network; everything works on rows of logits (B, V).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lexel.errors import UsageError, unknown

BLOCK = 256  # logits summed before the cumulative sum; a sum is several times faster than a cumulative one

# ---------------------------------------------------------------------------------------------- guidance


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): unconditional + scale (conditional - unconditional).

    Scale 1 is off. Papers that write conditional + t (conditional - unconditional) mean scale = 1 + t.
    """
    return unconditional + scale * (conditional - unconditional)


# Schedules of guidance: the numbers they take, and the scale at token t of n.
SCHEDULES: dict[str, tuple[tuple[float, ...], Callable[..., float]]] = {
    "constant": ((), lambda scale, t, n: scale),
    "linear": ((1.0,), lambda scale, t, n, start: start + (scale - start) * t / max(n - 1, 1)),
    "ramp": ((), lambda scale, t, n: 1 + (scale - 1) * t / n),
    "cosine-power": (
        (1.0,),
        lambda scale, t, n, power: 1 + (scale - 1) * (1 - math.cos(math.pi * (t / n) ** power)) / 2,
    ),
    "interval": ((0.25, 1.0), lambda scale, t, n, begin, end: scale if begin <= t / n < end else 1.0),
}


def guidance_scales(schedule: str, scale: float, tokens: int) -> list[float]:
    """The scale at every token of an image.

    A schedule is a name and, after a colon, its numbers:
    - `constant`: the scale throughout, as IBQ and LlamaGen publish it;
    - `linear:start`: from `start` (default 1, off) at the first token to the scale at the last, as MAR;
    - `ramp`: 1 + (scale - 1) t / tokens at token t, as TiTok's masked generators;
    - `cosine-power:power`: 1 + (scale - 1) (1 - cos(pi (t / tokens)^power)) / 2 at token t, as RAR (default power 1;
      0 is constant);
    - `interval:begin,end`: the scale for tokens in [begin, end) of the image, given as shares of it, and 1 elsewhere
      (default 0.25,1: the first rows decide what the picture is of, and guidance there costs diversity).

    Raises:
        UsageError: the name is unknown or its numbers are wrong.
    """
    name, _, text = schedule.partition(":")
    if name not in SCHEDULES:
        raise unknown("cfg_schedule", name, SCHEDULES)
    defaults, formula = SCHEDULES[name]
    try:
        numbers = tuple(float(part) for part in text.split(",")) if text else defaults
    except ValueError:
        numbers = ()
    if len(numbers) != len(defaults) or not all(math.isfinite(number) for number in numbers):
        example = ",".join(str(number) for number in defaults)
        wanted = f"{name}:{example}" if example else name
        raise UsageError(f"cfg_schedule {schedule!r} has the wrong numbers; write it like {wanted!r}")
    if name == "cosine-power" and numbers[0] < 0:
        raise UsageError(f"cfg_schedule {schedule!r}: the power must be at least 0")
    if name == "interval" and not 0 <= numbers[0] <= numbers[1] <= 1:
        raise UsageError(f"cfg_schedule {schedule!r}: begin and end are shares of the image, 0 <= begin <= end <= 1")
    return [formula(scale, token, tokens, *numbers) for token in range(tokens)]


# ---------------------------------------------------------------------------------------------- filters


COLDEST = 1e-6  # the lowest temperature: logits over it are still far from float32's limit


def check_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Refuses filters that mean nothing."""
    if not (temperature >= COLDEST and math.isfinite(temperature)):
        raise UsageError(
            f"temperature must be a number from {COLDEST} up, got {temperature}; top_k = 1 takes the likeliest token"
        )
    if top_k < 0:
        raise UsageError(f"top_k must be at least 0 (0 is off), got {top_k}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be in (0, 1] (1 is off), got {top_p}")
    if not 0 <= min_p <= 1:
        raise UsageError(f"min_p must be in [0, 1] (0 is off), got {min_p}")


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits (B, V) over the temperature, then -inf where top-k, top-p or min-p, in this order, drop a token.

    Tokens that tie with the last one kept are kept too, so that the result does not depend on an order among equals.

    Args:
        temperature: divides the logits.
        top_k: keeps the k largest; 0 is off.
        top_p: keeps the smallest set of largest tokens whose probability exceeds p
            (https://arxiv.org/abs/1904.09751); 1 is off.
        min_p: keeps tokens at least min_p times as probable as the likeliest (https://arxiv.org/abs/2407.01082); 0 is
            off.
    """
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = _at_least(logits, logits.topk(top_k).values[..., -1:])
    if top_p < 1:
        logits = _at_least(logits, _nucleus_edge(logits, top_p))
    if min_p > 0:
        logits = _at_least(logits, logits.amax(-1, keepdim=True) + math.log(min_p))
    return logits


def _at_least(logits: Tensor, edge: Tensor) -> Tensor:
    return logits.masked_fill(logits < edge, -math.inf)


def _nucleus_edge(logits: Tensor, top_p: float, candidates: int = 512) -> Tensor:
    """The smallest logit that top-p keeps: (B, 1).

    A full sort is 20 times dearer than the largest few, and those nearly always hold the mass; where they do not,
    more are taken until they do, so the result is exact.
    """
    size = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True)
    while True:
        candidates = min(candidates, size)
        largest = logits.topk(candidates).values  # descending
        mass = (largest - total).exp().cumsum(-1)
        if candidates == size or bool((mass[..., -1] > top_p).all()):
            break
        candidates *= 4
    before = (mass <= top_p).sum(-1, keepdim=True)  # how many come before the one that crosses p; that one is kept
    return largest.gather(-1, before.clamp(max=candidates - 1))


# ---------------------------------------------------------------------------------------------- random numbers


def uniform_stream(seed: int, image_numbers: Sequence[int], count: int, block: int = 0) -> Tensor:
    """The block-th `count` random numbers of images: float64 (B, count) in [0, 1).

    Each image has its own counter-based stream (Philox, keyed by the seed and the image's number), of which a block is
    a part that no other block overlaps. Neither the batch an image is in, nor its place there, nor the number of
    processes can change its numbers.
    """
    raw = np.empty((len(image_numbers), count), dtype=np.uint64)
    for row, number in enumerate(image_numbers):
        key = np.array([seed % 2**64, number % 2**64], dtype=np.uint64)
        counter = np.array([0, 0, 0, block], dtype=np.uint64)
        raw[row] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53)


def sample_index(logits: Tensor, uniform: Tensor) -> Tensor:
    """The tokens at places `uniform` (B,) float64 of the cumulative distributions of logits (B, V): int64 (B,).

    One random number a row instead of the V that `torch.multinomial` draws. Tokens at -inf are never drawn.
    """
    size = logits.shape[-1]
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    blocks = torch.nn.functional.pad(weights, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, blocks)
    starts = torch.nn.functional.pad(ends, (1, 0))
    # Rounding may bring the target to the total, where no token is; the largest number below it is the last token's.
    total = ends[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(ends, target, right=True)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    # The block's own sum may differ from the one above in the last bit: again, stay below it.
    rest = torch.minimum(target - starts.gather(1, block), torch.nextafter(inner[:, -1:], torch.zeros_like(total)))
    return (block * BLOCK + torch.searchsorted(inner, rest, right=True))[:, 0]
