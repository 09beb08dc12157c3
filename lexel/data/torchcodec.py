"""Pictures that torchcodec decodes, an optional package: HEIC, which Pillow does not read, and JPEG on a GPU.

torchcodec decodes pictures from version 0.16.0 on. HEIC needs a CUDA build of PyTorch and the system's libheif beside
it. The pixels of nvJPEG are not Pillow's: chroma that is stored at half the size is enlarged by another rule.
"""

import importlib
import os
import re
import struct
from typing import Any

import numpy as np
import torch

from lexel.errors import UsageError

HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
HEIC_SIZE = re.compile(rb"ispe\0{4}(.{8})", re.DOTALL)  # the property that holds the width and height of an image
START_OF_SCAN, END, APP1 = b"\xff\xda", b"\xff\xd9", b"\xe1"  # markers of JPEG
INSTEAD = "leave it out, and Pillow decodes"


def decoder(name: str, what: str, more: str, instead: str) -> Any:
    """A function of torchcodec that decodes pictures.

    Args:
        name: of the function.
        what: needs it, for errors.
        more: that it needs beside torchcodec, and how both are installed.
        instead: what works without.

    Raises:
        UsageError: torchcodec or what it needs is missing.
    """
    try:
        return getattr(importlib.import_module("torchcodec.decoders"), name)
    except (ImportError, AttributeError):
        raise UsageError(f"{what} needs torchcodec 0.16 or later{more}; {instead}") from None
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{what} needs torchcodec, which does not load ({reason}); {instead}") from None


# ---------------------------------------------------------------------------------------------- HEIC


def is_heic(start: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of HEIC, or of another HEIF file."""
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def heic_size(data: bytes) -> tuple[int, int]:
    """Width and height of the largest image that a file says it holds: a whole, its tiles, or blocks beyond its edge.

    Raises:
        ValueError: it says none.
    """
    head, _, _ = data.partition(b"mdat")
    sizes = [struct.unpack(">II", found[1]) for found in HEIC_SIZE.finditer(head)]
    if not sizes:
        raise ValueError("the HEIC file does not say its size: it is damaged or cut short")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height


def heic_samples(data: bytes, depth: int) -> np.ndarray:
    """The first picture of a file, upright: (H, W, 4) of `depth` bits, the last channel its alpha.

    Raises:
        UsageError: torchcodec or what it needs is missing.
        RuntimeError: the file is damaged.
    """
    more = " and libheif (pip install torchcodec, with a CUDA build of PyTorch)"
    decode = decoder("decode_heic", "HEIC", more, "or convert it to JPEG or PNG")
    picture = decode(data, mode="RGB_ALPHA", output_dtype=torch.uint16 if depth == 16 else torch.uint8)
    while picture.ndim > 3:
        picture = picture[0]
    samples: np.ndarray = picture.permute(1, 2, 0).contiguous().numpy()
    return samples


# ---------------------------------------------------------------------------------------------- JPEG


def nvjpeg_device() -> str:
    """The GPU of this process, once it is known that torchcodec can decode JPEG files on it.

    Raises:
        UsageError: there is no CUDA device, or no torchcodec that decodes pictures.
    """
    if not torch.cuda.is_available():
        raise UsageError(f"data.jpeg_decoder = 'nvjpeg' needs a CUDA device; {INSTEAD}")
    _jpeg_decoder()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def nvjpeg_pixels(data: bytes, grey: bool, device: str) -> np.ndarray:
    """The pixels of a JPEG file as they are stored, not turned: uint8 (H, W, 3), or (H, W) of a grey one.

    Args:
        data: the file.
        grey: whether it has a single component.
        device: of `nvjpeg_device`.

    Raises:
        RuntimeError: the file is damaged.
    """
    decoded = _jpeg_decoder()(_without_exif(data), mode="GRAY" if grey else "RGB", device=device)
    pixels: np.ndarray = decoded.cpu().numpy()
    return pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def is_whole(data: bytes) -> bool:
    """Whether a JPEG file has an end after its last scan: nvJPEG may fill what is missing with grey, and not tell."""
    return data.rfind(END) > data.rfind(START_OF_SCAN) >= 0


def _jpeg_decoder() -> Any:
    return decoder("decode_jpeg", "data.jpeg_decoder = 'nvjpeg'", " (pip install torchcodec)", INSTEAD)


def _without_exif(data: bytes) -> bytes:
    """A JPEG file without its APP1 segments, which hold the orientation, by which torchcodec would turn it."""
    kept, place = [data[:2]], 2
    while data[place : place + 1] == b"\xff" and data[place : place + 2] != START_OF_SCAN:
        if data[place + 1 : place + 2] == b"\xff":  # one more before a marker means nothing
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1 : place + 2] != APP1:
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])
