"""A training run on disk: its recipe, log, checkpoints and snapshots. The only module that knows their names."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from lexel import config
from lexel.checkpoint import atomic, load_state, save_state
from lexel.config import Config
from lexel.errors import UsageError

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

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """A run to read from; its recipe says what ranks its checkpoints."""
        run = cls(path, writes=False)
        if run.recipe.is_file() and "generator" in run.read_recipe():
            run.best, run.higher_is_better = "bits_per_token", False
        return run

    def read_recipe(self) -> dict[str, Any]:
        """The recipe of the run as tables; empty where there is none.

        Raises:
            UsageError: it is no TOML.
        """
        return config.read(self.recipe) if self.recipe.is_file() else {}

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
