"""Options of opening a source of images, whichever source it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from lexel.data.files import PIXEL_LIMIT, Decoding
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback


@dataclass(frozen=True)
class OpenOptions:
    """Options of opening a source.

    Attributes:
        split: "train", "validation", "test", or None for everything.
        size: pixels a side at which drawings are rendered; pictures in files keep their own size.
        channels: of the arrays: 3 for RGB, 1 for grey, 4 for RGB and alpha; more where the source holds so many.
        depth: bits a channel, 8 or 16.
        pixel_limit: pictures with more pixels are unreadable.
        max_unreadable: the part of the shards that may be damaged before that is an error.
        progress: called with (done, total) while something is made that is kept: drawings, an index of shards.
    """

    split: str | None = None
    size: int | None = None
    channels: int = 3
    depth: int = 8
    pixel_limit: int = PIXEL_LIMIT
    progress: ProgressCallback | None = None
    max_unreadable: float = 1.0

    @property
    def decoding(self) -> Decoding:
        """Options of decoding files to arrays."""
        return Decoding(self.channels, self.depth, self.pixel_limit)


def parse_query(source: str, query: str, keys: Sequence[str]) -> dict[str, str]:
    """What a location asks for after its `?`: `image=img&label=y`.

    Raises:
        UsageError: a key is none of `keys`, comes twice, or has no value.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    wanted = dict(pairs)
    for key, value in pairs:
        if key not in keys:
            raise UsageError(f"{source} takes no {key!r} after its ?; choose from {', '.join(keys)}")
        if not value:
            raise UsageError(f"{source}: {key} has no value; write {key}=VALUE")
    if len(wanted) < len(pairs):
        raise UsageError(f"{source}: a key is given twice in {query!r}")
    return wanted


def whole_number(wanted: Mapping[str, str], key: str) -> int | None:
    """The number that a location asks for; None where it asks for none.

    Raises:
        UsageError: it is no whole number from 1.
    """
    text = wanted.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 13 and int(text) > 0):
        raise UsageError(f"{key} must be a whole number from 1, got {text!r}")
    return int(text)
