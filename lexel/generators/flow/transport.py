"""Flow matching and stochastic interpolants: paths from noise to data, their losses, ODE and SDE samplers.

SiT (https://arxiv.org/abs/2401.08740). Time t runs from 0 (noise) to 1 (data); a path is
x(t) = data_part(t) data + noise_part(t) noise.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (N, C, ...) and times (N,) to velocities like x


class Parts(NamedTuple):
    """The shares of data and noise in a path at some times, and how they change."""

    data: Tensor
    noise: Tensor
    data_rate: Tensor  # derivative of `data` by time
    noise_rate: Tensor
    growth: Tensor  # data_rate / data


def linear_path(time: Tensor) -> Parts:
    """Straight lines from noise to data: flow matching."""
    return Parts(time, 1 - time, torch.ones_like(time), -torch.ones_like(time), 1 / time)


def trigonometric_path(time: Tensor) -> Parts:
    """Arcs on which the variance stays 1 (generalised variance preserving, GVP)."""
    angle = time * math.pi / 2
    data, noise = angle.sin(), angle.cos()
    rate = math.pi / 2
    return Parts(data, noise, rate * noise, -rate * data, rate / angle.tan())


def variance_preserving_path(time: Tensor, least: float = 0.1, most: float = 20.0) -> Parts:
    """The path of variance-preserving diffusion, with noise rates from `least` to `most`."""
    rest = 1 - time
    logarithm = -0.25 * rest.square() * (most - least) - 0.5 * rest * least
    growth = 0.5 * rest * (most - least) + 0.5 * least
    data, noise = logarithm.exp(), (1 - (2 * logarithm).exp()).sqrt()
    return Parts(data, noise, data * growth, -(2 * logarithm).exp() * growth / noise, growth)


PATHS: dict[str, Callable[[Tensor], Parts]] = {
    "linear": linear_path,
    "gvp": trigonometric_path,
    "vp": variance_preserving_path,
}


class Transport:
    """A path from noise to data and what the network predicts along it.

    Args:
        path: a name in PATHS.
        prediction: `velocity`, `noise` or `score`.
        weighting: of the loss of `noise` and `score`: `none`, `velocity` or `likelihood`.
    """

    def __init__(self, path: str = "linear", prediction: str = "velocity", weighting: str = "none") -> None:
        self.path, self.prediction, self.weighting = path, prediction, weighting
        straight = prediction == "velocity" and path != "vp"
        # Where a division by a share of the path is needed, time keeps away from the ends.
        self.training_margin = 0.0 if straight else 1e-5 if path == "vp" else 1e-3
        self.sampling_margin = 0.0 if straight else 1e-3

    def interval(self, margin: float) -> tuple[float, float]:
        """Times that are used: both ends are kept off by `margin`, but variance-preserving paths may end at 1."""
        if self.path == "vp":
            return 0.0, 1 - margin
        return margin, 1 - margin

    def parts(self, time: Tensor, like: Tensor) -> Parts:
        """The path at times (N,), to be multiplied with data (N, C, ...)."""
        return PATHS[self.path](time.to(like.dtype).view(-1, *[1] * (like.dim() - 1)))

    def between(self, data: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The point of the path at times (N,), and its velocity: both like `data`."""
        parts = self.parts(time, data)
        return parts.data * data + parts.noise * noise, parts.data_rate * data + parts.noise_rate * noise

    def loss(self, model: Velocity, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The squared error of the prediction for each item: (N,)."""
        point, velocity = self.between(data, noise, time)
        predicted, parts = model(point, time), self.parts(time, data)
        if self.prediction == "velocity":
            return (predicted - velocity).square().flatten(1).mean(1)
        spread = _spread(parts)
        weight = {
            "none": torch.ones_like(spread),
            "velocity": (spread / parts.noise).square(),
            "likelihood": spread / parts.noise.square(),
        }[self.weighting]
        error = predicted - noise if self.prediction == "noise" else predicted * parts.noise + noise
        return (weight * error.square()).flatten(1).mean(1)

    def velocity(self, output: Tensor, point: Tensor, time: Tensor) -> Tensor:
        """The velocity that the network's output at a point (N, C, ...) and times (N,) amounts to."""
        if self.prediction == "velocity":
            return output
        parts = self.parts(time, point)
        return parts.growth * point + _spread(parts) * self.score(output, point, time)

    def score(self, output: Tensor, point: Tensor, time: Tensor) -> Tensor:
        """The gradient of the log density that the network's output amounts to."""
        parts = self.parts(time, point)
        if self.prediction == "score":
            return output
        if self.prediction == "noise":
            return -output / parts.noise
        inverse = parts.data / parts.data_rate
        variance = parts.noise.square() - inverse * parts.noise_rate * parts.noise
        return (inverse * output - point) / variance

    def diffusion(self, form: str, point: Tensor, time: Tensor, norm: float = 1.0) -> Tensor:
        """The diffusion coefficient of an SDE sampler at times (N,), to be multiplied with points."""
        parts = self.parts(time, point)
        time = time.to(point.dtype).view(-1, *[1] * (point.dim() - 1))
        forms = {
            "constant": lambda: norm * torch.ones_like(time),
            "sbdm": lambda: norm * _spread(parts),
            "sigma": lambda: norm * parts.noise,
            "linear": lambda: norm * (1 - time),
            "decreasing": lambda: 0.25 * (norm * torch.cos(math.pi * time) + 1).square(),
            "increasing_decreasing": lambda: norm * torch.sin(math.pi * time).square(),
        }
        return forms[form]()


def _spread(parts: Parts) -> Tensor:
    """The factor of the score in the velocity."""
    return parts.growth * parts.noise.square() - parts.noise * parts.noise_rate


def _euler(field: Velocity, point: Tensor, time: Tensor, step: float) -> Tensor:
    return point + step * field(point, time)


def _midpoint(field: Velocity, point: Tensor, time: Tensor, step: float) -> Tensor:
    half = point + step / 2 * field(point, time)
    return point + step * field(half, time + step / 2)


def _heun(field: Velocity, point: Tensor, time: Tensor, step: float) -> Tensor:
    first = field(point, time)
    return point + step / 2 * (first + field(point + step * first, time + step))


ODE_STEPS: dict[str, Callable[[Velocity, Tensor, Tensor, float], Tensor]] = {
    "euler": _euler,
    "midpoint": _midpoint,
    "heun": _heun,
}


def solve_ode(
    field: Velocity,
    noise: Tensor,
    points: int,
    method: str = "euler",
    interval: tuple[float, float] = (0.0, 1.0),
    hold: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Follows a velocity field from noise to data over `points` evenly spaced times; yields each point after the first.

    Args:
        field: points (N, C, ...) and times (N,) to velocities.
        noise: where to start.
        points: times of the grid.
        method: a name in ODE_STEPS.
        interval: first and last time.
        hold: changes a point at a time, as where parts of it are given.
    """
    point = noise
    times = torch.linspace(*interval, points, dtype=torch.float64).tolist()
    for now, later in itertools.pairwise(times):
        time = torch.full((len(point),), now, dtype=point.dtype, device=point.device)
        point = ODE_STEPS[method](field, point, time, later - now)
        if hold is not None:
            point = hold(point, torch.full_like(time, later))
        yield point


class SDE(NamedTuple):
    """Options of an SDE sampler: Euler-Maruyama or Heun steps, the noise it adds, its last step."""

    method: str = "euler"  # or "heun"
    diffusion: str = "sigma"  # a form of `Transport.diffusion`
    norm: float = 1.0
    last: str = "mean"  # or "euler", "tweedie", "none"
    last_size: float = 0.04


SDE_DEFAULT = SDE()


def solve_sde(
    transport: Transport,
    model: Velocity,
    noise: Tensor,
    points: int,
    draw: Callable[[int], Tensor],
    sde: SDE = SDE_DEFAULT,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Iterator[Tensor]:
    """Follows the reverse SDE of a transport over `points` times, the last step included; yields every point.

    Args:
        transport: the path and what the model predicts.
        model: the network: points (N, C, ...) and times (N,) to outputs.
        noise: where to start, standard normal (N, C, ...).
        points: times of the grid; the last one is left by the last step.
        draw: standard normal numbers like `noise` for the step of that number.
        sde: steps, noise and last step.
        interval: first and last time.
    """
    start, end = interval
    if sde.last != "none":
        end -= sde.last_size
    point = noise

    def at(now: float) -> Tensor:
        return torch.full((len(point),), now, dtype=point.dtype, device=point.device)

    def drift(x: Tensor, time: Tensor) -> Tensor:
        output = model(x, time)
        push = transport.diffusion(sde.diffusion, x, time, sde.norm)
        return transport.velocity(output, x, time) + push * transport.score(output, x, time)

    times = torch.linspace(start, end, points, dtype=torch.float64).tolist()
    for number, (now, later) in enumerate(itertools.pairwise(times)):
        step, time = later - now, at(now)
        spread = (2 * transport.diffusion(sde.diffusion, point, time, sde.norm) * step).sqrt() * draw(number)
        if sde.method == "euler":
            point = point + step * drift(point, time) + spread
        else:
            noisy = point + spread
            first = drift(noisy, time)
            point = noisy + step / 2 * (first + drift(noisy + step * first, at(later)))
        yield point
    time = at(times[-1])
    if sde.last == "mean":
        point = point + sde.last_size * drift(point, time)
    elif sde.last == "euler":
        point = point + sde.last_size * transport.velocity(model(point, time), point, time)
    elif sde.last == "tweedie":
        parts = transport.parts(time, point)
        point = point / parts.data + parts.noise.square() / parts.data * transport.score(
            model(point, time), point, time
        )
    yield point
