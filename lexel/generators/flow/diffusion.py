"""Gaussian diffusion: noise schedules, learned-range variance, DDPM and DDIM steps.

https://arxiv.org/abs/2006.11239, https://arxiv.org/abs/2102.09672 (learned variance, respacing),
https://arxiv.org/abs/2010.02502 (DDIM). Used by DiT (https://arxiv.org/abs/2212.09748) and by the diffusion loss of MAR
(https://arxiv.org/abs/2406.11838). All coefficients are computed in float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError

# Noised (N, C, ...) and steps (N,) to noise and variance (N, 2C, ...), or to noise alone (N, C, ...).
Model = Callable[[Tensor, Tensor], Tensor]


def linear_betas(steps: int = 1000) -> Tensor:
    """Variances rising linearly from 0.1 / steps to 20 / steps: float64 (steps,)."""
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000, largest: float = 0.999) -> Tensor:
    """Variances whose cumulative product follows a squared cosine: float64 (steps,)."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    kept = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - kept[1:] / kept[:-1]).clamp_max(largest)


def spaced_steps(steps: int, count: int) -> list[int]:
    """`count` of the numbers 0 to steps - 1, the first and the last among them, as evenly spaced as rounding allows.

    Raises:
        UsageError: more steps are asked for than there are, or none.
    """
    if not 1 <= count <= steps:
        raise UsageError(f"sampling steps must be from 1 to {steps}, got {count}")
    stride = (steps - 1) / (count - 1) if count > 1 else 1.0
    return [round(stride * number) for number in range(count)]


def ddim_steps(steps: int, count: int) -> list[int]:
    """`count` of the numbers 0 to steps - 1 with one integer stride, as DDIM takes them.

    Raises:
        UsageError: no stride gives exactly `count` steps.
    """
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise UsageError(f"no integer stride through {steps} steps gives {count}; try a divisor of {steps}")


class Posterior(NamedTuple):
    """The model's posterior of the step before: a normal distribution, and the clean data it follows from."""

    mean: Tensor
    log_variance: Tensor
    clean: Tensor
    noise: Tensor


class Diffusion:
    """A noise schedule and the steps through it. The model predicts noise and where its variance lies in its range.

    The variance of a model that predicts noise alone is the largest of the range, as DDPM has it.

    Args:
        betas: variance added at each step of training, float64 (T,).
        kept: the training steps that sampling visits, rising; all of them by default. The model is told the
            original numbers.
    """

    def __init__(self, betas: Tensor, kept: Sequence[int] | None = None) -> None:
        kept = range(len(betas)) if kept is None else kept
        self.training_betas = betas.double()
        products = torch.cumprod(1 - self.training_betas, 0)[list(kept)]
        self.steps = torch.tensor(list(kept))  # (S,): the original number of every step
        self.betas = 1 - products / torch.cat([products.new_ones(1), products[:-1]])
        # Multiplied anew, as published: the smallest products then differ in their ninth digit, and the division by
        # their root at the first steps of sampling shows it.
        self.cumulative = cumulative = torch.cumprod(1 - self.betas, 0)
        self.before = before = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
        variance = self.betas * (1 - before) / (1 - cumulative)
        # The variance of the first step is zero: its logarithm is that of the second.
        first = variance[1:2] if len(variance) > 1 else self.betas[:1]
        self.log_variance = torch.cat([first, variance[1:]]).log()
        self.clean_part = self.betas * before.sqrt() / (1 - cumulative)
        self.noised_part = (1 - before) * (1 - self.betas).sqrt() / (1 - cumulative)

    def respaced(self, kept: Sequence[int]) -> "Diffusion":
        """The schedule that visits only the `kept` steps of this one, with the same cumulative products."""
        return Diffusion(self.training_betas, kept)

    def noised(self, clean: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Data (N, C, ...) after `step` (N,) steps of noise."""
        return _at(self.cumulative.sqrt(), step, clean) * clean + _at((1 - self.cumulative).sqrt(), step, clean) * noise

    def posterior(self, output: Tensor, noised: Tensor, step: Tensor) -> Posterior:
        """The distribution of the step before, from the model's output (N, 2C or C, ...) at `noised` (N, C, ...)."""
        noise, *share = output.split(noised.shape[1], 1)
        if share:  # of the logarithm of the largest variance; the rest is of the smallest
            part = (share[0] + 1) / 2
            most, least = (_at(values, step, noised) for values in (self.betas.log(), self.log_variance))
            log_variance = part * most + (1 - part) * least
        else:
            largest = torch.cat([self.log_variance[:1], self.betas[1:].log()])
            log_variance = _at(largest, step, noised).expand_as(noised)
        scale = (1 / self.cumulative).sqrt()
        clean = _at(scale, step, noised) * noised - _at((1 / self.cumulative - 1).sqrt(), step, noised) * noise
        mean = _at(self.clean_part, step, noised) * clean + _at(self.noised_part, step, noised) * noised
        return Posterior(mean, log_variance, clean, noise)

    def losses(self, model: Model, clean: Tensor, step: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The two terms of the hybrid loss for each item, (N,): `noise` is the squared error, `variance` in bits.

        Without a predicted variance there is no such term.

        Args:
            model: called with noised data and original step numbers.
            clean: data (N, C, ...).
            step: steps of this schedule, int64 (N,).
            noise: standard normal numbers, as `clean`.
        """
        noised = self.noised(clean, step, noise)
        output = model(noised, self.steps.to(step.device)[step])
        if output.shape[1] == clean.shape[1]:
            return {"noise": _mean((output - noise).square())}
        predicted, share = output.split(clean.shape[1], 1)
        error = _mean((predicted - noise).square())
        # The variance learns from the likelihood, the mean does not.
        clean, noise, predicted, share = (_wide(x) for x in (clean, noise, predicted.detach(), share))
        noised = self.noised(clean, step, noise)
        believed = self.posterior(torch.cat([predicted, share], 1), noised, step)
        mean = _at(self.clean_part, step, clean) * clean + _at(self.noised_part, step, clean) * noised
        true = _at(self.log_variance, step, clean).expand_as(mean)
        divergence = _mean(_kl(mean, true, believed.mean, believed.log_variance)) / math.log(2)
        surprise = -_mean(_log_likelihood(clean, believed.mean, believed.log_variance / 2)) / math.log(2)
        variance = torch.where(step == 0, surprise, divergence).to(error.dtype)
        return {"noise": error, "variance": variance}

    def ancestral_step(
        self, output: Tensor, noised: Tensor, step: int, noise: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """One step of DDPM from `step` to the one before. `temperature` scales the noise that is added."""
        steps = torch.full((len(noised),), step, device=noised.device)
        believed = self.posterior(output, noised, steps)
        if step == 0:
            return believed.mean
        return believed.mean + (believed.log_variance / 2).exp() * noise * temperature

    def ddim_step(self, output: Tensor, noised: Tensor, step: int) -> Tensor:
        """One deterministic step of DDIM (eta 0)."""
        steps = torch.full((len(noised),), step, device=noised.device)
        believed = self.posterior(output, noised, steps)
        before = float(self.before[step])
        return believed.clean * math.sqrt(before) + math.sqrt(1 - before) * believed.noise


def _at(values: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """The value of each item's step, to be multiplied with data (N, C, ...)."""
    return values.to(like.device)[step].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _wide(values: Tensor) -> Tensor:
    """The values in float64, where the device has it.

    The variational term subtracts neighbouring values of a distribution function and divides by variances down to
    1e-5: in float32 a percent of it is rounding.
    """
    return values if values.device.type == "mps" else values.double()


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence of one normal distribution from another, in nats."""
    difference = log_variance - other_log_variance
    return 0.5 * (-1 - difference + difference.exp() + (mean - other_mean).square() * (-other_log_variance).exp())


def _log_likelihood(value: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """The log likelihood of values on 256 levels in [-1, 1] under a normal distribution, cut into these levels."""

    def below(limit: Tensor) -> Tensor:  # the tanh approximation of the normal distribution function, as published
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (limit + 0.044715 * limit**3)))

    narrow = (-log_deviation).exp()
    up, down = below(narrow * (value - mean + 1 / 255)), below(narrow * (value - mean - 1 / 255))
    inside = torch.where(value < -0.999, up, torch.where(value > 0.999, 1 - down, up - down))
    return inside.clamp_min(1e-12).log()


def time_features(time: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sinusoids of times (N,): cosines first, (N, width); float64 stays float64."""
    dtype = torch.promote_types(time.dtype, torch.float32) if time.is_floating_point() else torch.float32
    half = width // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, dtype=dtype, device=time.device) / half)
    angles = time[:, None].to(dtype) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, width % 2))
