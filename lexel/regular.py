"""Opening files that other people name: only regular files, so that a named pipe or a device cannot hang a program."""

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expanded(path: str | Path) -> Path:
    """A path with the home folder for a leading `~`, as shells take it: a name that is no user's stays as it stands."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file for reading bytes; never waits for anything.

    Raises:
        OSError: as `open` does; and for anything but a regular file, with `strerror` saying what it is.
    """
    if "\0" in os.fsdecode(path):
        raise OSError(errno.EINVAL, "its name holds a zero byte", os.fspath(path))
    check_regular(path, Path(path).stat())  # first, since opening alone does things to some devices
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_regular(path, os.fstat(descriptor))  # it may be another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a regular file's bytes in 64 hexadecimal digits, read part by part.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: str | Path, status: os.stat_result) -> None:
    """Raises an OSError that says what a path is if it is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"it is {kind(status.st_mode)}, not a regular file", os.fspath(path))


def kind(mode: int) -> str:
    """The type of a file by its mode: "a named pipe"."""
    return next((name for test, name in KINDS if test(mode)), "a special file")
