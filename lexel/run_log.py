"""What a run has written: lines of numbers, and snapshots of tensors."""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`: "step", "kind", "seconds" and numbers.

    A last line that a killed process did not finish is left out; so is a damaged one, with a warning.
    """
    if not path.is_file():
        return []
    found = [_read_line(line) for line in path.read_bytes().split(b"\n")[:-1]]  # what follows is unfinished, or empty
    if None in found:
        warnings.warn(f"{path}: {found.count(None)} damaged lines are left out", stacklevel=2)
    return [line for line in found if line is not None]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line of the log; None if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    numbers = {name: value for name, value in line.items() if name != "kind"}
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
        """What the file holds; nothing, with a warning, where it is damaged."""
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
    """What a run folder says; see `RunFolder.contents`.

    Attributes:
        name: of the run, for people.
        folder: where it lies.
        recipe: as tables; empty where there is none.
        train, validation, evaluations: lines of `metrics.jsonl`; the last of the protocols that the recipe lists.
        snapshots: by step.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    snapshots: dict[int, Snapshot]

    @property
    def last(self) -> Mapping[str, NDArray[Any]]:
        """The newest snapshot; empty where there is none."""
        return self.snapshots[max(self.snapshots)] if self.snapshots else {}
