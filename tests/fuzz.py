"""Damaged copies of files, always the same ones: what every reader must answer with a right result or a UsageError."""

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from thorough import thorough

from lexel.errors import UsageError

COUNTS = 100, 300, 20_000
# `def test_...(count, tmp_path)` with this mark runs 100 mutations, 300 with `-m thorough`, and 20,000 with `-m slow`.
counts = pytest.mark.parametrize(
    "count", [COUNTS[0], *thorough(COUNTS[1]), pytest.param(COUNTS[2], marks=pytest.mark.slow)]
)
CORPUS = Path(__file__).with_name("corpus")  # what a reader once failed on: CORPUS/reader/parameters/FILE.SEED-NUMBER

# What stands in a text where a number, a word or a value is expected.
WORDS = (
    *(b"nan", b"NaN", b"inf", b"-Infinity", b"1e400", b"-1", b"0", b"1.5", b"99999999999999999999", b"true", b"null"),
    *(b'""', b'"32"', b"[]", b"{}", b"[1, 2]", b'{"a": 1}', b"'", b'"', b"\\ud800", b"\xff", b"\x00", b"(" * 300),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Gives `count` damaged copies of `data`: one to four faults each, a function of the seed alone."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            draw.choice(FAULTS)(damaged, draw)
        yield bytes(damaged)


def survives(
    read: Callable[[Path], Any],
    path: Path,
    seed: int,
    count: int,
    check: Callable[[Any], None] | None = None,
    always: bool = False,
    name: str | None = None,
) -> int:
    """Reads damaged copies of the file at `path`, in its place: anything raised but a UsageError fails the test.

    What the test once failed on, in CORPUS, comes first. A copy that fails is written there, to be committed with what
    mends it. One that kills the interpreter is still at `path`, in pytest's folder.

    Args:
        read: the reader; it gets the path.
        path: a whole file; it is whole again at the end.
        seed, count: of `mutations`.
        check: asserts that what was read is right.
        always: whether every copy must be read, without an error.
        name: what the file is called in CORPUS, where its own name is another one each time.

    Returns:
        How many of the `count` copies were read without an error.
    """
    data, readable, corpus, name = path.read_bytes(), 0, CORPUS / reader(), name or path.name
    try:
        for kept in inputs(corpus, name):
            path.write_bytes(kept.read_bytes())
            try:
                _is_read(read, path, check, always)
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{kept.relative_to(CORPUS)}: {_told(error)}") from error
        for number, damaged in enumerate(mutations(data, seed, count)):
            path.write_bytes(damaged)
            try:
                readable += _is_read(read, path, check, always)
            except (Exception, pytest.fail.Exception) as error:
                where = _keep(corpus / f"{name}.{seed}-{number}", damaged)
                raise AssertionError(f"mutation {number} of seed {seed}, {where}: {_told(error)}") from error
    finally:
        path.write_bytes(data)
    return readable


def reader() -> Path:
    """The folder in CORPUS of the test that runs: its name and its parameters, without the number of mutations."""
    name, _, parameters = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].rpartition("::")[2].partition("[")
    known = [part for part in parameters.removesuffix("]").split("-") if part not in map(str, COUNTS)]
    return Path(name.removeprefix("test_"), re.sub(r"[^\w.-]", "_", "-".join(known)))


def inputs(corpus: Path, name: str) -> list[Path]:
    """What a reader once failed on in the place of a file: files called like it, with `.SEED-NUMBER` or a word."""
    return sorted(path for path in corpus.glob("*") if path.is_file() and path.stem == name)


def _keep(path: Path, data: bytes) -> str:
    """Writes an input that failed; says where it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:  # a checkout that may not be written
        return f"which could not be kept ({error.strerror})"
    return f"kept as {path}"


def _is_read(read: Callable[[Path], Any], path: Path, check: Callable[[Any], None] | None, always: bool) -> bool:
    """Whether a file was read; an error of one line is the other right outcome, unless it must be read."""
    try:
        result = read(path)
        if check is not None:
            check(result)
    except UsageError as error:
        message = str(error)
        if always:
            raise AssertionError(f"refused, though it must be read: {message}") from error
        if not message or "\n" in message:
            raise AssertionError(f"the error is not one line: {message!r}") from error
        return False
    return True


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _flip(data: bytearray, draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _overwrite(data: bytearray, draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))


def _number(data: bytearray, draw: random.Random) -> None:
    width = draw.choice((1, 2, 4, 8))
    value = draw.choice(NUMBERS) & (256**width - 1)
    at = draw.randrange(len(data) + 1)
    data[at : at + width] = value.to_bytes(width, draw.choice(("little", "big")))


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data) + 1) :]


def _remove(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    del data[at : at + draw.choice((1, 2, 8, 100))]


def _insert(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.randbytes(draw.choice((1, 2, 8, 100)))


def _repeat(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    data[at:at] = data[at : at + draw.choice((1, 8, 100))]


def _zeros(data: bytearray, draw: random.Random) -> None:
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 8, 100, 4096))
    data[at : at + length] = bytes(len(data[at : at + length]))


def _word(data: bytearray, draw: random.Random) -> None:
    """Puts a word in the place of a number or a word of a text."""
    places = list(
        re.finditer(rb"-?\d+(\.\d+)?|\"[^\"\n]{0,40}\"|'[^'\n]{0,40}'|true|false|null", bytes(data[:200_000]))
    )
    if places:
        place = draw.choice(places)
        data[place.start() : place.end()] = draw.choice(WORDS)


FAULTS = (_flip, _flip, _overwrite, _number, _cut, _remove, _insert, _repeat, _zeros, _word, _word)
