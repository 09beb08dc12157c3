"""Taking in images by their numbers: shared by processes without padding, interrupted and taken up again."""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel import checkpoint
from lexel.data import to_uint8
from lexel.distributed import barrier, broadcast, gather, processes, rank
from lexel.errors import UsageError
from lexel.evaluate.sources import Source, digest

Progress = Callable[[int, int], None]  # called with (images done, images of this process)


class Seen:
    """Which samples were taken in, what their pixels were, and which could not be read."""

    def __init__(self, count: int) -> None:
        self.done = torch.zeros(count, dtype=torch.bool)
        self.unreadable: dict[str, str] = {}
        self._digest = 0  # sum of the SHA-256 of every picture: order, processes and interruptions do not show

    def add(self, images: Tensor, numbers: Tensor) -> None:
        self.done[numbers] = True
        for picture in to_uint8(images):
            self._digest += int.from_bytes(hashlib.sha256(picture.data).digest(), "big")

    def merge(self, other: "Seen") -> None:
        self.done |= other.done
        self.unreadable |= other.unreadable
        self._digest += other._digest

    def all_reduce(self) -> None:
        if processes() == 1:
            return
        parts = gather(self.state_dict())
        self.load_state_dict(parts[0])
        for part in parts[1:]:
            other = Seen(len(self.done))
            other.load_state_dict(part)
            self.merge(other)

    @property
    def count(self) -> int:
        return int(self.done.sum())

    @property
    def fingerprint(self) -> str:
        """Of the pictures as they were measured, whatever their names and order."""
        return hashlib.sha256(f"{self.count} {self._digest % 2**256}".encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "unreadable": self.unreadable, "digest": str(self._digest % 2**256)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.unreadable, self._digest = state["done"], state["unreadable"], int(state["digest"])


@torch.no_grad()
def stream(
    source: Source,
    states: dict[str, Any],
    take: Callable[[Tensor, Tensor], None],
    identity: Mapping[str, Any],
    batch_size: int,
    resume: str | Path | None,
    save_every: float,
    progress: Progress | None,
) -> Seen:
    """Takes in every sample of this process's share, once, and joins the states of all processes.

    The partial state stays until the caller has its result and calls `forget`.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    seen = Seen(len(source))
    partial = None if resume is None else Partial(Path(resume), identity)
    if partial is not None:
        partial.load(states, seen)
    remaining = (~broadcast(seen.done)).nonzero().flatten()[rank() :: processes()].tolist()
    done, saved = 0, time.monotonic()
    for images, numbers in source.batches(remaining, batch_size):
        take(images, numbers)
        seen.add(images, numbers)
        done += len(numbers)
        if partial is not None and time.monotonic() - saved >= save_every:
            partial.save(states, seen)
            saved = time.monotonic()
        if progress is not None:
            progress(done, len(remaining))
    seen.unreadable.update(source.unreadable)
    if partial is not None:
        partial.save(states, seen)  # what follows takes a while too: nothing is to be looked at twice
    for state in (*states.values(), seen):
        state.all_reduce()
    if seen.count < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(seen.unreadable.items())[:1])
        raise UsageError(f"at least two readable images are needed, got {seen.count}{reasons and f' ({reasons})'}")
    return seen


class Partial:
    """The states of an evaluation that is under way, in a folder: one file a process, each whole or not there.

    The processes may be others next time. The first of them then takes over everything that was saved; a file whose
    samples it already has is passed over, so that no sample counts twice.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        if folder.is_file():
            raise UsageError(f"{folder} is a file; give a folder for the partial state")
        self.folder = folder
        self.identity = digest(dict(identity))
        self.path = folder / f"part-{rank()}.pt"

    def load(self, states: dict[str, Any], seen: Seen) -> None:
        if rank() == 0:
            parts = [checkpoint.load_state(path) for path in sorted(self.folder.glob("part-*.pt"))]
            for part in parts:
                if part.get("identity") != self.identity or not states.keys() <= part["states"].keys():
                    raise UsageError(
                        f"{self.folder} holds the partial state of another evaluation; finish it with the same"
                        " arguments, delete it, or give another folder"
                    )
            for part in sorted(parts, key=lambda part: -int(part["seen"]["done"].sum())):
                self._take_over(part, states, seen)
            if parts:
                self.save(states, seen)
        barrier()

    def _take_over(self, part: dict[str, Any], states: dict[str, Any], seen: Seen) -> None:
        other = Seen(len(seen.done))
        other.load_state_dict(part["seen"])
        if not (other.done & ~seen.done).any():
            return
        fresh = seen.count == 0
        for name, state in states.items():
            if fresh:
                state.load_state_dict(part["states"][name])
            else:
                another = _alike(state)
                another.load_state_dict(part["states"][name])
                state.merge(another)
        seen.merge(other)

    def save(self, states: dict[str, Any], seen: Seen) -> None:
        kept = {name: state.state_dict() for name, state in states.items()}
        checkpoint.save_state(self.path, {"identity": self.identity, "states": kept, "seen": seen.state_dict()})


def forget(resume: str | Path | None) -> None:
    """Removes the partial state of an evaluation whose result is there."""
    barrier()
    if resume is None or rank() != 0:
        return
    folder = Path(resume)
    for path in folder.glob("part-*.pt"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _alike(state: Any) -> Any:
    """An object of the same class, to be filled by `load_state_dict`."""
    another = object.__new__(type(state))
    another.__dict__.update(state.__dict__)
    return another
