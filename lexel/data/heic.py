"""HEIC and HEIF pictures, which Pillow does not read: decoded by torchcodec, an optional package.

torchcodec has decoders of pictures from version 0.16.0 on. They load beside a CUDA build of PyTorch alone, and need the
system's libheif.
"""

import re
import struct

import numpy as np

BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
SIZE = re.compile(rb"ispe\0{4}(.{8})", re.DOTALL)  # the property that holds the width and the height of an image


def is_heic(start: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of HEIC, or of another HEIF file."""
    return start[4:8] == b"ftyp" and start[8:12] in BRANDS


def heic_size(data: bytes) -> tuple[int, int]:
    """Width and height of the largest image that a file says it holds: a whole, its tiles, or blocks beyond its edge.

    Raises:
        ValueError: it says none.
    """
    head, _, _ = data.partition(b"mdat")
    sizes = [struct.unpack(">II", found[1]) for found in SIZE.finditer(head)]
    if not sizes:
        raise ValueError("the HEIC file does not say its size: it is damaged or cut short")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height


def heic_samples(data: bytes, depth: int) -> np.ndarray:
    """The first picture of a file, upright: (H, W, 4) of `depth` bits, the last channel its alpha.

    Raises:
        ValueError: torchcodec or what it needs is missing.
        RuntimeError: the file is damaged.
    """
    try:
        import torch
        from torchcodec.decoders import decode_heic  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "HEIC needs torchcodec 0.16 or later and libheif (pip install torchcodec, with a CUDA build of PyTorch); "
            "or convert it to JPEG or PNG"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"HEIC needs torchcodec, which does not load ({reason}); or convert it to JPEG or PNG"
        ) from None
    picture = decode_heic(data, mode="RGB_ALPHA", output_dtype=torch.uint16 if depth == 16 else torch.uint8)
    while picture.ndim > 3:
        picture = picture[0]
    return picture.permute(1, 2, 0).contiguous().numpy()
