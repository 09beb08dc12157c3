"""Named ways to make a square of a picture of any size and shape.

PSNR, LPIPS and FID change with this choice, so it has a name and the name belongs in every result. A transform is
built from a size and called with a uint8 array (H, W, 3) and a `numpy.random.Generator`, or None; it gives a uint8
array (size, size, 3). Other numbers of channels, and uint16, go through in the same way. Without a generator it is
deterministic: crops are centred and nothing is mirrored. With one, crops lie anywhere, edges included, all places
equally likely.
"""

from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from lexel.data.planes import Box, Planes
from lexel.errors import UsageError


class Transform:
    """Base: a size, and a rule that turns uint8 (H, W, 3) into uint8 (size, size, 3)."""

    shrinks: ClassVar[bool] = False  # shows the whole width or height, antialiased: a smaller picture would do
    even: ClassVar[bool] = False  # the centre is rounded to even, as torchvision does, and not down

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UsageError(f"size must be at least 1 pixel, got {size}")
        self.size = size

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        raise NotImplementedError

    def _place(self, height: int, width: int, generator: np.random.Generator | None) -> tuple[int, int]:
        """Top and left of the crop in a picture of height x width."""
        spare = height - self.size, width - self.size
        if generator is None:
            return (round(spare[0] / 2), round(spare[1] / 2)) if self.even else (spare[0] // 2, spare[1] // 2)
        return int(generator.integers(spare[0] + 1)), int(generator.integers(spare[1] + 1))

    def _crop(self, array: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        """The crop of a picture's own pixels."""
        height, width = array.shape[:2]
        top, left = self._place(height, width, generator)
        return np.ascontiguousarray(array[top : top + self.size, left : left + self.size])


class Published(Transform):
    """The published tokenizers' way: the shorter side to `size` by OpenCV's bilinear resize, a crop, no mirroring.

    OpenCV's resize has no antialiasing: each pixel is a mix of the four nearest ones at the half-pixel position, in
    fixed-point numbers of 11 bits. The longer side becomes round(side * size / shorter side), ties to even.
    """

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        height, width = array.shape[:2]
        shorter = min(height, width)
        new_height, new_width = round(height * self.size / shorter), round(width * self.size / shorter)
        top, left = self._place(new_height, new_width, generator)
        # Only the pixels that the crop needs are touched: a photograph of 12 megapixels costs no more than a small one.
        return bilinear(array, new_height, new_width, top, left, self.size)


class Flip(Published):
    """As published, and mirrored left to right every other time when a generator is given."""

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        square = super().__call__(array, generator)
        mirrored = generator is not None and generator.random() < 0.5
        return np.ascontiguousarray(square[:, ::-1]) if mirrored else square


class Adm(Transform):
    """ADM's way, also LlamaGen's and RAR's: halved by box averaging while possible, antialiased bicubic, a crop."""

    shrinks = True

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        image = Planes(array)
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        new_width, new_height = round(image.width * scale), round(image.height * scale)
        top, left = self._place(new_height, new_width, generator)
        return _resized_crop(image, new_height, new_width, top, left, self.size)


class TiTok(Transform):
    """1d-tokenizer's way: the shorter side to `size` by antialiased bicubic, a crop.

    The longer side is rounded down and the centre is rounded to even, as torchvision does.
    """

    shrinks = even = True

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        height, width = array.shape[:2]
        shorter = min(height, width)
        new_height, new_width = self.size * height // shorter, self.size * width // shorter
        top, left = self._place(new_height, new_width, generator)
        return _resized_crop(Planes(array), new_height, new_width, top, left, self.size)


class Crop(Transform):
    """A crop of the picture's own pixels, without resizing (FVQ's way); a smaller picture is first enlarged.

    A side shorter than `size` is brought to it by antialiased bicubic, the shape kept.
    """

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        small = min(array.shape[:2]) < self.size
        return TiTok(self.size)(array, generator) if small else self._crop(array, generator)


class CenterCrop(Transform):
    """torchvision's CenterCrop (FVQ's evaluation): the centre rounded to even, smaller pictures padded with black.

    With a generator: a crop anywhere, of the padded picture.
    """

    even = True

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        lacking = [max(self.size - side, 0) for side in array.shape[:2]]
        if any(lacking):
            array = np.pad(array, [*((each // 2, each - each // 2) for each in lacking), (0, 0)])
        return self._crop(array, generator)


class RandomResized(Transform):
    """A random part of 20 to 100 % of the picture's area, shape 3:4 to 4:3, by antialiased bicubic, mirrored or not.

    Without a generator: as titok.
    """

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        if generator is None:
            return TiTok(self.size)(array)
        height, width = array.shape[:2]
        area = height * width * generator.uniform(0.2, 1)
        shape = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        # A part that would not fit is cut to the picture, instead of being drawn again: always the same few draws.
        part_width, part_height = min(width, (area * shape) ** 0.5), min(height, (area / shape) ** 0.5)
        left, top = generator.uniform(0, width - part_width), generator.uniform(0, height - part_height)
        box = (left, top, left + part_width, top + part_height)
        square = Planes(array).resize((self.size, self.size), Image.Resampling.BICUBIC, box).array()
        return np.ascontiguousarray(square[:, ::-1]) if generator.random() < 0.5 else square


class Stretch(Transform):
    """The whole picture, its shape given up: both sides to `size` by antialiased bicubic."""

    shrinks = True

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        if array.shape[:2] == (self.size, self.size):
            return array
        return Planes(array).resize((self.size, self.size), Image.Resampling.BICUBIC).array()


class Pad(Transform):
    """The whole picture, its shape kept: the longer side to `size` by antialiased bicubic, centred on white."""

    shrinks = True

    def __call__(self, array: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        height, width = array.shape[:2]
        scale = self.size / max(height, width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        image = Planes(array).resize((new_width, new_height), Image.Resampling.BICUBIC)
        square = np.full((self.size, self.size, array.shape[-1]), np.iinfo(array.dtype).max, array.dtype)
        top, left = (self.size - new_height) // 2, (self.size - new_width) // 2
        square[top : top + new_height, left : left + new_width] = image.array()
        return square


TRANSFORMS: dict[str, type[Transform]] = {
    "published": Published,
    "flip": Flip,
    "adm": Adm,
    "titok": TiTok,
    "crop": Crop,
    "center_crop": CenterCrop,
    "random_resized": RandomResized,
    "stretch": Stretch,
    "pad": Pad,
}


def bilinear(array: np.ndarray, height: int, width: int, top: int, left: int, size: int) -> np.ndarray:
    """The size x size crop at (top, left) of array (H, W, C) resized to height x width as OpenCV's INTER_LINEAR does.

    Half-pixel centres, no antialiasing, weights of 11 bits: equal to OpenCV bit for bit for uint8; uint16 is summed
    exactly and rounded once.
    """
    if array.shape[:2] == (height, width):
        return np.ascontiguousarray(array[top : top + size, left : left + size])
    y0, y1, upper_weight, lower_weight = _taps(array.shape[0], height, top, size)
    x0, x1, left_weight, right_weight = _taps(array.shape[1], width, left, size)
    # Across first, once for every row that is needed. torch, since it does integers three times as fast as numpy.
    rows, place = np.unique(np.concatenate([y0, y1]), return_inverse=True)
    upper, lower = torch.from_numpy(place).view(2, size)
    # Bits of the fraction (11, then 22) that are cut from the sum of a row, from each row's part and, rounded, from the
    # sum of both: OpenCV's own steps for uint8, and all at the end for uint16.
    deep = array.dtype == np.uint16
    of_row, of_part, last, kind = (0, 0, 22, torch.int64) if deep else (4, 16, 2, torch.int32)
    lines = torch.from_numpy(array[rows].astype(np.int64) if deep else array[rows])
    across = lines.index_select(1, torch.from_numpy(x0)).to(kind).mul_(torch.from_numpy(left_weight)[:, None])
    across += lines.index_select(1, torch.from_numpy(x1)).to(kind).mul_(torch.from_numpy(right_weight)[:, None])
    across >>= of_row
    mixed = across.index_select(0, upper).mul_(torch.from_numpy(upper_weight)[:, None, None]) >> of_part
    mixed += across.index_select(0, lower).mul_(torch.from_numpy(lower_weight)[:, None, None]) >> of_part
    return ((mixed + 2 ** (last - 1)) >> last).numpy().astype(array.dtype)


def _taps(length: int, new_length: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For pixels start..start+size of a side resized to new_length: two neighbours and the weight (int32) of each."""
    scale = 1 / (new_length / length)
    position = ((np.arange(start, start + size) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    weight = position - first.astype(np.float32)
    weights = [np.rint(part * np.float32(2048)).astype(np.int32) for part in (np.float32(1) - weight, weight)]
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), weights[0], weights[1]


def _resized_crop(image: Planes, height: int, width: int, top: int, left: int, size: int) -> np.ndarray:
    """The crop at (top, left) of an image resized to height x width by antialiased bicubic."""
    if (image.height, image.width) == (height, width) or max(height, width) <= 8 * size:
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        return whole.crop((left, top, left + size, top + size)).array()
    # A long strip, resized as a whole, may not fit in memory. Alone, the crop is the same but for a level of rounding.
    x, y = image.width / width, image.height / height
    box: Box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box).array()
