"""Image sets by a list of paths in a text or CSV file."""

import csv
import io
from pathlib import Path

from lexel.data.files import EXTENSIONS, in_words
from lexel.data.folder import SPLITS, NoSplit
from lexel.data.held_out import class_numbers
from lexel.data.images import FileImages, ImageSet
from lexel.data.options import OpenOptions
from lexel.errors import UsageError
from lexel.regular import expanded, open_regular

COLUMNS = {
    "path": "path", "file": "path", "filename": "path", "file_name": "path", "image": "path",
    "label": "label", "class": "label",
    "caption": "caption", "text": "caption",
    "split": "split",
}  # fmt: skip


def open_list(location: str, options: OpenOptions) -> ImageSet:
    """The images that a file lists: one path a line (.txt), or a table (.csv, .tsv) with a line of column names.

    Columns are `path` (or `file`, `filename`, `file_name`, `image`), and optionally `label` or `class`, `caption` or
    `text`, and `split`. Paths are relative to the list's own folder. Labels are names of classes, numbered in sorted
    order, or numbers from 0, which keep their values.

    Raises:
        NoSplit: there is no column `split`, or no image of that split.
        UsageError: the file is missing or damaged, or lists no image or one twice.
    """
    path = expanded(location)
    rows = _rows(path)
    if options.split is not None:
        named = {"validation": "validation", **{name: split for split, names in SPLITS.items() for name in names}}
        rows = [row for row in rows if named.get(row.get("split", "").lower()) == options.split]
        if not rows:
            raise NoSplit(f"{path} has no split {options.split!r}: no line has it in the column 'split'")
    names = [row["path"] for row in rows]
    if not names:
        raise UsageError(f"{path} lists no images")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in set(names[:number]))
        raise UsageError(f"{path} lists {twice!r} twice")
    labels, classes = _labels(path, [row.get("label") for row in rows])
    images = FileImages(path.parent, names, labels, classes, decoding=options.decoding)
    if all("caption" in row for row in rows):
        images.captions = [row["caption"] for row in rows]
    return images


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {in_words(error)}") from None
    if path.suffix.lower() not in (".csv", ".tsv"):
        return [{"path": line.strip()} for line in text.replace("\0", "\n").splitlines() if line.strip()]
    try:
        lines = list(
            csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        )
    except csv.Error as error:
        raise UsageError(f"{path} is damaged: {in_words(error)}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(f"{path} is empty")
    header = [COLUMNS.get(name.strip().lower(), "") for name in lines[0]]
    if "path" not in header:
        if Path(lines[0][0]).suffix.lower() not in EXTENSIONS:
            raise UsageError(f"{path} has no column 'path' in its first line: {', '.join(lines[0])[:100]}")
        header, lines = ["path", "label", "caption"], [[], *lines]  # no line of names
    rows = []
    for number, line in enumerate(lines[1:], 2):
        row = {name: value for name, value in zip(header, line, strict=False) if name}
        if not row.get("path") or "\0" in row["path"]:
            raise UsageError(f"{path} has no path in line {number}")
        rows.append(row)
    return rows


def _labels(path: Path, given: list[str | None]) -> tuple[list[int] | None, list[str]]:
    if all(label is None for label in given):
        return None, []
    missing = next((number for number, label in enumerate(given) if not label), None)
    if missing is not None:
        raise UsageError(f"{path} has labels, but none for image {missing + 1}")
    labels = [str(label) for label in given]
    if all(label.isdecimal() and len(label) < 7 for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, [str(number) for number in range(max(numbers) + 1)]
    return class_numbers(labels)
