"""A training run on disk: its recipe, log, checkpoints and snapshots. The only module that knows their names."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from lexel import config, shards
from lexel.checkpoint import CONFIG, atomic, load_state, read_json, save_state
from lexel.config import Config
from lexel.errors import UsageError
from lexel.regular import expanded
from lexel.run_log import CHOICES, Run, Snapshot, Thinned, is_number, last_metrics, read_metrics
from lexel.same_recipe import check_same_recipe

NUMBERED = re.compile(r"[0-9]{8,}")  # a checkpoint or a snapshot, by its step
SHARDS = ".shards"
DAMAGED = ".damaged"  # added to the name of a checkpoint that cannot be read


class TrainingStopped(UsageError):
    """Training ended early because going on would spoil it; the message says what was seen and what is kept."""


class RunFolder:
    """One training on disk: `recipe.toml`, `metrics.jsonl`, `checkpoints/`, `snapshots/`, and the exported model.

    The state of a run is its newest checkpoint; the exported `config.json` and `model.safetensors` are those of the
    last time it finished, and older where it has gone on since (`export_is_current`).

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
        self.path = expanded(path)
        self.keep_last = keep_last
        self.best = best
        self.higher_is_better = higher_is_better
        self.writes = writes
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.report = self.path / "report.html"
        self.curves = self.path / "curves.json"  # a user's own reference, to be drawn behind the run's curves
        self.data = self.path / "data.safetensors"
        self._best: tuple[float, int] | None = None  # value and step of the best validation
        self._log_read = False  # whether that one is from the log

    # ------------------------------------------------------------------------------------------ who owns it

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """A run to read from; recipe and validations say what ranks its checkpoints."""
        run = cls(path, writes=False)
        if run.recipe.is_file() and "generator" in run.read_recipe():
            measured = any("bits_per_token" in line for line in run.lines("validation"))
            run.best, run.higher_is_better = "bits_per_token" if measured else "loss", False
        return run

    def read_recipe(self) -> dict[str, Any]:
        """The recipe of the run as tables; empty where there is none.

        Raises:
            UsageError: it is no TOML.
        """
        return config.read(self.recipe) if self.recipe.is_file() else {}

    @property
    def kind(self) -> str | None:
        """The kind of model in training, "tokenizer" or "generator"; None where there is no run."""
        if not (self.recipe.is_file() and self.metrics.is_file()):
            return None
        return "generator" if "generator" in self.read_recipe() else "tokenizer"

    def contents(self, name: str | None = None) -> Run:
        """The recipe and all lines; snapshots are read when they are looked at.

        Args:
            name: of the run, for people; the folder's by default.

        Raises:
            UsageError: the folder is no run folder.
        """
        if not self.metrics.is_file():
            raise UsageError(f"{self.path} is no run folder: it has no {self.metrics.name}")
        train, validation, choices, evaluations = (Thinned() for _ in range(4))
        kinds = {"train": train, "validation": validation, CHOICES: choices}
        for line in read_metrics(self.metrics):
            kinds.get(line["kind"], evaluations).append(line)
        snapshots = {step: Snapshot(self.snapshot_path(step)) for step in self.snapshot_steps()}
        name, recipe = name or self.path.name, self.read_recipe()
        return Run(name, self.path, recipe, train.lines, validation.lines, evaluations.lines, snapshots, choices.lines)

    def claim(self, recipe: Config) -> None:
        """Makes the folder this recipe's, and this process's until `release`.

        Raises:
            UsageError: the folder belongs to a run of another recipe or is in use by another process, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; give a folder for the run")
        if self.recipe.is_file():
            check_same_recipe(config.read(self.recipe), recipe, self.path, begun=bool(self.steps()))
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
        for folder in self.checkpoints.glob(f"*{SHARDS}"):
            if not any(folder.with_suffix(ending).is_file() for ending in (".pt", f".pt{DAMAGED}")):
                shutil.rmtree(folder)  # shards that were not all written
        with atomic(self.recipe) as temporary:
            temporary.write_text(config.dump(recipe), encoding="utf-8")

    def check_data(self, names: Mapping[str, Sequence[str]], tokenizer: str | None = None) -> None:
        """Refuses to go on with other images than the run began with, wherever they lie.

        Args:
            names: the names of the images, by part: "training", "validation"; "captions" has what names their features.
            tokenizer: the fingerprint of the tokenizer behind the tokens, for a generator.

        Raises:
            UsageError: says how many names differ.
        """
        now = {part: _hashes(listed) for part, listed in names.items()}
        before, made_by = self._recorded_data() if self.steps() else ({}, None)
        for part in sorted(now.keys() & before.keys()):
            if torch.equal(before[part], now[part]):
                continue
            if part == "captions":
                raise UsageError(
                    f"{self.path} holds a run over other features of captions; give back those of the run, or start "
                    f"another run from its weights (--init {self.path} --out ANOTHER)"
                )
            old, new = set(before[part].tolist()), set(now[part].tolist())
            difference = f"{len(new - old):,} are new and {len(old - new):,} are gone" if old != new else "in new order"
            raise UsageError(
                f"{self.path} holds a run over other {part} images: {len(old):,} pictures then, {len(new):,} now, "
                f"{difference}; give back the images of the run, or start another run from its weights (--init "
                f"{self.path} --out ANOTHER)"
            )
        if tokenizer is not None and made_by is not None and tokenizer != made_by:
            raise UsageError(
                f"{self.path} holds a run over the tokens of another tokenizer ({made_by[:12]} instead of "
                f"{tokenizer[:12]}); use the tokenizer of the run, or another folder"
            )
        if self.writes and before.keys() != now.keys():
            with atomic(self.data) as temporary:
                save_file(now, temporary, metadata={"tokenizer": tokenizer} if tokenizer else None)

    def release(self) -> None:
        """Lets another process train here."""
        if self.writes and hasattr(self, "_lock"):
            self._lock.release()

    # ------------------------------------------------------------------------------------------ checkpoints

    def steps(self) -> list[int]:
        """The steps of the checkpoints at hand, oldest first."""
        return sorted(int(path.stem) for path in self.checkpoints.glob("*.pt") if NUMBERED.fullmatch(path.stem))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:08d}.pt"

    def shards(self, step: int) -> Path:
        """The folder beside a checkpoint in which its tensors lie, where every process wrote its own."""
        return self.checkpoint(step).with_suffix(SHARDS)

    def resume(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None for a fresh run; what was logged after it is discarded.

        A newer one that cannot be read is kept aside, with a warning.

        Raises:
            UsageError: there are checkpoints, and none can be read.
        """
        state, last = None, 0
        for step in reversed(self.steps()):
            path = self.checkpoint(step)
            try:
                state, last = self.load(step, whole=False), step
                break
            except UsageError as error:
                older = [other for other in self.steps() if other < step]
                if not older:
                    raise UsageError(f"{error}; no older checkpoint is left: delete {path} to start again") from None
                if self.writes:
                    path.replace(path.with_name(path.name + DAMAGED))
                warnings.warn(
                    f"{error}; it is kept as {path.name}{DAMAGED}, and the run goes on from step {older[-1]}",
                    stacklevel=2,
                )
        if self.writes:
            with atomic(self.metrics) as temporary, temporary.open("w", encoding="utf-8") as file:
                kept = (line for line in read_metrics(self.metrics) if state and line["step"] <= last)
                file.writelines(json.dumps(line) + "\n" for line in kept)
            for step in self.snapshot_steps():
                if step > last:
                    self.snapshot_path(step).unlink()
        self._best, self._log_read = None, False
        return state

    def load(self, step: int, whole: bool = True) -> dict[str, Any]:
        """The training state of a checkpoint.

        Args:
            step: of the checkpoint.
            whole: whether weights that lie in shards are read as well, all of them; the learner reads its own.

        Raises:
            UsageError: it cannot be read, or is the state of something else.
        """
        path = self.checkpoint(step)
        state = load_state(path)
        if state.get("step") != step or not is_number(state.get("seconds")):
            raise UsageError(f"{path} is no training state of step {step}")
        digests = state.get("shards")
        if digests is not None:
            if self.writes or whole:  # one process is enough
                shards.check(self.shards(step), digests if isinstance(digests, dict) else {"": ""})
            if whole:
                state["model"] = shards.read(self.shards(step), "model")
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
                shutil.rmtree(self.shards(old), ignore_errors=True)  # what cannot be removed goes with the next run

    def export_is_current(self) -> bool:
        """Whether the exported model is the state of the newest checkpoint; False where the run has gone on since."""
        path = self.path / CONFIG
        if not path.is_file():
            return False
        steps = self.steps()
        provenance = read_json(path).get("provenance")
        return not steps or (isinstance(provenance, dict) and provenance.get("step") == steps[-1])

    # ------------------------------------------------------------------------------------------ the log

    def log(self, step: int, kind: str, seconds: float, values: Mapping[str, float | str | None]) -> None:
        """Appends a line to `metrics.jsonl`; what does not apply, or JSON cannot say (NaN), is left out.

        Texts are for the kind CHOICES.
        """
        line: dict[str, Any] = {"step": step, "kind": kind, "seconds": round(seconds, 3)}
        given = {name: value for name, value in values.items() if value is not None}
        line |= {name: value for name, value in given.items() if isinstance(value, str) or math.isfinite(value)}
        if kind == "validation":
            self.best_step()
            self._rank(line)
        if not self.writes:
            return
        with self._stop_when_full(step), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`, of one kind or of all, one by one."""
        return (line for line in read_metrics(self.metrics) if kind in (None, line["kind"]))

    def last_lines(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        """The newest lines of a kind, oldest first, without reading the whole log."""
        return last_metrics(self.metrics, kind, count)

    def best_step(self) -> int | None:
        """The step of the best validation so far, the earliest of equals; its checkpoint is kept."""
        if not self._log_read:
            self._log_read = True
            for line in self.lines("validation"):
                self._rank(line)
        return None if self._best is None else self._best[1]

    def _rank(self, line: Mapping[str, Any]) -> None:
        """Keeps a validation's value and step if it is better than all before."""
        if (value := line.get(self.best)) is None:
            return
        if self._best is None or (value > self._best[0] if self.higher_is_better else value < self._best[0]):
            self._best = value, line["step"]

    # ------------------------------------------------------------------------------------------ snapshots

    def snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the tensors that the report draws."""
        if not self.writes:
            return
        with self._stop_when_full(step), atomic(self.snapshot_path(step)) as temporary:
            save_file(dict(tensors), temporary)

    def snapshot_steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return sorted(int(path.stem) for path in self.snapshots.glob("*.safetensors") if NUMBERED.fullmatch(path.stem))

    def last_snapshot(self) -> Mapping[str, NDArray[Any]]:
        """The newest snapshot; empty where there is none."""
        steps = self.snapshot_steps()
        return Snapshot(self.snapshot_path(steps[-1])) if steps else {}

    def snapshot_path(self, step: int) -> Path:
        """The snapshot of a step."""
        return self.snapshots / f"{step:08d}.safetensors"

    def _recorded_data(self) -> tuple[dict[str, Tensor], str | None]:
        """The record of `check_data`; empty for a run of before, or where the file is damaged."""
        if not self.data.is_file():
            return {}, None
        try:
            with safetensors.safe_open(self.data, framework="pt") as file:
                parts = list(file.keys())
                return {part: file.get_tensor(part) for part in parts}, (file.metadata() or {}).get("tokenizer")
        except safetensors.SafetensorError as error:
            warnings.warn(f"{self.data} cannot be read ({error}); the images are not compared", stacklevel=2)
            return {}, None

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


def _hashes(names: Sequence[str]) -> Tensor:
    """64 bits of each name, in order: int64 (N,)."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
