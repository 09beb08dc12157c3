"""Image files of any common kind as arrays of pixels, or an error that says why not."""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from lexel.data.depth import (
    CHANNELS,
    bits_per_sample,
    check_layout,
    colour_samples,
    grey_samples,
    to_channels,
    to_depth,
)
from lexel.data.torchcodec import heic_samples, heic_size, is_heic, is_whole, nvjpeg_pixels
from lexel.errors import UsageError
from lexel.regular import open_regular

# Found by their names, read by their contents: a PNG called .jpg is read as the PNG it is. HEIC, which many phones
# write, is among them where it cannot be read too, so that it is named and not overlooked.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".avif", ".heic", ".heif"}
)
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF"]
if find_spec("PIL.AvifImagePlugin") is not None:  # Pillow 11.3 and later
    FORMATS.append("AVIF")

PIXEL_LIMIT = 150_000_000  # 450 MB decoded; a larger picture is more likely a bomb than a photograph

ORIENTATION_TAG = 0x0112

PNG = b"\x89PNG\r\n\x1a\n"
PNG_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# Chunks of a PNG that are kept beside the critical ones: transparency and orientation, the latter also as text.
PNG_KEPT = (b"tRNS", b"eXIf")
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
EXIF_TEXT = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
TEXT_LIMIT = 2**20  # bytes; Pillow refuses pictures with longer ones

# First bytes of kinds that are read here, and of others that carry the names of pictures.
READ = (
    (b"\xff\xd8\xff", 0, "JPEG"),
    (PNG, 0, "PNG"),
    (b"WEBP", 8, "WebP"),
    (b"BM", 0, "BMP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"II+\0", 0, "TIFF"),
    (b"MM\0+", 0, "TIFF"),
    (b"GIF8", 0, "GIF"),
    (b"ftypavi", 4, "AVIF"),
)
OTHERS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the picture; run git lfs pull"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL is not supported; convert it to JPEG or PNG"),
    (b"\xff\x0a", "JPEG XL is not supported; convert it to JPEG or PNG"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not supported; convert it to JPEG or PNG"),
    (b"8BPS", "Photoshop's format is not supported; convert it to JPEG or PNG"),
    (b"%PDF", "it is a PDF; convert it to JPEG or PNG"),
    (b"\x93NUMPY", "it is a NumPy array; open an .npz file as npz:FILE"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
    (b"<", "it is HTML, SVG or XML, not a picture of pixels"),
)


class UnreadableImage(UsageError):
    """An image that cannot be read: `name` says which, `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # so that it survives the way out of a worker process
        return type(self), (self.name, self.reason)


def first_reason(unreadable: Mapping[str, str]) -> str:
    """The first picture that cannot be used, and why."""
    return next((f"the first, {name}: {reason}" for name, reason in unreadable.items()), "there is none")


@dataclass(frozen=True)
class Decoding:
    """Options of decoding files to arrays.

    Attributes:
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha.
        depth: 8 bits a channel (uint8), or 16 (uint16): files with 8 then give v * 257.
        pixel_limit: a picture with more pixels than this is refused before it is decoded.
        shorter_side: pixels that suffice: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if neither side falls
            below it. Faster, and not the same pixels.
        stored: the pixels as they are stored, neither turned nor laid on white: what published loaders read.
        jpeg_device: the GPU that decodes JPEG files, of `nvjpeg_device`; Pillow decodes those of four components and
            those without an end. Not the same pixels.
    """

    channels: int = 3
    depth: int = 8
    pixel_limit: int = PIXEL_LIMIT
    shorter_side: int | None = None
    stored: bool = False
    jpeg_device: str | None = None


def read_image(
    path: str | Path,
    name: str | None = None,
    pixel_limit: int = PIXEL_LIMIT,
    *,
    channels: int = 3,
    depth: int = 8,
    shorter_side: int | None = None,
    stored: bool = False,
) -> np.ndarray:
    """The picture in a file, upright and in colour: uint8 (H, W, 3).

    Turned as its EXIF orientation says; transparency lies on white; 16-bit values v become round(v / 257); the first
    frame of an animation or a multi-page file. Colour profiles are not applied.

    Args:
        path: the file.
        name: what to call it in an error; the path itself by default.
        pixel_limit, channels, depth, shorter_side, stored: see `Decoding`.

    Raises:
        UnreadableImage: the file is missing, no regular file, damaged, cut short, too large or of a kind that cannot
            be read.
    """
    name = str(path) if name is None else name
    decoding = Decoding(channels, depth, pixel_limit, shorter_side, stored)
    try:
        with open_regular(path) as file:
            return decode_image(file, name, decoding)
    except OSError as error:
        raise UnreadableImage(name, in_words(error)) from None


def decode_image(file: IO[bytes], name: str, decoding: Decoding = Decoding()) -> np.ndarray:
    """The picture in an open file or a buffer, as `read_image` gives it.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    start = file.read(32)
    try:
        if start.startswith(PNG):
            file = io.BytesIO(without_metadata(start + file.read()))
        file.seek(0)
        try:
            # Pillow warns of oddities in the metadata of pictures that it reads well: nothing a user could act on.
            with warnings.catch_warnings(action="ignore"), _open(file) as image:
                _check_size(*image.size, name, decoding)
                if decoding.jpeg_device is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
                    file.seek(0)
                    if is_whole(data := file.read()):
                        return _nvjpeg(data, image, decoding.jpeg_device, decoding)
                return _pixels(image, file, decoding)
        except UnidentifiedImageError:
            if not is_heic(start):
                raise
            file.seek(0)
            return _heic(file.read(), name, decoding)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(name, _why_unknown(start)) from None
    except MemoryError:
        raise UnreadableImage(name, "there is not enough memory to decode it") from None
    except Exception as error:  # noqa: BLE001 - decoders raise what they like on damaged files, RuntimeError and SyntaxError too
        raise UnreadableImage(name, in_words(error)) from None


def _check_size(width: int, height: int, name: str, decoding: Decoding) -> None:
    if width * height > decoding.pixel_limit:
        raise UnreadableImage(
            name,
            f"{width} x {height} pixels are more than the limit of {decoding.pixel_limit:,}; make it smaller, "
            "or raise the limit: data.pixel_limit in a recipe, --pixel-limit of a command",
        )


def _heic(data: bytes, name: str, decoding: Decoding) -> np.ndarray:
    _check_size(*heic_size(data), name, decoding)
    return _fitted(heic_samples(data, decoding.depth), 1, decoding)


def _nvjpeg(data: bytes, header: Image.Image, device: str, decoding: Decoding) -> np.ndarray:
    pixels = nvjpeg_pixels(data, header.mode == "L", device)
    if pixels.shape[1::-1] != header.size:
        raise ValueError(f"nvJPEG gave an array of {pixels.shape} for {header.width} x {header.height} pixels")
    image = _converted(Image.fromarray(pixels), decoding)
    return to_depth(_upright(image, 1 if decoding.stored else _orientation(header)), decoding.depth)


def _open(file: IO[bytes]) -> Image.Image:
    # The header is read without Pillow's own limit on pixels, a warning: ours is checked right after, an error.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _pixels(image: Image.Image, file: IO[bytes], decoding: Decoding) -> np.ndarray:
    check_layout(image)
    if decoding.shorter_side is not None and image.format == "JPEG":
        image.draft(None, (decoding.shorter_side, decoding.shorter_side))
    transparent = image.info.get("transparency")
    samples = colour_samples(image, file, FORMATS)
    if samples is None:
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            samples = grey_samples(image)[..., None]
        elif image.mode in ("I", "F"):
            bits = bits_per_sample(image)
            raise ValueError(
                f"{bits}-bit signed or floating-point pixels (mode {image.mode}) do not say which value is white; "
                "save it with 8 or 16 bits"
            )
    orientation = 1 if decoding.stored else _orientation(image)  # after loading, which turns TIFF files already
    if samples is not None and transparent is not None and image.format == "PNG":  # one colour of 16 bits
        opaque = (samples != np.array(transparent, np.uint16)).any(-1, keepdims=True)
        samples = np.concatenate([to_channels(samples, 3), opaque.astype(np.uint16) * np.uint16(65535)], -1)
    if samples is None or image.mode == "CMYK":
        if samples is not None:
            image = Image.fromarray(to_depth(samples, 8), "CMYK")
        return to_depth(_upright(_converted(image, decoding), orientation), decoding.depth)
    return _fitted(samples, orientation, decoding)


def _fitted(samples: np.ndarray, orientation: int, decoding: Decoding) -> np.ndarray:
    """Samples (H, W, C) with the channels and bits that are wanted, turned upright."""
    if decoding.channels != 4 and samples.shape[-1] == 4:
        if decoding.depth == 8:  # as for files of 8 bits
            return _upright(_converted(Image.fromarray(to_depth(samples, 8), "RGBA"), decoding), orientation)
        samples = samples[..., :3] if decoding.stored else samples
    return _turned(to_depth(to_channels(samples, decoding.channels), decoding.depth), orientation)


def _converted(image: Image.Image, decoding: Decoding) -> Image.Image:
    """An image of 8 bits with so many channels; without alpha, transparency lies on white unless it is `stored`."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if decoding.channels != 4 and decoding.stored:
            image = image.convert("RGB")
        elif decoding.channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    mode = CHANNELS[decoding.channels]
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image, orientation: int) -> np.ndarray:
    """The pixels (H, W, C) of an image, turned upright."""
    array = np.array(image)
    return _turned(array if array.ndim == 3 else array[..., None], orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, C) turned upright by the number that EXIF gives."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; viewers ignore EXIF data that is damaged, and so do we."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - as for decoders: whatever is raised, it is about metadata
        return 1


def without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that no pixel needs: texts, profiles, dates, whose damage or length would refuse it.

    Transparency stays, and EXIF data, since it holds the orientation. What comes after a chunk that is cut short stays
    as it is.

    Raises:
        ValueError: a chunk that the pixels need has another checksum than its bytes. Pillow does not look at that of
            the pixels, and gives others where their stream happens to last long enough.
    """
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if end > len(data):
            break
        body = data[place + 8 : end - 4]
        if (
            kind.upper() in PNG_NEEDED
            and zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]
        ):
            raise ValueError(f"its {kind.decode()} is damaged: the checksum is not that of its bytes")
        if kind[:1].isupper() or kind in PNG_KEPT or (kind in PNG_TEXT and _is_exif(kind, body)):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _is_exif(kind: bytes, body: bytes) -> bool:
    """Whether a PNG's text holds EXIF data, not too long for Pillow."""
    if not body.startswith(EXIF_TEXT) or len(body) > TEXT_LIMIT:
        return False
    if kind == b"tEXt":
        return True
    packed = body[body.index(b"\0") + 2 :] if kind == b"zTXt" else body[body.index(b"\0") + 5 :]
    if kind == b"iTXt" and body[body.index(b"\0") + 1 : body.index(b"\0") + 2] != b"\1":
        return True
    try:
        return len(zlib.decompressobj().decompress(packed, TEXT_LIMIT)) < TEXT_LIMIT
    except zlib.error:
        return False


def _why_unknown(start: bytes) -> str:
    """The reason for a file that Pillow does not recognise, by its first bytes."""
    if not start:
        return "the file is empty"
    if not start.strip(b"\0"):
        return "the file begins with zero bytes: it was not written to its end"
    for magic, place, kind in READ:
        if start[place:].startswith(magic):
            if kind == "AVIF" and "AVIF" not in FORMATS:
                return "AVIF needs Pillow 11.3 or later"
            return f"it is a {kind} file that is damaged, cut short or of a layout that cannot be read"
    for magic, reason in OTHERS:
        if start.lstrip().startswith(magic):
            return reason
    return "it is no image of a known kind (JPEG, PNG, WebP, BMP, TIFF, GIF)"


def in_words(error: BaseException) -> str:
    """The reason that an exception gives, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())
