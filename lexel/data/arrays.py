"""Between uint8 arrays (files, reports) and float tensors in [-1, 1] (everything inside)."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.data.depth import to_channels
from lexel.errors import UsageError


def to_images(array: np.ndarray | Tensor) -> Tensor:
    """Pixels (..., H, W, C) as float32 images (..., C, H, W) in [-1, 1], on the device they lie on.

    uint8 becomes x / 127.5 - 1, uint16 x / 32767.5 - 1.
    """
    pixels = torch.from_numpy(np.require(array, requirements=["C", "W"])) if isinstance(array, np.ndarray) else array
    half = {torch.uint8: 127.5, torch.uint16: 32767.5}.get(pixels.dtype)
    if half is None or pixels.ndim < 3:
        raise UsageError(f"pictures must be uint8 or uint16 (..., H, W, C), got {pixels.dtype} {tuple(pixels.shape)}")
    return pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(half).sub_(1)


def to_uint8(images: Tensor, rounding: Literal["round", "truncate"] = "round") -> np.ndarray:
    """Images (..., C, H, W) in [-1, 1] as a uint8 array (..., H, W, C), values outside clamped.

    Rounded to the nearest level, or truncated as some published samplers do, which darkens by half a level on average.
    """
    if rounding == "truncate":
        pixels = images.detach().float().clamp(-1, 1).add_(1).div_(2).mul_(255).floor_()
    else:
        pixels = images.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def to_display(array: np.ndarray) -> np.ndarray:
    """uint8 pixels (..., H, W, C) as RGB for a screen: grey repeated, alpha on white, else the first three channels."""
    channels = array.shape[-1]
    if channels in (1, 4):
        return to_channels(array, 3)
    return array if channels == 3 else np.concatenate([array, array[..., -1:]], -1)[..., :3]


def picture_grid(pictures: np.ndarray, columns: int | None = None, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Pictures (N, H, W, 3), each pixel `scale` wide, in rows of so many columns, on white: uint8 (H', W', 3)."""
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pictures.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


def pad_to_multiple(images: Tensor, factor: int, mode: Literal["edge", "reflect"] = "edge") -> Tensor:
    """Images (..., H, W) made larger at the right and the bottom, so that both sides are multiples of factor.

    "edge" repeats the last row and column and works at any size; "reflect" mirrors the picture and needs sides longer
    than the padding. `crop_back` takes the padding off again.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % factor, -width % factor
    if mode == "reflect" and (bottom >= height or right >= width):
        raise UsageError(
            f"a picture of {height} x {width} is too small to reflect to multiples of {factor}; use 'edge'"
        )
    if bottom == right == 0:
        return images
    flat = images.reshape(-1, 1, height, width)
    padded = F.pad(flat, (0, right, 0, bottom), mode={"edge": "replicate", "reflect": "reflect"}[mode])
    return padded.reshape(*images.shape[:-2], height + bottom, width + right)


def crop_back(images: Tensor, height: int, width: int) -> Tensor:
    """Undoes `pad_to_multiple`: the top left height x width of images (..., H, W)."""
    return images[..., :height, :width]
