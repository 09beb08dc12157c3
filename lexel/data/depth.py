"""Pixels at the depth that a file stores: 16 bits a channel of PNG and TIFF, TIFF's 9 to 15, channels by number.

Pillow keeps only the upper byte of 16-bit colour. Its unpackers of either byte order are therefore run one after the
other on the same file: each gives one of the two bytes of every sample, whatever the compression or interlacing.
"""

import sys
from typing import IO

import numpy as np
from PIL import Image

BITS, PHOTOMETRIC, SAMPLES, PLANAR = 258, 262, 277, 284  # tags of TIFF
WHITE_IS_ZERO = 0
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # how many, and Pillow's name for them

# Raw modes of Pillow by the byte that they keep of each sample: the ones that give the other byte.
_OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


def bits_per_sample(image: Image.Image) -> int:
    """Bits that the file stores for each channel; 8 where the format knows no more, or Pillow's mode says less."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return max(tags.get(BITS, (1,)))
    return 16 if image.mode.startswith("I;16") or any(";16" in mode for mode in _raw_modes(image)) else 8


def check_layout(image: Image.Image) -> None:
    """Refuses TIFF files that Pillow would decode without an error to other pixels than the file holds.

    Raises:
        ValueError: the samples are signed, lie in separate planes of 16 bits, or are more than the bands of the mode.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    bits, samples = bits_per_sample(image), tags.get(SAMPLES, 1)
    if samples > 4 or samples > 2 > len(image.getbands()):
        raise ValueError(f"TIFF with {samples} channels is not supported; save 1, 3 or 4 of them, or an .npz array")
    if bits > 8 and samples > 1 and tags.get(PLANAR, 1) != 1:
        raise ValueError(f"TIFF with channels in separate planes of {bits} bits is not supported; save it interleaved")


def grey_samples(image: Image.Image) -> np.ndarray:
    """One channel of 9 to 16 bits as uint16 (H, W) of the whole range: v * 65535 / (2^bits - 1), rounded."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", None)
    bits = 16 if tags is None else bits_per_sample(image)
    if bits < 16:
        most = 2**bits - 1
        values = (np.minimum(values, most) * 65535 + most // 2) // most
    if tags is not None and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 65535 - values
    return values.astype(np.uint16)


def colour_samples(image: Image.Image, file: IO[bytes], formats: list[str]) -> np.ndarray | None:
    """Several channels of 16 bits as uint16 (H, W, C), in the order of the image's bands; None for 8-bit files.

    Args:
        image: opened from `file`, not loaded yet.
        file: is read again from its beginning.
        formats: as in `PIL.Image.open`.
    """
    modes = set(_raw_modes(image))
    if image.mode.startswith("I") or not modes or not all(";16" in mode for mode in modes):
        return None
    if modes == {"LA;16B"}:  # both bytes of both channels, as four channels of 8 bits
        pixels = np.asarray(_with_raw_modes(image, {"LA;16B": "RGBA"})).astype(np.uint16)
        grey, alpha = pixels[..., 0] << 8 | pixels[..., 1], pixels[..., 2] << 8 | pixels[..., 3]
        return np.stack([grey, grey, grey, alpha], -1)
    # Alpha that is multiplied into the colours is divided out below, at 16 bits.
    plain = {mode: mode.replace("RGBa", "RGBA") for mode in modes}
    swapped = {mode: _swapped(mode).replace("RGBa", "RGBA") for mode in modes}
    upper = np.asarray(_with_raw_modes(image, plain)).astype(np.uint16)
    file.seek(0)
    with Image.open(file, formats=formats) as again:
        lower = np.asarray(_with_raw_modes(again, swapped))
    samples = upper << 8 | lower
    if any("RGBa" in mode for mode in modes):
        alpha = samples[..., 3:].astype(np.uint64)
        colour = (samples[..., :3].astype(np.uint64) * 65535 + alpha // 2) // np.maximum(alpha, 1)
        samples = np.concatenate([np.minimum(colour, 65535).astype(np.uint16), samples[..., 3:]], -1)
    return samples


def to_depth(pixels: np.ndarray, depth: int) -> np.ndarray:
    """uint8 or uint16 pixels with `depth` bits (8 or 16): v * 257, or round(v / 257)."""
    if depth == 8 and pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if depth == 16 and pixels.dtype == np.uint8:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels (H, W, C) with 1, 3 or 4 channels as that many others.

    Grey is repeated for colour and colour is weighed for grey as Pillow's mode L does (0.299 R + 0.587 G + 0.114 B).
    Transparency lies on white where the result has no alpha; a new alpha is opaque.

    Raises:
        ValueError: one of the two numbers is not 1, 3 or 4, and they differ.
    """
    given = pixels.shape[-1]
    if given == channels:
        return pixels
    if given not in CHANNELS or channels not in CHANNELS:
        raise ValueError(f"the pixels have {given} channels, and there is no rule that makes {channels} of them")
    most = np.iinfo(pixels.dtype).max
    if given == 4:
        values, alpha = pixels[..., :3].astype(np.uint64), pixels[..., 3:].astype(np.uint64)
        pixels = ((values * alpha + most * (most - alpha) + most // 2) // most).astype(pixels.dtype)
    elif given == 1:
        pixels = np.repeat(pixels, 3, -1)
    if channels == 1:
        weights = np.array([19595, 38470, 7471], np.uint64)  # of 65536
        return (((pixels.astype(np.uint64) * weights).sum(-1, keepdims=True) + 0x8000) >> 16).astype(pixels.dtype)
    if channels == 4:
        return np.concatenate([pixels, np.full_like(pixels[..., :1], most)], -1)
    return pixels


def _raw_modes(image: Image.Image) -> list[str]:
    """Pillow's raw modes of a file's samples: one for each tile."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    firsts = [one[0] if isinstance(one, tuple) and one else one for one in arguments]
    return [one for one in firsts if isinstance(one, str)]


def _swapped(mode: str) -> str:
    name, depth = mode.split(";")
    return f"{name};{_OTHER_BYTE[depth]}"


def _with_raw_modes(image: Image.Image, modes: dict[str, str]) -> Image.Image:
    """The image, decoded with other raw modes in place of its own."""
    tiles = []
    for name, extents, offset, arguments in image.tile:  # type: ignore[attr-defined]
        arguments = (modes[arguments[0]], *arguments[1:]) if isinstance(arguments, tuple) else modes[arguments]
        tiles.append((name, extents, offset, arguments))
    image.tile = tiles  # type: ignore[attr-defined]
    image.load()
    return image
