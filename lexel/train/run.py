"""What both training loops stand on: schedules, averages, signals, numerical guards."""

import hashlib
import math
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lexel.config import Config
from lexel.errors import UsageError
from lexel.run_folder import flatten
from lexel.runtime import Runtime, runtime

Precision = Literal["float32", "bf16", "fp16"]


class Progress(NamedTuple):
    """What a progress display is told after every step."""

    step: int  # steps done
    steps: int  # steps in all
    images_per_second: float
    seconds_left: float
    values: Mapping[str, float]  # the newest averages of the loss terms


ProgressCallback = Callable[[Progress], None]


# ---------------------------------------------------------------------------------------------- schedules


class Schedule(Config):
    """The learning rate over a run, as a factor of `lr`.

    Lengths are in the unit of the run: epochs where the recipe gives epochs, steps where it gives steps.
    """

    kind: Literal["constant", "steps", "linear", "cosine"] = "constant"
    warm_up: float = Field(default=0, ge=0)  # length of the linear rise to 1
    start: float = Field(default=0.0, ge=0, le=1)  # the factor at the first step of the rise
    drops: list[float] = []  # kind "steps": after each of these lengths the factor is multiplied by `drop`
    drop: float = Field(default=0.1, gt=0, lt=1)
    hold: float = Field(default=0.0, ge=0, lt=1)  # linear, cosine: the share of the rest that stays at 1
    end: float = Field(default=0.0, ge=0, le=1)  # linear, cosine: the factor at the last step

    @model_validator(mode="after")
    def _fits(self) -> "Schedule":
        if (self.kind == "steps") != bool(self.drops):
            raise ValueError('drops belong to kind = "steps", and that kind needs them')
        return self

    def factor(self, step: int, steps: int, unit: float = 1.0) -> float:
        """The factor for a step in [0, steps); `unit` is the number of steps in one of the run's lengths."""
        rise = self.warm_up * unit
        if step < rise:
            return self.start + (1 - self.start) * step / rise
        if self.kind == "steps":
            return math.prod(self.drop for length in self.drops if step >= round(length * unit))
        if self.kind == "constant":
            return 1.0
        progress = (step - rise) / max(steps - 1 - rise, 1)
        fall = min(max((progress - self.hold) / (1 - self.hold), 0.0), 1.0)
        if self.kind == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        return 1 + (self.end - 1) * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------------------------------------- averages


def weight_average(model: nn.Module, decay: float, warm_up: bool = False) -> AveragedModel:
    """An exponential average of the parameters of `model`; buffers are copied, not averaged.

    The average begins as the weights do, as published. `warm_up` lowers the decay to (1 + n) / (10 + n) at the n-th
    update, which suits runs of a few hundred steps.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        n = int(updates)
        used = min(decay, (1 + n) / (10 + n)) if warm_up else decay
        torch._foreach_lerp_(averaged, current, 1 - used)

    average = AveragedModel(model, multi_avg_fn=update)
    average.n_averaged += 1  # or the first update would copy the weights instead of averaging them
    return average.requires_grad_(False).eval()


class RunningMeans:
    """Means of named scalars since the last `take`; sums stay on their device, so that adding never waits."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            value = value.float() if value.device.type == "mps" else value.double()  # Apple's GPUs have no float64
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def peek(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def take(self) -> dict[str, float]:
        means = self.peek()
        self.sums, self.counts = {}, {}
        return means

    def tensors(self) -> dict[str, Tensor]:
        """The means as scalars on their device."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])


# ---------------------------------------------------------------------------------------------- the machine


def start(
    device: str = "auto", trackers: Sequence[str] = (), folder: Path | None = None, unused: bool = False
) -> Accelerator:
    """The accelerate engine: processes and trackers. Precision is the loops' own, so that it is saved with the rest.

    Args:
        device: "auto", "cpu", "cuda", ...
        trackers: of "tensorboard", "wandb", "trackio".
        folder: where trackers that write files may write.
        unused: whether a step may leave parameters without a gradient.
    """
    from accelerate.tracking import filter_trackers  # type: ignore[import-untyped]

    known = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    for name in trackers:
        if name not in known:
            raise UsageError(f"unknown tracker {name!r}; choose from {', '.join(sorted(known))}")
    # Buffers stay each process's own: quantizers synchronise theirs, and batch statistics are meant to be local.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    accelerator = Accelerator(
        device_placement=False,
        mixed_precision="no",
        kwargs_handlers=[parallel],
        cpu=device == "cpu",
        log_with=list(trackers) or None,
        project_dir=str(folder) if folder else None,
    )
    if trackers and len(filter_trackers(list(trackers), str(folder))) != len(trackers):
        raise UsageError(f"a tracker of {', '.join(trackers)} is not installed; try pip install 'lexel[trackers]'")
    return accelerator


def track(accelerator: Accelerator, recipe: Config) -> None:
    """Tells the trackers, if there are any, which recipe this run follows."""
    if not accelerator.log_with:
        return
    options = flatten(recipe.model_dump(mode="json", exclude_none=True))
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    accelerator.init_trackers("lexel", config=plain)


def pick_place(device: str, precision: Precision, accelerator: Accelerator) -> Runtime:
    """Where this process computes: its own device of a distributed run, else the one that was asked for."""
    if accelerator.num_processes > 1:
        device = str(accelerator.device)
    return runtime(device, precision)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes every random number of a step a function of (seed, step, rank): nothing to save, nothing to lose."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def share(values: Sequence[Tensor | float], accelerator: Accelerator, device: torch.device) -> list[float]:
    """The means over processes of a few scalars."""
    stacked = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if accelerator.num_processes > 1:
        stacked = accelerator.reduce(stacked.to(device), "mean")
    return stacked.tolist()


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    clip: float | None,
) -> Tensor:
    """One step on the gradients at hand, skipped by the scaler when half precision overflowed; returns their norm."""
    scaler.unscale_(optimizer)
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    scaler.step(optimizer)
    scaler.update()
    return norm


class StopRequest:
    """Notes SIGTERM and SIGINT, so that the loop can finish its step, save and leave; a second one interrupts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
