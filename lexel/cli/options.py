"""Options, progress bar and printing that several commands share."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lexel.errors import UsageError

if TYPE_CHECKING:
    from lexel.codec import Codec
    from lexel.data import Transform
    from lexel.tokenizer import Tokenizer

LOG_SECONDS = 30.0  # between the lines of a training's progress in a log file
LEFT_OUT = 20  # pictures that could not be used, named before the rest is only counted

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[str, typer.Option(help="float32, bf16 or fp16; indices are computed in float32 in any case.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Split = Annotated[str | None, typer.Option(help="train or validation, if the data set has these splits.")]
Weights = Annotated[
    Literal["average", "live", "best"] | None,
    typer.Option(help="Weights of a run: average or live of its newest step, or best. Default: average."),
]
Size = Annotated[
    str | None,
    typer.Option(help="Image side in pixels, or 'native' for whole images. Default: the tokenizer's training size."),
]
TransformName = Annotated[
    str | None,
    typer.Option("--transform", help="How images are resized and cropped. Default: the tokenizer's own."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, max=1024, help="Worker processes that read images. Default: as many as pay."),
]
PIXELS = 150_000_000  # lexel.data.PIXEL_LIMIT, which imports what --help does without
PixelLimit = Annotated[int, typer.Option(min=1, help="Image files with more pixels are skipped, not decoded.")]
MaxUnreadable = Annotated[
    float, typer.Option(min=0, max=1, help="The part of the images (0.01) that may be unreadable and left out.")
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --size native: images with more pixels are skipped. Default: 4194304; no limit with --tile."
    ),
]
Tile = Annotated[
    int | None,
    typer.Option(min=1, help="Larger images go through the tokenizer in tiles of this side, in pixels, blended."),
]
Overlap = Annotated[
    int | None,
    typer.Option(
        min=0, help="With --tile: pixels that tiles share. Default: what makes them equal the whole, or a quarter."
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, a model folder, a published checkpoint or a hub id.")
]
SOURCES = "a folder, tar:..., openmoji, photos, ... (lexel list sources)"
DataArgument = Annotated[str, typer.Argument(metavar="DIR", help=f"Images: {SOURCES}.")]
TrainingPrecision = Annotated[str | None, typer.Option(help="float32, bf16 or fp16. Default: the recipe's.")]
Out = Annotated[Path, typer.Option(help="Output folder.")]
PartOption = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="Only part I of N: array jobs, or machines without a common disk."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override an option of the recipe.")
]


def say(message: str) -> None:
    """Prints to stderr."""
    print(message, file=sys.stderr)


def transform_of(tokenizer: "Tokenizer", size: str | None, name: str | None) -> "Transform | None":
    """The transform for `--size` and `--transform`; None for whole images."""
    from lexel.loading import own_transform

    return None if size == "native" else own_transform(tokenizer, pixels(size), name)


def print_seams(codec: "Codec") -> None:
    """Says whether tiles give what whole images give, and what their seams were measured to cost."""
    if codec.tiled is not None and (codec.seam or codec.tiled.exact):
        say(f"lexel: {codec.tiled.told()}{'; ' + codec.seam if codec.seam else ''}")


def pixels(size: str | None) -> int | None:
    """The number in `--size`."""
    if size is not None and not (size.isdecimal() and len(size) < 10 and int(size)):
        raise UsageError(f"--size {size[:40]!r} is neither a number of pixels nor 'native'")
    return None if size is None else int(size)


def names(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def is_integer(text: str) -> bool:
    """Whether a text is a number without sign that an int64 holds."""
    return text.isdecimal() and len(text) < 19


def integers(text: str, option: str) -> list[int]:
    """The integers of a list with commas."""
    if not all(map(is_integer, names(text))):
        raise UsageError(f"{option} {text[:80]!r} is no list of numbers; write them with commas: 1024,16384")
    return [int(name) for name in names(text)]


def number_or_numbers(text: str, option: str) -> float | list[float]:
    """One number, or one for each sub-token, with commas."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a number nor two with a comma, such as 1.9,2.0") from None
    return numbers[0] if len(numbers) == 1 else numbers


@contextmanager
def progress(what: str, unit: str = "images") -> Iterator[Callable[..., None]]:
    """A progress bar with speed and time left; yields `update(done, total, note, stage)`.

    Where standard error is no terminal, trainings (the unit "steps") write a plain line now and then instead.
    """
    if not sys.stderr.isatty():
        yield _lines(what) if unit == "steps" else lambda *_, **__: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int | None = None, note: str = "", stage: str = what) -> None:
            speed = bar.tasks[0].speed
            note = note or (f"{speed:.1f} {unit}/s" if speed else "")
            bar.update(task, completed=done, total=total, note=note, description=stage)

        yield update


def _lines(what: str) -> Callable[..., None]:
    """Progress for a log file: the first step, the last one, and one every LOG_SECONDS."""
    last: dict[str, float] = {}  # when a stage was written

    def update(done: int, total: int | None = None, note: str = "", stage: str = what) -> None:
        now = time.monotonic()
        if done != total and now - last.get(stage, -LOG_SECONDS) < LOG_SECONDS:
            return
        last[stage] = now
        say(f"{stage}: step {done:,}{'' if total is None else f' of {total:,}'}{note and ', '}{note}")

    return update


def print_table(rows: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one row each."""
    texts = [(name, f"{value:,.6g}" if isinstance(value, float) else str(value)) for name, value in rows]
    width = max((len(name) for name, _ in texts), default=0)
    for name, value in texts:
        print(f"{name:<{width}}  {value}")


def print_grid(rows: Iterable[Iterable[str]], width: int) -> None:
    """Rows of cells, aligned right."""
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell in row))


def print_end(finished: bool, message: str, out: Path) -> None:
    """Prints the end of something resumable: the message if it is finished, else how to go on."""
    print(message if finished else f"stopped; run the same command again to go on ({out})")


def print_left_out(unreadable: Mapping[str, str]) -> None:
    """Names images that could not be used, with the reason."""
    for name, reason in list(unreadable.items())[:LEFT_OUT]:
        say(f"lexel: left out {name}: {reason}")
    if unreadable:
        say(f"lexel: {len(unreadable):,} pictures could not be used")
