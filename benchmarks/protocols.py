"""How far the published protocols lie apart on the same pictures and the same tokenizer.

    python -m benchmarks protocols [--patches 1440] [--json FILE]

The tokenizer is as plain as can be, so that anyone can repeat the numbers: the mean of every 4 x 4 pixels as one of
4,096 colours (16 levels of red, green and blue), enlarged again bilinearly. The pictures are the photographs that
scikit-image and foolbox carry, whole at 256 px for PSNR, SSIM, LPIPS and usage, and as patches of 384 px reduced to 128
for the Fréchet distance, which needs more pictures than the network has features.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lexel.data import ImageSet, open_images
from lexel.evaluate import evaluate_tokenizer
from lexel.metrics import PROTOCOLS
from lexel.token_spec import TokenSpec

PATCH = 384


class Palette:
    """A tokenizer without training: 4 x 4 pixels become one of 16 x 16 x 16 colours."""

    def encode(self, images: Tensor) -> Tensor:
        levels = ((F.avg_pool2d(images, 4) + 1) / 2 * 15).round().long().clamp(0, 15)
        return levels[:, 0] * 256 + levels[:, 1] * 16 + levels[:, 2]

    def decode(self, indices: Tensor) -> Tensor:
        levels = torch.stack([indices // 256, indices // 16 % 16, indices % 16], 1)
        return F.interpolate(levels.float() / 15 * 2 - 1, scale_factor=4, mode="bilinear")

    def token_spec(self, height: int, width: int) -> TokenSpec:
        return TokenSpec(((height // 4, width // 4),), 4096)

    def fingerprint(self) -> str:
        return "palette of 4096 colours"


class Patches(ImageSet):
    """Squares cut from photographs at places that the number decides."""

    def __init__(self, photos: ImageSet, count: int) -> None:
        super().__init__([f"patch {number}" for number in range(count)])
        arrays = [photos.read(number) for number in range(len(photos))]
        self._photos = [array for array in arrays if min(array.shape[:2]) >= PATCH]

    def read(self, number: int) -> np.ndarray:
        array = self._photos[number % len(self._photos)]
        generator = np.random.default_rng(number)
        top, left = (int(generator.integers(side - PATCH + 1)) for side in array.shape[:2])
        return array[top : top + PATCH, left : left + PATCH]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patches", type=int, default=1440, help="for the Fréchet distance; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="writes the table there as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    photos = open_images("photos")
    patches = Patches(photos, arguments.patches)
    table: dict[str, dict[str, float]] = {}
    for name, protocol in PROTOCOLS.items():
        whole = evaluate_tokenizer(
            Palette(), photos, protocol, metrics=["psnr", "ssim", "lpips", "usage"], batch_size=9, device="cpu"
        )
        table[name] = dict(whole["metrics"])
        if arguments.patches:
            distances = evaluate_tokenizer(Palette(), patches, protocol, size=128, metrics=["frechet"], device="cpu")
            table[name] |= distances["metrics"]
            interval = distances["intervals"]["fd_efficientnet_lite0"]
            table[name]["fd_standard_error"] = interval["standard_error"]
        print(name, {key: round(value, 4) for key, value in table[name].items()}, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
