"""Options of opening a source of images, whichever source it is."""

from dataclasses import dataclass

from lexel.data.files import PIXEL_LIMIT, Decoding
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
