"""Files elsewhere, read by ranges of bytes: over HTTP, and from any store that fsspec knows (s3://, gs://, ...).

Nothing is asked for that a location does not name, and nothing is kept on this machine.
"""

import io
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from lexel.errors import UsageError
from lexel.regular import open_regular

TRIES, WAIT, PATIENCE = 3, 0.5, 30.0  # a request; seconds before the second try; seconds for an answer
BLOCK = 2**20  # bytes that are asked for at once where a file is read from its beginning to its end
Location = Path | str  # a file here, or a location of `is_remote`
Version = tuple[int, int | str]  # size, and a date or what a server calls this content


def is_remote(location: str) -> bool:
    """Whether a location names a store: https://..., s3://..., memory://..."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", location) is not None


def stem(place: Location) -> str:
    """The name of a file without folders and its last suffix."""
    return place.stem if isinstance(place, Path) else PurePosixPath(urlsplit(place).path).stem


def version(location: str) -> Version:
    """The size of a file elsewhere and what names its content: an ETag, a date, or a store's own key.

    Raises:
        OSError: it is not there, or does not allow reading by ranges.
    """
    if _is_http(location):
        headers, content = _get(location, 0, 1)
        total = re.fullmatch(r"bytes 0-\d+/(\d+)", headers.get("Content-Range", ""))
        if total is None or len(content) != 1:
            raise OSError("the server does not give ranges of bytes")
        return int(total[1]), _content(headers)
    store, path = _store(location)
    return int(store.info(path)["size"]), str(store.ukey(path))


def read_range(location: str, offset: int, size: int, expected: Version | None = None) -> bytes:
    """Some bytes of a file elsewhere.

    Args:
        location: of the file.
        offset, size: which bytes.
        expected: the version that it must still have, where that is told with the bytes.

    Raises:
        OSError: they cannot be read, or the file has changed.
    """
    if size == 0:
        return b""
    if _is_http(location):
        headers, content = _get(location, offset, size)
        if expected is not None and _content(headers) != expected[1]:
            raise OSError(f"{location} was changed after it was opened")
    else:
        store, path = _store(location)
        content = store.cat_file(path, start=offset, end=offset + size)
    if len(content) != size:
        raise OSError(f"{location} gave {len(content):,} of the {size:,} bytes at {offset:,}")
    return bytes(content)


def matches(location: str) -> list[str]:
    """The locations that a pattern (`*`) in a store means, sorted; HTTP has no listings."""
    if _is_http(location):
        return []
    store, path = _store(location)
    scheme = location.partition("://")[0]
    return sorted(f"{scheme}://{str(name).lstrip('/')}" for name in store.glob(path))


class RemoteFile(io.RawIOBase):
    """A file elsewhere to read and seek in, as a raw stream for `io.BufferedReader`."""

    def __init__(self, location: str, size: int) -> None:
        self._location, self._size, self._place = location, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = read_range(self._location, self._place, max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def open_location(place: Location) -> IO[bytes]:
    """A file here or elsewhere, to be read from its beginning.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(place, Path):
        return open_regular(place)
    return io.BufferedReader(RemoteFile(place, version(place)[0]), BLOCK)


def _is_http(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def _content(headers: HTTPMessage) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _get(location: str, offset: int, size: int) -> tuple[HTTPMessage, bytes]:
    """A range over HTTP; what may pass is tried again."""
    request = urllib.request.Request(location, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    for number in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                if answer.status != 206 and not (offset == 0 and answer.status == 200):
                    raise OSError("the server does not give ranges of bytes")
                return answer.headers, answer.read(size)
        except urllib.error.HTTPError as error:
            if error.code < 500 or number == TRIES:
                raise OSError(f"the server answers {error.code} {error.reason}") from None
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if number == TRIES:
                raise OSError(f"the server does not answer: {getattr(error, 'reason', error)}") from None
        time.sleep(WAIT * number)
    raise AssertionError


def _store(location: str) -> tuple[Any, str]:
    """The file system of a location and the path in it.

    Raises:
        UsageError: fsspec, or what it needs for this kind of store, is not installed.
        OSError: the store cannot be reached.
    """
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        store, path = url_to_fs(location)
    except ImportError as error:
        raise UsageError(f"{location} needs fsspec and its package for this store: {error}") from None
    except ValueError as error:
        raise UsageError(f"{location}: {error}") from None
    return store, path
