"""Which files a location means: a path, a folder, a pattern, ranges of numbered shards, here or in a store."""

import glob
import re
from pathlib import Path
from urllib.parse import urlsplit

from lexel.data.files import in_words
from lexel.data.remote import Location, is_remote, matches
from lexel.errors import UsageError
from lexel.regular import expanded


def expand_locations(location: str, ending: str) -> list[Location]:
    """The files that a location means, in order: as `expand`, or in a store elsewhere.

    Raises:
        UsageError: a pattern means none, or a file here is not there.
    """
    if not is_remote(location):
        return [*expand(location, ending)]
    places: list[Location] = []
    for text in _braces(location):
        if not re.search(r"[*?\[]", urlsplit(text).path):
            places.append(text)
            continue
        try:
            found = matches(text)
        except OSError as error:
            raise UsageError(f"{text} cannot be listed: {in_words(error)}") from None
        if not found:
            raise UsageError(f"nothing in the store matches {text!r}; give locations, or a range {{0000..0099}}")
        places += found
    return places


def expand(location: str, ending: str) -> list[Path]:
    """The files that a location means, in order: a path, a folder, a pattern, or ranges such as `{00..12}` and `{a,b}`.

    Raises:
        UsageError: one of them is not there.
    """
    paths = []
    for text in _braces(str(expanded(location))):
        path = Path(text)
        if path.is_dir():
            inside = sorted(path.glob(f"*{ending}"))
            if not inside:
                raise UsageError(f"there are no {ending} files in {path}")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            matches = sorted(map(Path, glob.glob(text)))  # noqa: PTH207, Path.glob takes no absolute pattern
            if not matches:
                raise UsageError(
                    f"there is no file {text!r}; give a file, a folder, a pattern or a range {{0000..0099}}"
                )
            paths += matches
    return paths


def _braces(text: str) -> list[str]:
    """`a{01..03}` and `a{x,y}` written out."""
    match = re.search(r"\{(\d{1,12})\.\.(\d{1,12})\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    if match[3] is not None:
        parts = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < 10**6:
            raise UsageError(f"the range {match[0]} must go up, by fewer than a million shards")
        parts = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return [one for part in parts for one in _braces(text[: match.start()] + part + text[match.end() :])]
