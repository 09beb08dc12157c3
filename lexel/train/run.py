"""What both training loops stand on: the run folder, checkpoints, schedules, averages, signals, numerical guards."""

import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lexel import config
from lexel.checkpoint import atomic, load_state, save_state
from lexel.config import Config
from lexel.errors import UsageError
from lexel.place import Place, place

Precision = Literal["float32", "bf16", "fp16"]

# Options that change where a run stands or what it writes, never what it learns; a resumed run may change them.
OPERATIONAL = {
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.trackers",
    "data.workers",
    "data.on_error",
    "data.images.on_error",
}
LENGTHS = {"train.steps", "train.epochs"}  # a resumed run may grow, never shrink


class TrainingStopped(UsageError):
    """Training ended early because going on would spoil it; the message says what was seen and what is kept."""


class Progress(NamedTuple):
    """What a progress display is told after every step."""

    step: int  # steps done
    steps: int  # steps in all
    images_per_second: float
    seconds_left: float
    values: Mapping[str, float]  # the newest averages of the loss terms


ProgressCallback = Callable[[Progress], None]


# ---------------------------------------------------------------------------------------------- the folder


class RunFolder:
    """One training on disk: `recipe.toml`, `metrics.jsonl`, `checkpoints/`, `snapshots/`.

    A checkpoint appears under its final name only when it is whole, and an older one is removed only after that, so
    that a process killed at any moment leaves a folder that resumes. Every process of a distributed run may read;
    one writes.

    Args:
        path: the folder; made when missing.
        keep_last: how many of the newest checkpoints stay. The best one stays too.
        best: the value of a validation line that ranks checkpoints.
        higher_is_better: whether a larger value of `best` is a better one.
        writes: False for all but the main process.
    """

    def __init__(
        self,
        path: str | Path,
        keep_last: int = 2,
        best: str = "psnr",
        higher_is_better: bool = True,
        writes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.keep_last = keep_last
        self.best = best
        self.higher_is_better = higher_is_better
        self.writes = writes
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"

    def claim(self, recipe: Config) -> None:
        """Makes the folder this recipe's, and this process's until it ends.

        Raises:
            UsageError: the folder belongs to a run of another recipe or is in use by another process, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; give a folder for the run")
        if self.recipe.is_file():
            refuse_changes(config.read(self.recipe), recipe.model_dump(mode="json", exclude_none=True), self.path)
        elif self.steps():
            raise UsageError(f"{self.path} holds checkpoints but no recipe.toml; choose another folder for the run")
        if not self.writes:
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.snapshots.mkdir(exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0, is_singleton=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise UsageError(f"another process trains in {self.path}; wait for it or choose another folder") from None
        for leftover in self.path.rglob(".partial-*"):
            leftover.unlink()  # a file that a killed process did not finish
        with atomic(self.recipe) as temporary:
            temporary.write_text(config.dump(recipe), encoding="utf-8")

    def steps(self) -> list[int]:
        """The steps of the checkpoints at hand, oldest first."""
        return sorted(int(path.stem) for path in self.checkpoints.glob("*.pt") if path.stem.isdigit())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:08d}.pt"

    def resume(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None for a fresh run; what was logged after it is forgotten.

        Raises:
            UsageError: the newest checkpoint cannot be read.
        """
        steps = self.steps()
        state = None
        if steps:
            path = self.checkpoint(steps[-1])
            try:
                state = load_state(path)
            except UsageError as error:
                before = f"to resume from step {steps[-2]}" if len(steps) > 1 else "to start again"
                raise UsageError(f"{error}; delete {path} {before}") from None
        last = steps[-1] if steps else 0
        if self.writes:
            kept = [json.dumps(line) + "\n" for line in read_metrics(self.metrics) if state and line["step"] <= last]
            with atomic(self.metrics) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            for snapshot in self.snapshots.glob("*.safetensors"):
                if state is None or int(snapshot.stem) > last:
                    snapshot.unlink()
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes those that are neither among the newest nor the best.

        Raises:
            TrainingStopped: it cannot be written, for example because the disk is full; nothing older is lost.
        """
        if not self.writes:
            return
        with self._stop_when_full(step):
            if self.metrics.exists():
                with self.metrics.open("rb") as file:
                    os.fsync(file.fileno())  # the log must not be behind the checkpoint
            save_state(self.checkpoint(step), {"step": step, **state})
        steps = self.steps()
        keep = {*steps[-self.keep_last :], self.best_step()}
        for old in steps:
            if old not in keep:
                self.checkpoint(old).unlink()

    def log(self, step: int, kind: str, seconds: float, values: Mapping[str, float | None]) -> None:
        """Appends a line to `metrics.jsonl`; what does not apply, or JSON cannot say (NaN), is left out."""
        if not self.writes:
            return
        line = {"step": step, "kind": kind, "seconds": round(seconds, 3)}
        line |= {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        with self._stop_when_full(step), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes what the report shows of a step."""
        if not self.writes:
            return
        with self._stop_when_full(step), atomic(self.snapshots / f"{step:08d}.safetensors") as temporary:
            save_file(dict(tensors), temporary)

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, of one kind or of all."""
        return [line for line in read_metrics(self.metrics) if kind in (None, line["kind"])]

    def best_step(self) -> int | None:
        """The step of the best validation so far; its checkpoint is kept."""
        ranked = [(line[self.best], line["step"]) for line in self.lines("validation") if self.best in line]
        if not ranked:
            return None
        pick = max if self.higher_is_better else min
        return pick(ranked, key=lambda entry: entry[0])[1]  # the earliest of equals

    @contextlib.contextmanager
    def _stop_when_full(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            saved = self.steps()
            kept = f"step {saved[-1]} is saved" if saved else "nothing was saved yet"
            raise TrainingStopped(
                f"no space left in {self.path} at step {step} ({kept}); make room and run the same command again"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a last line that a killed process did not finish is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is unfinished, or empty


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on with a run under another recipe.

    Raises:
        UsageError: names the first option that differs.
    """
    old, new = flatten(before), flatten(now)
    for name in sorted({*old, *new} - OPERATIONAL):
        was, wanted = old.get(name), new.get(name)
        if was == wanted or (name in LENGTHS and was is not None and wanted is not None and wanted >= was):
            continue
        hint = "a run may grow but not shrink; " if name in LENGTHS else ""
        raise UsageError(
            f"{folder} holds a run with {name} = {was!r}, the recipe now says {wanted!r}; "
            f"{hint}use the recipe of the run ({folder / 'recipe.toml'}) or another folder"
        )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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


def pick_place(device: str, precision: Precision, accelerator: Accelerator) -> Place:
    """Where this process computes: its own device of a distributed run, else the one that was asked for."""
    if accelerator.num_processes > 1:
        device = str(accelerator.device)
    return place(device, precision)


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
