"""Pictures of any number of channels and either depth, resized by Pillow."""

from typing import Self

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Planes:
    """A picture (H, W, C), as Pillow's RGB image where it is one, else channel by channel.

    uint16 is resized in float32 and rounded at the end; alpha is a channel like the others.

    Args:
        array: uint8 or uint16 (H, W, C).
    """

    def __init__(self, array: np.ndarray) -> None:
        self.dtype = array.dtype
        if array.dtype == np.uint8 and array.shape[-1] == 3:
            self.images = [Image.fromarray(array)]
        else:
            kind = np.uint8 if array.dtype == np.uint8 else np.float32
            self.images = [
                Image.fromarray(np.ascontiguousarray(array[..., channel], kind)) for channel in range(array.shape[-1])
            ]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.images[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def resize(self, size: tuple[int, int], resample: Image.Resampling, box: Box | None = None) -> Self:
        """The part in `box`, or all, at another width and height; see `PIL.Image.Image.resize`."""
        return self._with([image.resize(size, resample, box=box) for image in self.images])

    def crop(self, box: tuple[int, int, int, int]) -> Self:
        """A part: left, top, right, bottom."""
        return self._with([image.crop(box) for image in self.images])

    def array(self) -> np.ndarray:
        """The pixels (H, W, C), of the type they had."""
        if len(self.images) == 1 and self.images[0].mode == "RGB":
            return np.asarray(self.images[0])
        planes = np.stack([np.asarray(image) for image in self.images], -1)
        return planes if planes.dtype == self.dtype else planes.round().clip(0, 65535).astype(self.dtype)

    def _with(self, images: list[Image.Image]) -> Self:
        other = object.__new__(type(self))
        other.dtype, other.images = self.dtype, images
        return other
