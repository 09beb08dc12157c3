"""JPEG decoded on a GPU by nvJPEG, through torchcodec, an optional package.

torchcodec has `decode_jpeg(..., device="cuda")` from version 0.16.0 on; earlier ones decode no pictures. Its pixels are
not Pillow's: chroma that is stored at half the size is enlarged by another rule.
"""

import os

import numpy as np

from lexel.errors import UsageError

START_OF_SCAN, END, APP1 = b"\xff\xda", b"\xff\xd9", b"\xe1"


def nvjpeg_device() -> str:
    """The GPU of this process, once it is known that torchcodec can decode JPEG files on it.

    Raises:
        UsageError: there is no CUDA device, or no torchcodec that decodes pictures.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError("data.jpeg_decoder = 'nvjpeg' needs a CUDA device; leave it out, and Pillow decodes")
    try:
        from torchcodec.decoders import decode_jpeg  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        raise UsageError(
            "data.jpeg_decoder = 'nvjpeg' needs torchcodec 0.16 or later (pip install torchcodec); leave it out, and "
            "Pillow decodes"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"data.jpeg_decoder = 'nvjpeg' needs torchcodec, which does not load ({reason}); leave it out, and Pillow "
            "decodes"
        ) from None
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
    from torchcodec.decoders import decode_jpeg

    pixels: np.ndarray = decode_jpeg(_without_exif(data), mode="GRAY" if grey else "RGB", device=device).cpu().numpy()
    return pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def is_whole(data: bytes) -> bool:
    """Whether a JPEG file has an end after its last scan: nvJPEG may fill what is missing with grey, and not tell."""
    return data.rfind(END) > data.rfind(START_OF_SCAN) >= 0


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
