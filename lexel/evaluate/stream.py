"""Which images were measured, and the partial state of an evaluation that was interrupted."""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel import checkpoint
from lexel.data import to_uint8
from lexel.data.images import digest
from lexel.distributed import barrier, rank
from lexel.errors import UsageError
from lexel.evaluate.metric import Metric
from lexel.metrics.states import is_texts, merge_processes, restored
from lexel.parts import Part


class Visited:
    """Which samples were measured, what their pixels were, and which could not be read."""

    def __init__(self, count: int) -> None:
        self.done = torch.zeros(count, dtype=torch.bool)
        self.unreadable: dict[str, str] = {}
        self._digest = 0  # sum of the SHA-256 of every picture: order, processes and interruptions do not show

    def add(self, images: Tensor, numbers: Tensor) -> None:
        self.done[numbers] = True
        for picture in to_uint8(images):
            self._digest += int.from_bytes(hashlib.sha256(picture.data).digest(), "big")

    def merge(self, other: "Visited") -> None:
        self.done |= other.done
        self.unreadable |= other.unreadable
        self._digest += other._digest

    def all_reduce(self) -> None:
        merge_processes(self, lambda: Visited(len(self.done)))

    @property
    def count(self) -> int:
        return int(self.done.sum())

    @property
    def fingerprint(self) -> str:
        """Of the pictures as they were measured, whatever their names and order."""
        return hashlib.sha256(f"{self.count} {self._digest % 2**256}".encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "unreadable": self.unreadable, "digest": str(self._digest % 2**256)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            UsageError: it is of another number of samples, or damaged.
        """
        (self.done,) = restored(state, "visited samples", done=(torch.bool, (len(self.done),)))
        unreadable, digits = state.get("unreadable"), state.get("digest")
        if not is_texts(unreadable):
            raise UsageError("a saved state of visited samples is damaged: it has no reasons")
        if not isinstance(digits, str) or not re.fullmatch("[0-9]{1,78}", digits):
            raise UsageError("a saved state of visited samples is damaged: it has no digest")
        self.unreadable, self._digest = dict(unreadable), int(digits)


class Partial:
    """The states of an evaluation that is under way, in a folder: one file a process, each whole or not there.

    The number of processes may change between runs: rank 0 merges all saved states. One whose samples it already has
    is passed over, so that no sample counts twice. A part of the work (`--part I/N`) reads and writes its own files
    alone; the evaluation of the whole reads all.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], part: Part | None = None) -> None:
        if folder.is_file():
            raise UsageError(f"{folder} is a file; give a folder for the partial state")
        self.folder = folder
        self.identity = digest(dict(identity))
        own = "part" if part is None else f"part-{part.number}-of-{part.parts}"
        self.path, self._pattern = folder / f"{own}-{rank()}.pt", f"{own}-*.pt"

    def load(self, metrics: Mapping[str, Metric], visited: Visited) -> None:
        """Takes over what was saved, on rank 0.

        Raises:
            UsageError: it is of another evaluation, or damaged.
        """
        if rank() == 0:
            parts = []
            for path in sorted(self.folder.glob(self._pattern)):
                state = checkpoint.load_state(path)
                states = state.get("states")
                ours = state.get("identity") == self.identity
                if not ours or not isinstance(states, Mapping) or not metrics.keys() <= states.keys():
                    raise UsageError(
                        f"{self.folder} holds the partial state of another evaluation; finish it with the same "
                        "arguments, delete it, or give another folder"
                    )
                try:
                    part = Visited(len(visited.done))
                    part.load_state_dict(state.get("seen") or {})
                    others = {name: _alike(metric, states[name]) for name, metric in metrics.items()}
                except UsageError as error:
                    raise UsageError(f"{path} is damaged ({error}); delete it") from None
                parts.append((part, others))
            for part, others in sorted(parts, key=lambda part: -part[0].count):
                if (part.done & ~visited.done).any():
                    if (part.done & visited.done).any():
                        raise UsageError(
                            f"{self.folder} holds parts that share images: of other numbers of parts, or of another "
                            "batch size; delete those that do not belong together"
                        )
                    for name, metric in metrics.items():
                        metric.merge(others[name])
                    visited.merge(part)
            if parts:
                self.save(metrics, visited)
        barrier()

    def save(self, metrics: Mapping[str, Metric], visited: Visited) -> None:
        kept = {name: metric.state_dict() for name, metric in metrics.items()}
        checkpoint.save_state(self.path, {"identity": self.identity, "states": kept, "seen": visited.state_dict()})


def discard_partial(resume: str | Path | None) -> None:
    """Removes the partial state of an evaluation whose result is there."""
    barrier()
    if resume is None or rank() != 0:
        return
    folder = Path(resume)
    for path in folder.glob("part-*.pt"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _alike(metric: Metric, saved: Any) -> Metric:
    """A metric of the same kind that holds a saved state."""
    if not isinstance(saved, Mapping):
        raise UsageError("a state is no table")
    another = copy.copy(metric)
    another.states = {name: copy.copy(state) for name, state in metric.states.items()}
    another.left_out = {}
    another.load_state_dict(saved)
    return another
