"""Resizes for feature networks: three published rules, which give different numbers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lexel.registry import lookup


def resize(images: Tensor, side: int, rule: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as (B, 3, side, side); their aspect is not kept, as published.

    Args:
        images: float images.
        side: pixels.
        rule: a key of RESIZE.
    """
    return lookup(RESIZE, rule, "resize rule")(images, side)


def _tf1(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear: pixel i looks at i * old / new, with no half-pixel offset."""
    for axis in (-1, -2):
        old = images.shape[axis]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (old / side)
        low = at.long()
        high = (low + 1).clamp(max=old - 1)
        share = (at - low).to(images.dtype)
        if axis == -2:
            share = share[:, None]
        images = torch.lerp(images.index_select(axis, low), images.index_select(axis, high), share)
    return images


def _half_pixel(images: Tensor, side: int) -> Tensor:
    """Bilinear with pixel centres at half integers, no antialiasing: what the PyTorch ports of FID do."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def _clean(images: Tensor, side: int) -> Tensor:
    """Pillow's antialiased bicubic on floats, clipped to the range of images (https://arxiv.org/abs/2104.11222)."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


RESIZE: dict[str, Callable[[Tensor, int], Tensor]] = {"tf1": _tf1, "half_pixel": _half_pixel, "clean": _clean}
