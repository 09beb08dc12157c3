"""Pictures on their way in and out: uploads, bounded in bytes and pixels, and images as addresses a page can show."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from lexel.data import UnreadableImage, to_display
from lexel.data.files import Decoding, decode_image
from lexel.errors import UsageError

UPLOAD_BYTES = 20_000_000
UPLOAD_PIXELS = 50_000_000
WHOLE_PIXELS = 512 * 512  # a whole picture with more is made smaller before it is tokenized


def read_upload(data: bytes, channels: int = 3) -> np.ndarray:
    """The picture in an upload, upright: uint8 (H, W, channels).

    Raises:
        UsageError: it is empty, has too many pixels, or is no picture that can be read.
    """
    if not data:
        raise UsageError("no picture arrived; choose a JPEG, PNG or WebP file")
    try:
        return decode_image(io.BytesIO(data), "the picture", Decoding(channels, pixel_limit=UPLOAD_PIXELS))
    except UnreadableImage as error:
        reason = error.reason
        if "more than the limit" in reason:
            reason = f"it has more than {UPLOAD_PIXELS:,} pixels; make it smaller"
        raise UsageError(f"the picture cannot be read: {reason}") from None


def at_most(array: np.ndarray, pixels: int) -> np.ndarray:
    """A picture (H, W, C) reduced, antialiased, to at most so many pixels; its proportions stay."""
    height, width, channels = array.shape
    if height * width <= pixels:
        return array
    scale = (pixels / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    planes = [
        np.asarray(Image.fromarray(array[..., channel]).resize(size, Image.Resampling.LANCZOS))
        for channel in range(channels)
    ]
    return np.stack(planes, axis=-1)


def png(array: np.ndarray) -> bytes:
    """A picture (H, W, C) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(to_display(array[None])[0]).save(buffer, format="PNG")
    return buffer.getvalue()


def as_address(array: np.ndarray) -> str:
    """A picture (H, W, C) uint8 as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png(array)).decode()


def error_map(original: np.ndarray, reconstruction: np.ndarray, brightest: int = 64) -> np.ndarray:
    """The mean absolute difference over channels as colours, uint8 (H, W, 3), up to `brightest` levels."""
    import matplotlib

    difference = np.abs(original.astype(np.float32) - reconstruction.astype(np.float32)).mean(-1) / brightest
    colours: Any = matplotlib.colormaps["magma"](difference.clip(0, 1))
    return (colours[..., :3] * 255).round().astype(np.uint8)


def sheet(patches: np.ndarray, columns: int = 16) -> np.ndarray:
    """Patches (N, h, w, C) in rows of `columns`, without gaps: one picture instead of N."""
    count, height, width, channels = patches.shape
    rows = -(-count // columns)
    full = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    full[:count] = patches
    return full.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def drawings(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Made-up drawings of discs, bars and gradients, uint8 (count, size, size, 3): for a studio without pictures."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / max(size - 1, 1)
    pictures = []
    for _ in range(count):
        first, second = generator.random((2, 3)) * 0.6 + 0.4
        angle = generator.random() * 2 * np.pi
        slope = ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) + 0.7) / 1.4
        picture = first * slope[..., None] + second * (1 - slope[..., None])
        for _ in range(int(generator.integers(1, 4))):
            centre, radius, colour = generator.random(2), 0.1 + 0.25 * generator.random(), generator.random(3)
            if generator.random() < 0.6:
                inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
            else:
                inside = (abs(x - centre[0]) < radius) & (abs(y - centre[1]) < radius / 2)
            picture[inside] = colour
        pictures.append(picture)
    return (np.stack(pictures).clip(0, 1) * 255).round().astype(np.uint8)
