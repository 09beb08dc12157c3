"""Writing pictures as PNG files: whole ones, or strip by strip, never over files of another origin."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lexel.checkpoint import atomic
from lexel.data import to_display
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback

WRITTEN_BY = ("Software", "Lexel")  # in the PNG files written here, which may be replaced


class Strips(NamedTuple):
    """A picture that memory need not hold whole."""

    height: int
    width: int
    rows: Iterator[np.ndarray]  # uint8 (rows, width, C), from top to bottom


def check_targets(names: Iterable[str], out: str | Path) -> None:
    """Checks that pictures of these names can be written as PNG files to a folder, before any is.

    Raises:
        UsageError: a name leads out of the folder, or a file of another origin has it.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder to write to")
    taken: set[str] = set()
    for name in names:
        taken.add(_target(name, taken))
    if out.is_dir():
        for target in sorted(taken):
            _check_overwrite(out / target)


def _target(name: str, taken: set[str]) -> str:
    """The file for a picture, by its name and the files that are taken."""
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not plain.name or "\0" in name:
        raise UsageError(f"the name {name!r} leads out of the folder to write to")
    plain = plain.with_suffix("")
    number, target = 1, f"{plain}.png"
    while target in taken:
        number += 1
        target = f"{plain}-{number}.png"
    return target


def _check_overwrite(path: Path) -> None:
    """Refuses to write over a file that `write_pngs` did not write."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            ours = image.info.get(WRITTEN_BY[0]) == WRITTEN_BY[1]
    except (OSError, ValueError, SyntaxError):
        ours = False
    if not ours:
        raise UsageError(f"{path} exists and was not written by Lexel; it would be overwritten: give another folder")


def write_pngs(
    pictures: Iterable[tuple[str, np.ndarray | Strips]],
    out: str | Path,
    total: int,
    progress: ProgressCallback | None = None,
) -> int:
    """Writes named pictures, uint8 (H, W, C) or strips of such, as PNG files under a folder; returns how many.

    Names may have folders in them; two that would share a file get numbers. Files that were not written here before
    are never replaced, be they the originals or others.

    Raises:
        UsageError: a name leads out of the folder, or a file of another origin has it.
    """
    out = Path(out)
    note = PngInfo()
    note.add_text(*WRITTEN_BY)
    taken: set[str] = set()
    for name, picture in pictures:
        target = _target(name, taken)
        taken.add(target)
        _check_overwrite(out / target)
        with atomic(out / target) as path:
            if isinstance(picture, Strips):
                _write_strips(picture, path)
            else:
                Image.fromarray(to_display(picture)).save(path, pnginfo=note)
        if progress:
            progress(len(taken), total)
    return len(taken)


def _write_strips(picture: Strips, path: Path) -> None:
    """A PNG file of RGB, of which only a strip is in memory; every row is stored as its difference to that above."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, above = zlib.compressobj(), np.zeros((1, picture.width * 3), np.uint8)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)))
        file.write(chunk(b"tEXt", "\0".join(WRITTEN_BY).encode()))
        for strip in picture.rows:
            rows = to_display(strip).reshape(len(strip), -1)
            filtered = np.full((len(rows), 1 + rows.shape[1]), 2, np.uint8)  # 2: the filter "up"
            filtered[:, 1:] = rows - np.concatenate([above, rows[:-1]])
            above = rows[-1:]
            if packed := packer.compress(filtered.tobytes()):
                file.write(chunk(b"IDAT", packed))
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))
