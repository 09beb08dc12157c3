"""Names of the image files below a folder: as fast as the walk itself, and what was left out."""

import bisect
import itertools
import os
import stat
from pathlib import Path
from typing import Any

from lexel.data.files import EXTENSIONS
from lexel.data.names import Names
from lexel.errors import UsageError
from lexel.regular import kind

# All spellings, so that no name need be turned to lower case: 2^5 of the longest.
_ENDINGS = frozenset(
    "".join(letters)
    for extension in EXTENSIONS
    for letters in itertools.product(*((letter.lower(), letter.upper()) for letter in extension.removeprefix(".")))
)
# What most names end with, for a look at many names without a call of ours for each.
_SHORT_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS if len(ending) == 3)


def find_images(folder: str | Path, left_out: dict[str, str] | None = None) -> Names:
    """Paths of the image files below a folder, relative to it, with forward slashes, sorted.

    Hidden files and folders are left out; links to files and folders are followed, each folder once.

    Args:
        folder: where to look.
        left_out: filled with the subfolders that cannot be opened and with pipes, sockets and devices that are named
            like images, each with the reason.

    Raises:
        UsageError: the folder itself cannot be opened.
    """
    left_out = {} if left_out is None else left_out
    top = os.fspath(folder)
    try:
        status = Path(top).stat()
        with os.scandir(top):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be opened: {error.strerror}") from None
    return Names.joined(_walk(top, "", {(status.st_dev, status.st_ino)}, left_out))


def holds_images(folder: str | Path) -> bool:
    """Whether there is an image file anywhere below a folder; ends at the first one."""
    pending, seen = [os.fspath(folder)], set()
    while pending:
        path = pending.pop()
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if is_folder(entry):
                        pending.append(entry.path)
                    elif _is_named_like_an_image(entry.name):
                        return True
        except OSError:  # `find_images` names the folder
            continue
    return False


def _walk(path: str, prefix: str, seen: set[tuple[int, int]], left_out: dict[str, str]) -> list[Names]:
    """The names below one folder, sorted, in pieces; `prefix` is its path relative to the top, with a slash."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):  # first, since most are: no second question, no call of ours
                    files.append(entry.name)
                    continue
                name = entry.name
                if name.startswith("."):
                    continue
                if is_folder(entry):
                    folders.append(entry)
                elif _is_named_like_an_image(name):
                    special = _special(entry)
                    if special is None:
                        files.append(name)
                    else:
                        left_out[prefix + name] = f"it is {special}, not a regular file"
    except OSError as error:
        left_out[prefix.rstrip("/")] = error.strerror or "it cannot be opened"
        return []
    below: dict[str, list[Names]] = {}
    # Real folders come before links to folders, so that a picture goes by its real path where it has one.
    for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):
        try:
            status = Path(entry.path).stat()  # an entry's own stat has no device on Windows
        except OSError as error:
            left_out[prefix + entry.name] = error.strerror or "it cannot be opened"
            continue
        if (status.st_dev, status.st_ino) not in seen:  # else a link that leads back to where we have been
            seen.add((status.st_dev, status.st_ino))
            below[f"{entry.name}/"] = _walk(entry.path, f"{prefix}{entry.name}/", seen, left_out)
    files.sort()
    del files[bisect.bisect_left(files, ".") : bisect.bisect_left(files, "/")]  # hidden ones
    text = "/".join([*files, ""])  # no name has a slash
    if not files or files[-1][-4:] not in _SHORT_ENDINGS or text.count(f"{files[-1][-4:]}/") < len(files):
        files = [name for name in files if _is_named_like_an_image(name)]
        text = "/".join([*files, ""])
    if not below:
        return [Names.between("/", text, prefix)]
    pieces, first = [], 0
    for name in sorted(below):  # with its slash, a folder lies among the files where its content does
        last = bisect.bisect(files, name, first)
        pieces += [Names(files[first:last], prefix), *below[name]]
        first = last
    return [*pieces, Names(files[first:] if first else files, prefix)]


def _is_named_like_an_image(name: str) -> bool:
    stem, dot, ending = name.rpartition(".")
    return bool(stem and dot) and ending in _ENDINGS


def is_folder(entry: "os.DirEntry[Any]") -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _special(entry: "os.DirEntry[Any]") -> str | None:
    """The type of what is no file: "a named pipe", ...; None for files, and for broken links: unreadable pictures."""
    try:
        if entry.is_file():
            return None
        mode = Path(entry.path).stat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else kind(mode)
