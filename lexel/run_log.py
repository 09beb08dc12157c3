"""The log of a run: lines of numbers, and snapshots of tensors."""

import json
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Line = dict[str, Any]
SPEEDS = {  # of a line of training, and what they are of
    "images_per_second": "training",
    "data_images_per_second": "reading alone",
    "step_images_per_second": "steps alone",
}
CHOICES = "choices"  # the kind of the line at a start, whose values are texts
LARGEST = 4096  # lines of a kind that pages draw
RECENT = 64  # of them all the newest, which the verdict on a codebook reads
BLOCK = 64 * 1024  # bytes that are read from the end of a log


def read_metrics(path: Path) -> Iterator[Line]:
    """The lines of a `metrics.jsonl` one by one: "step", "kind", "seconds" and numbers.

    A last line that a killed process did not finish is left out; so is a damaged one, with a warning.
    """
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                break
            if (line := _read_line(text)) is None:
                damaged += 1
            else:
                yield line
    if damaged:
        warnings.warn(f"{path}: {damaged} damaged lines are left out", stacklevel=2)


def last_metrics(path: Path, kind: str, count: int) -> list[Line]:
    """The newest lines of a kind, oldest first, read from the end of a `metrics.jsonl`; damaged ones are left out."""
    if not path.is_file():
        return []
    span, size = BLOCK, path.stat().st_size
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - span))
            texts = file.read(span).split(b"\n")[:-1]  # what follows is unfinished, or empty
        if span < size:
            del texts[:1]  # begins before
        found = [line for line in map(_read_line, texts) if line is not None and line["kind"] == kind]
        if len(found) >= count or span >= size:
            return found[-count:]
        span *= 4


class Thinned:
    """Lines of a log in bounded memory: at most LARGEST, evenly spread, and the RECENT newest."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Line]] = []
        self._newest: deque[tuple[int, Line]] = deque(maxlen=RECENT)
        self._count, self._every = 0, 1

    def append(self, line: Line) -> None:
        """Takes the next line."""
        self._newest.append((self._count, line))
        if self._count % self._every == 0:
            self._kept.append((self._count, line))
        if len(self._kept) > LARGEST:
            self._kept, self._every = self._kept[::2], 2 * self._every
        self._count += 1

    @property
    def lines(self) -> list[Line]:
        """The lines that are kept, oldest first."""
        first = self._newest[0][0] if self._newest else 0
        older = [line for number, line in self._kept if number < first]
        return older + [line for _, line in self._newest]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line of the log; None if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    numbers = {name: value for name, value in line.items() if name != "kind"}
    if line["kind"] == CHOICES:
        numbers = {name: value for name, value in numbers.items() if not isinstance(value, str)}
    if not {"step", "seconds"} <= numbers.keys() or not all(map(is_number, numbers.values())):
        return None
    return line if isinstance(line["step"], int) and line["step"] >= 0 else None


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


DRAWN = {  # what pages draw of a snapshot: its type, and how many axes it may have
    "originals": ("U8", (4,)),
    "reconstructions": ("U8", (4,)),
    "samples": ("U8", (4,)),
    "latents": ("F32", (2,)),
    "codes": ("F32", (2,)),
    "histogram": ("I64", (1,)),
    "indices": ("I64", (2, 3, 4)),
    "prefixes": ("F32", (2,)),
}
ALIKE = {"reconstructions": "originals", "codes": "latents"}  # of one shape but for the number of rows


def unfit(forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The arrays of a snapshot that cannot be drawn, of those with these types and shapes."""
    wrong = [
        name
        for name, (kind, axes) in DRAWN.items()
        if name in forms
        and (forms[name][0] != kind or len(forms[name][1]) not in axes or min(forms[name][1], default=0) < 1)
    ]
    shapes = {name: shape[1:] for name, (_, shape) in forms.items()}
    return wrong + [name for name, other in ALIKE.items() if name in forms and shapes[name] != shapes.get(other)]


class Snapshot(Mapping[str, NDArray[Any]]):
    """The arrays that a validation kept, each read from the file when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """The lines of the file; none, with a warning, where it is damaged."""
        try:
            with safe_open(self.path, framework="numpy") as file:
                names = list(file.keys())
                found = {name: file.get_slice(name) for name in names}
                forms = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{self.path} cannot be read and is left out: {error}", stacklevel=2)
            return []
        if wrong := unfit(forms):
            warnings.warn(f"{self.path} is damaged and is left out: {wrong[0]} is {forms[wrong[0]]}", stacklevel=2)
            return []
        return names

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; see `RunFolder.contents`.

    Attributes:
        name: of the run, for people.
        folder: where it lies.
        recipe: as tables; empty where there is none.
        train, validation, evaluations: lines of `metrics.jsonl`, thinned where there are thousands; the last of the
            protocols that the recipe lists.
        snapshots: by step, ascending; none is read before it is looked at.
        choices: lines of what was chosen for the device, one for each start.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    snapshots: Mapping[int, Snapshot]
    choices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> Mapping[str, NDArray[Any]]:
        """The newest snapshot; empty where there is none."""
        return self.snapshots[max(self.snapshots)] if self.snapshots else {}
