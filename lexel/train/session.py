"""The frame of a training: run folder, resuming, steps, logging, guards, validation, saving and signals."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lexel import shards
from lexel.data.pace import Pace
from lexel.distributed import gather
from lexel.errors import UsageError
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.run_log import CHOICES
from lexel.train.evaluations import Evaluation
from lexel.train.optimization import RunningMeans, seed_step
from lexel.train.plan import check_memory
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe, TrainConfig

if TYPE_CHECKING:
    from lexel.train.generator_recipe import GeneratorRecipe

GUARDED = ("loss", "gradient_norm", "discriminator")  # what must stay finite
SMALLEST_SCALE = 2.0**-10  # half precision that overflows at this scale is no longer a matter of scale


class Progress(NamedTuple):
    """Progress of a training, after every step."""

    step: int  # steps done
    steps: int  # steps in all
    images_per_second: float
    seconds_left: float
    values: Mapping[str, float]  # the last logged averages of the loss terms; empty before the first


Model = TypeVar("Model")
Listed = TypeVar("Listed", bound=Evaluation)


class TrainingResult(NamedTuple, Generic[Model]):
    """The result of a training."""

    model: Model  # with the live weights; sharded still, where the recipe says fsdp
    average: Model  # with the averaged weights; a generator has none, and this is `model`
    step: int  # steps done
    finished: bool  # False when a signal ended it early: the same command goes on from there
    unreadable: Mapping[str, str]  # images that could not be used, and why


StepCallback = Callable[[Progress], None]


class Learner(Protocol):
    """Everything that changes during training."""

    means: RunningMeans
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None: ...


@runtime_checkable
class Sharded(Protocol):
    """A learner whose processes write what they hold."""

    @property
    def sharded(self) -> bool: ...

    def begin_state_dict(self) -> tuple[dict[str, Any], Callable[[Path], shards.Writing]]: ...


def require_parts(state: Mapping[str, Any], parts: Iterable[str], source: Path) -> None:
    """Refuses a checkpoint that lacks one of these parts of a training state.

    Raises:
        UsageError: names what is missing.
    """
    if missing := sorted(set(parts) - state.keys()):
        raise UsageError(f"{source} is no whole training state: it lacks {', '.join(missing)}")


class Step(NamedTuple):
    """One step of a run."""

    number: int  # from 0
    steps: int  # of the run
    unit: int  # steps in one of the recipe's lengths: 1, or those of an epoch
    lr_factor: float  # of the schedule
    validates: bool  # whether a validation is due after it

    @property
    def done(self) -> int:
        """Steps done once this one is."""
        return self.number + 1

    @property
    def progress(self) -> float:
        """From 0 at the first step to 1 at the last."""
        return self.number / max(self.steps - 1, 1)


class Session:
    """One training in a run folder, from claiming the folder to its last checkpoint.

        with Session(recipe, out, device, processes, {"training": names, "validation": held_out}) as session:
            learner = ...
            session.resume(learner)
            session.chose(choices(...))
            for step in session.steps():
                session.log(step, learner.step(...))
                if step.validates:
                    session.validated(step, validate(...))
                session.save(step)

    A step waits for the device only where something is logged, validated or saved: losses and the guard against NaN
    stay on the device until then. SIGTERM and SIGINT end the loop after the step at hand, which is saved.

    Args:
        recipe: resolved.
        out: the run folder: see `RunFolder`.
        processes: this process and those beside it.
        names: the names of the images, by part; "training" is the set that epochs count.
        tokenizer: the fingerprint of the tokenizer behind the tokens, for a generator.
        best: the value of a validation that ranks checkpoints.
        higher_is_better: whether a larger one is better.
        progress: called after every step, in the main process.

    Attributes:
        first: steps done before; where the batches begin.
        done: steps done.
        finished: whether the run is at its end; False when a signal ended it early.
        resumed: whether there was a checkpoint to go on from.

    Raises:
        UsageError: the folder or the batch size does not allow it.
    """

    def __init__(
        self,
        recipe: "TokenizerRecipe | GeneratorRecipe",
        out: str | Path,
        processes: Processes,
        names: Mapping[str, Sequence[str]],
        *,
        tokenizer: str | None = None,
        best: str = "psnr",
        higher_is_better: bool = True,
        progress: StepCallback | None = None,
    ) -> None:
        config = recipe.train
        self.recipe, self.config, self.processes = recipe, config, processes
        if config.batch_size % (processes.count * config.accumulation):
            raise UsageError(
                f"train.batch_size = {config.batch_size} cannot be shared by {processes.count} processes in "
                f"{config.accumulation} micro-batches; it must be a multiple of {processes.count * config.accumulation}"
            )
        self.micro_batch = config.batch_size // processes.count // config.accumulation
        group = config.discriminator.statistics if isinstance(config, TrainConfig) and config.discriminator else None
        if isinstance(group, int) and self.micro_batch % group:
            raise UsageError(
                f"train.discriminator.statistics = {group} does not divide the {self.micro_batch} images that each of "
                f"{processes.count} processes takes at a time; use fewer processes or less accumulation"
            )
        per_epoch = math.ceil(len(names["training"]) / config.batch_size)
        epochs = config.epochs or 0
        self.total, self.unit = (config.steps, 1) if config.steps is not None else (epochs * per_epoch, per_epoch)
        self._progress = progress

        processes.together(lambda: check_memory(recipe, processes.runtime, processes.count))
        self.run = RunFolder(out, config.keep_last, best, higher_is_better, writes=processes.is_main)
        processes.decide(lambda: self.run.claim(recipe))
        try:
            processes.decide(lambda: self.run.check_data(names, tokenizer))
            self._state = processes.decide(self.run.resume) if processes.count == 1 else self._shared_state()
        except UsageError:
            self.run.release()
            raise
        self.resumed = self._state is not None
        self.first = self.done = self._state["step"] if self._state is not None else 0
        self._seconds_before: float = self._state["seconds"] if self._state is not None else 0.0
        self.finished = self.first >= self.total
        self.leaving = False
        self._stop = StopRequest()
        self._learner: Learner | None = None
        self._better = False
        self._writing: tuple[int, dict[str, Any], shards.Writing] | None = None
        self._first_bad: Tensor | None = None  # for each guarded number the first step at which it was not finite
        self._shown: dict[str, float] = {}
        self.pace: Pace | None = None  # of the images that are read, for the log: which of the two waits
        self._begun = time.perf_counter()

    def _shared_state(self) -> dict[str, Any] | None:
        """The checkpoint that the main process chose, read by every process."""

        def choose() -> int | None:
            state = self.run.resume()
            return None if state is None else state["step"]

        step = self.processes.decide(choose)
        if step is None:
            return None
        return self.processes.together(lambda: self.run.load(step, whole=False))

    def __enter__(self) -> Self:
        self.processes.start_trackers(self.recipe)
        self._stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.__exit__(kind, error, traceback)
        self.processes.finish_trackers()
        self.run.release()

    def saved(self, part: str) -> tuple[Any, Path] | None:
        """A part of the state that `resume` will bring, and its file; None at the beginning of a run."""
        if self._state is None or part not in self._state:
            return None
        return self._state[part], self.run.checkpoint(self.first)

    def resume(self, learner: Learner) -> None:
        """Takes the learner in, and gives it the state of the checkpoint if there is one."""
        self._learner = learner
        if self._state is not None:
            learner.load_state_dict(self._state, self.run.checkpoint(self.first))
            self._state = None  # as large as the learner itself

    def chose(self, choices: Mapping[str, str]) -> None:
        """Writes what was chosen for the device, where there are steps to do: see `lexel.train.choices`."""
        if not self.finished:
            self.processes.decide(lambda: self.run.log(self.first, CHOICES, self._seconds_before, choices))

    def steps(self) -> Iterator[Step]:
        """The steps that are left, each with its random numbers seeded; ends early after a signal."""
        config = self.config
        self._begun = time.perf_counter()
        for number in range(self.first, self.total):
            seed_step(config.seed, number, self.processes.rank)
            last = number + 1 == self.total
            factor = config.schedule.factor(number, self.total, self.unit)
            yield Step(number, self.total, self.unit, factor, last or (number + 1) % config.validate_every == 0)
            if self.leaving:
                return

    # ------------------------------------------------------------------------------------------ after a step

    def log(self, step: Step, losses: Mapping[str, Tensor], extra: Mapping[str, float] | None = None) -> None:
        """Takes the losses of a step in; where it is due, checks them and writes their means.

        Args:
            step: just done.
            losses: scalars on the device.
            extra: numbers for the log line that need no mean, such as the learning rate.

        Raises:
            TrainingStopped: a loss or gradient became NaN or infinite.
        """
        assert self._learner is not None
        self._learner.means.add(losses)
        self._watch(step, losses)
        self.done, self.finished = step.done, step.done == step.steps
        self.leaving = self.processes.any(self._stop.signal is not None)
        if self._writing is not None and not self.processes.any(not self._writing[2].done):
            self._end_writing()
        self._better = False
        logs = step.done % self.config.log_every == 0 or self.finished
        if logs or step.validates or self._save_is_due(step):
            self._check_finite(step, losses)
        elapsed = time.perf_counter() - self._begun
        speed = (step.done - self.first) * self.config.batch_size / elapsed
        if logs:
            means = self._learner.means.pop()
            self._shown = dict(zip(means, self.processes.reduce(list(means.values())), strict=True))
            apart = {} if self.pace is None else self.pace.speeds(elapsed, self.processes.count)
            self._write(step, "train", {**self._shown, **(extra or {}), "images_per_second": speed, **apart})
        if self._progress is not None and self.processes.is_main:
            left = (step.steps - step.done) * elapsed / (step.done - self.first)
            self._progress(Progress(step.done, step.steps, speed, left, self._shown))

    def validated(
        self, step: Step, values: Mapping[str, float | None], snapshot: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes the numbers of a validation, which are the same in every process, and its tensors for the report."""
        self._write(step, "validation", values)
        if snapshot is not None:
            self.processes.decide(lambda: self.run.snapshot(step.done, snapshot))
        self._better = self.processes.decide(lambda: self.run.best_step() == step.done)

    def due(self, evaluations: Sequence[Listed], step: Step) -> list[Listed]:
        """The evaluations that a recipe lists for after this step; all of them after the last."""
        return [each for each in evaluations if step.done % each.every == 0 or self.finished]

    def evaluated(self, step: Step, values: Mapping[str, float | None]) -> None:
        """Writes the numbers of an evaluation that the recipe lists."""
        self._write(step, "evaluation", values)

    def save(self, step: Step) -> None:
        """Writes a checkpoint where one is due: every `save_every` steps, after the best validation, at an end."""
        assert self._learner is not None
        if self._save_is_due(step) or self._better:
            self._end_writing()
            seconds = self._seconds_before + time.perf_counter() - self._begun
            if isinstance(self._learner, Sharded) and self._learner.sharded:
                state, begin = self._learner.begin_state_dict()
                self._writing = step.done, {"seconds": seconds, **state}, begin(self.run.shards(step.done))
                if self.finished or self.leaving:
                    self._end_writing()
                return
            state = self._learner.state_dict()
            self.processes.decide(lambda: self.run.save(step.done, {"seconds": seconds, **state}))

    def _end_writing(self) -> None:
        """Waits for shards that are being written, and completes their checkpoint."""
        if self._writing is None:
            return
        step, state, writing = self._writing
        self._writing = None
        digests = self.processes.together(writing.finish)
        every = {name: digest for part in gather(digests) for name, digest in part.items()}
        self.processes.decide(lambda: self.run.save(step, {**state, "shards": every}))

    def _save_is_due(self, step: Step) -> bool:
        return step.done % self.config.save_every == 0 or self.finished or self.leaving

    def _write(self, step: Step, kind: str, values: Mapping[str, float | None]) -> None:
        seconds = self._seconds_before + time.perf_counter() - self._begun
        self.processes.decide(lambda: self.run.log(step.done, kind, seconds, values))
        self.processes.track(kind, values, step.done)

    # ------------------------------------------------------------------------------------------ guards

    def _watch(self, step: Step, losses: Mapping[str, Tensor]) -> None:
        """Notes on the device at which step a guarded number was first not finite."""
        device = self.processes.device
        none = torch.full((), math.inf, device=device)
        now = torch.full((), float(step.done), device=device)
        bad = [torch.where(losses[name].detach().isfinite(), none, now) if name in losses else none for name in GUARDED]
        stacked = torch.stack(bad)
        self._first_bad = stacked if self._first_bad is None else torch.minimum(self._first_bad, stacked)

    def _check_finite(self, step: Step, losses: Mapping[str, Tensor]) -> None:
        """Ends a run whose loss or gradient is NaN or infinite, before anything of it is saved.

        A gradient that overflowed half precision is skipped by its scaler, and counts only when the scale has become
        tiny.
        """
        assert self._learner is not None
        assert self._first_bad is not None
        scaler = self._learner.scaler
        found = self.processes.reduce(list(-self._first_bad), largest=True)
        since = {name: -value for name, value in zip(GUARDED, found, strict=True) if math.isfinite(value)}
        if scaler.is_enabled():
            since.pop("gradient_norm", None)
            if self.processes.any(scaler.get_scale() < SMALLEST_SCALE):
                since["gradient_norm"] = step.done
        if not since:
            return
        first = int(min(since.values()))
        before = "" if first == step.done else f" (since step {first})"
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        raise TrainingStopped(
            f"stopped at step {step.done}: {' and '.join(since)} became NaN or infinite{before} ({values}). "
            f"{self.kept()} Lower train.lr, set train.clip = 1.0, or use precision float32 or bf16"
        )

    def kept(self) -> str:
        """A sentence on the last good checkpoint."""
        saved = self.run.steps()
        return (
            f"The last good checkpoint is {self.run.checkpoint(saved[-1])}."
            if saved
            else "No checkpoint was saved yet."
        )


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
