"""PSNR and SSIM, with every convention that published numbers differ by.

Images are float (B, 3, H, W) in [-1, 1] and are clamped. Both metrics are computed on the scale [0, 1], in float64, one
value an image. SSIM is Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lexel.errors import UsageError, unknown

# How images in [-1, 1] come to stand on [0, 1]: as they are, or as the 8-bit picture that a file would hold.
ROUNDINGS = {
    "float": lambda unit: unit,
    # In the precision of the images, as published code does it: a level that float32 puts just below a whole number
    # falls by one, even in an original that was 8-bit to begin with.
    "truncate": lambda unit: (unit * 255).floor() / 255,
    "round": lambda unit: (unit * 255).round() / 255,
}
CHANNELS = ("rgb", "luma")
WINDOW_SIDES = {"uniform": 7, "gaussian": 11}  # pixels


def on_unit_scale(images: Tensor, rounding: str = "float") -> Tensor:
    """Images in [-1, 1] clamped to [0, 1] and, if asked, to the 256 levels of a file; the shape and type stay."""
    if rounding not in ROUNDINGS:
        raise unknown("rounding", rounding, ROUNDINGS)
    return ROUNDINGS[rounding](((images + 1) / 2).clamp(0, 1))


def divided_in_float64(images: Tensor) -> Tensor:
    """Images (..., H, W) of 8-bit levels v, v / 127.5 - 1 taken in float64 and then rounded to float32.

    The nearest level of each value decides, so that images divided in float32 go in as well.
    """
    levels = torch.arange(256, dtype=torch.float64, device="cpu" if images.device.type == "mps" else images.device)
    table = (levels / 127.5 - 1).to(images.device, torch.float32)
    return table[((images + 1) * 127.5).round().clamp(0, 255).long()]


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], rounded to 8 bits, as they come back from JPEG files of Pillow."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    decoded = []
    for picture in levels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)))
    pixels = torch.from_numpy(np.stack(decoded)).movedim(-1, 1).to(images.device)
    return pixels.to(torch.float32).div_(127.5).sub_(1).to(images.dtype)


def squared_error(images: Tensor, reconstructions: Tensor, rounding: str = "float", channels: str = "rgb") -> Tensor:
    """Mean squared error of each image on the scale [0, 1]: float64 (B,)."""
    a, b = _prepared(images, reconstructions, rounding, channels)
    return (a - b).square().flatten(1).mean(1)


def psnr(images: Tensor, reconstructions: Tensor, rounding: str = "float", channels: str = "rgb") -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 (B,); infinite where nothing differs.

    The mean over images is the published figure; `psnr_of` a mean squared error over the whole set is the pooled one,
    which is lower (Jensen), by 1 dB on ordinary photographs.

    Args:
        rounding: `float`, or the 8-bit levels by `truncate` or `round`.
        channels: `rgb`, or `luma` (the Y of ITU-R BT.601 in [16, 235] / 255).
    """
    return psnr_of(squared_error(images, reconstructions, rounding, channels))


def psnr_of(mean_squared_error: Tensor) -> Tensor:
    """The PSNR in dB of a mean squared error on the scale [0, 1]."""
    return -10 * mean_squared_error.log10()


def ssim(
    images: Tensor,
    reconstructions: Tensor,
    rounding: str = "float",
    channels: str = "rgb",
    window: str = "uniform",
    data_range: float = 1.0,
) -> Tensor:
    """Structural similarity of each image in [-1, 1], float64 (B,): the mean over the windows that lie inside.

    Args:
        rounding: `float`, or the 8-bit levels by `truncate` or `round`.
        channels: `rgb` (each channel alone, then the mean) or `luma`.
        window: `uniform` is 7 x 7 with sample covariance (scikit-image's default), `gaussian` is 11 x 11 with sigma 1.5
            and population covariance (Wang's own; torchmetrics adds the windows that reach over mirrored borders).
        data_range: the range that the two stabilising constants are made for. The images here span 1; published code
            that passes 2 gets far higher values.
    """
    if window not in WINDOW_SIDES:
        raise unknown("SSIM window", window, WINDOW_SIDES)
    a, b = _prepared(images, reconstructions, rounding, channels)
    weights, sample_factor = _window(window)
    if min(a.shape[-2:]) < len(weights):
        raise UsageError(f"SSIM's window needs images of at least {len(weights)} pixels, got {tuple(images.shape)}")
    mean_a, mean_b = _filtered(a, weights), _filtered(b, weights)
    variance_a = sample_factor * (_filtered(a * a, weights) - mean_a * mean_a)
    variance_b = sample_factor * (_filtered(b * b, weights) - mean_b * mean_b)
    covariance = sample_factor * (_filtered(a * b, weights) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def _prepared(images: Tensor, reconstructions: Tensor, rounding: str, channels: str) -> tuple[Tensor, Tensor]:
    if images.shape != reconstructions.shape or images.ndim != 4:
        raise UsageError(
            f"images and reconstructions must both be (B, C, H, W), got {tuple(images.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    if channels not in CHANNELS:
        raise unknown("channels", channels, CHANNELS)
    pair = [_exact(on_unit_scale(side, rounding)) for side in (images, reconstructions)]
    a, b = [_luma(side) for side in pair] if channels == "luma" else pair
    return a, b


def _exact(images: Tensor) -> Tensor:
    """float64 where the device has it: windows of nearly equal pixels lose half their digits in float32."""
    return images.float() if images.device.type == "mps" else images.double()


def _luma(unit: Tensor) -> Tensor:
    red, green, blue = unit.unbind(1)
    return ((65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255).unsqueeze(1)


def _window(window: str) -> tuple[list[float], float]:
    """One axis of the separable window (it sums to 1), and the factor from population to sample covariance."""
    if window == "uniform":
        return [1 / 7] * 7, 49 / 48
    weights = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-5, 6)]
    total = math.fsum(weights)
    return [weight / total for weight in weights], 1.0


def _filtered(planes: Tensor, weights: list[float]) -> Tensor:
    """Every plane of (B, C, H, W) under the window, at the places where it lies inside."""
    for axis in (2, 3):  # shifted slices: convolutions in float64 take five times as long on a CPU
        length = planes.shape[axis] - len(weights) + 1
        slices = [planes.narrow(axis, start, length) for start in range(len(weights))]
        planes = slices[0] * weights[0]
        for weight, part in zip(weights[1:], slices[1:], strict=True):
            planes = planes.add_(part, alpha=weight)
    return planes
