"""Image files of any common kind as uint8 RGB arrays, or a clear word on why not."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from lexel.errors import UsageError

# Found by their names, read by their contents: a PNG called .jpg is read as the PNG it is. HEIC cannot be read here,
# but it must be named as unreadable, not overlooked: it is what many phones write.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".avif", ".heic", ".heif"}
)
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF"]
if find_spec("PIL.AvifImagePlugin") is not None:  # Pillow 11.3 and later
    FORMATS.append("AVIF")

PIXEL_LIMIT = 150_000_000  # 450 MB decoded; a larger picture is more likely a bomb than a photograph

# What Pillow's decoders raise on damaged files: they are many, and each has its own ideas.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# EXIF orientation: the operation that puts the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG = 0x0112


class UnreadableImage(UsageError):
    """An image that cannot be read: `name` says which, `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # so that it survives the way out of a worker process
        return type(self), (self.name, self.reason)


def find_images(folder: str | Path) -> list[str]:
    """Paths of the image files below a folder, relative to it, with forward slashes, in an order that never changes.

    Hidden files and folders are left out; links to files and folders are followed, each folder once.
    """
    folder = Path(folder)
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder, set()))


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link that leads back to where we have been
        return
    seen.add((status.st_dev, status.st_ino))
    try:
        # Real folders come before links to folders, so that a picture goes by its real path where it has one.
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
    except PermissionError as error:
        raise UsageError(f"{folder} cannot be opened: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(Path(entry.path), seen)
        elif Path(entry.name).suffix.lower() in EXTENSIONS and _may_be_file(entry):
            yield Path(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """False for pipes and devices, which could block for ever; a broken link is a picture that cannot be read."""
    try:
        return entry.is_file() or not Path(entry.path).exists()
    except OSError:
        return True


def read_image(path: str | Path, name: str | None = None, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """The picture in a file, upright and in colour: uint8 (H, W, 3).

    Turned as its EXIF orientation says; transparency lies on white; 16-bit values v become round(v / 257); the first
    frame of an animation or a multi-page file. Colour profiles are not applied.

    Args:
        path: the file.
        name: what to call it in an error; the path itself by default.
        pixel_limit: a picture with more pixels than this is refused before it is decoded.

    Raises:
        UnreadableImage: the file is missing, damaged, cut short, too large or of a kind that cannot be read.
    """
    name = str(path) if name is None else name
    try:
        # Pillow warns of oddities in the metadata of pictures that it reads well: nothing a user could act on.
        with warnings.catch_warnings(action="ignore"), _open(Path(path)) as image:
            width, height = image.size
            if width * height > pixel_limit:
                raise UnreadableImage(
                    name, f"{width} x {height} pixels are more than the limit of {pixel_limit:,}; raise pixel_limit"
                )
            image.load()
            orientation = _orientation(image)
            rgb = _as_rgb(image)
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage(name, "no such file") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage(name, _why_unknown(Path(path))) from None
    except DAMAGE as error:
        raise UnreadableImage(name, _in_words(error)) from None
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    return np.array(rgb)


def _open(path: Path) -> Image.Image:
    # The header is read without Pillow's own limit on pixels, a warning: ours is checked right after, an error.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; viewers ignore EXIF data that is damaged, and so do we."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGE:
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16 bits of grey
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"32-bit pixels (mode {image.mode}) do not say which value is white; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _why_unknown(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        return _in_words(error)
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC is not supported; convert it to JPEG or PNG"
    return "it is no image of a known kind (JPEG, PNG, WebP, BMP, TIFF, GIF)"


def _in_words(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())
