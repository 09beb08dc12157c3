"""Lexel's evaluation beside torchmetrics on the same files, metrics and network: processor time, and the values.

The pictures are OpenMoji drawings as PNG files, and the same blurred by a stand-in for a tokenizer, so that no network
but the metric's takes part. Both read the files with Pillow, in this process, round to 8 bits and use the same weights;
Lexel also takes fingerprints, intervals and the state that an interrupted evaluation goes on from. Both compute SSIM
with Wang's window; torchmetrics in float32 and with the windows that reach over mirrored borders.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import results
from lexel.data import open_images
from lexel.evaluate import evaluate_samples, evaluate_tokenizer
from lexel.networks.features import FeatureNetwork
from lexel.token_spec import TokenSpec

BATCH = 32
NETWORK = "efficientnet_lite0"


class Blur(nn.Module):
    """A tokenizer as far as an evaluation can see, that costs nothing: its pictures are the last ones, blurred."""

    def encode(self, images: Tensor) -> Tensor:
        self.seen = blurred(images)
        return torch.zeros(len(images), 1, 1, dtype=torch.int64)

    def decode(self, indices: Tensor) -> Tensor:
        return self.seen

    def token_spec(self, height: int, width: int) -> TokenSpec:
        return TokenSpec(((1, 1),), 1)

    def fingerprint(self) -> str:
        return "blur"


class Pooled(nn.Module):
    """The features of uint8 images, as torchmetrics asks for them."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.num_features = network, network.dims

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.network(images / 127.5 - 1).pooled
        return pooled


def blurred(images: Tensor) -> Tensor:
    """Means of 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, 1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the page to write the table to")


def make(folder: Path, count: int, size: int) -> None:
    """PNG files: `real`, and `blurred`, rounded."""
    drawings = open_images("openmoji", size=size)
    for name in ("real", "blurred"):
        (folder / name).mkdir()
    for number in range(count):
        pixels = drawings.read(number)
        Image.fromarray(pixels).save(folder / "real" / f"{number:05}.png")
        soft = blurred(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double())[0].round()
        Image.fromarray(soft.permute(1, 2, 0).to(torch.uint8).numpy()).save(folder / "blurred" / f"{number:05}.png")


def batches(folder: Path) -> Iterator[Tensor]:
    """All files of a folder, uint8 (B, 3, H, W)."""
    files = sorted(folder.glob("*.png"))
    for first in range(0, len(files), BATCH):
        arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files[first : first + BATCH]]
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def pairs_by_lexel(folder: Path, size: int) -> dict[str, float]:
    """PSNR and SSIM of an evaluation."""
    told = evaluate_tokenizer(
        Blur(), folder / "real", "lexel", size=size, metrics=("psnr", "ssim"), batch_size=BATCH, device="cpu"
    )
    return {name: told["metrics"][name] for name in ("psnr", "ssim")}


def pairs_by_torchmetrics(folder: Path, size: int) -> dict[str, float]:
    """PSNR and SSIM of torchmetrics, the means of images."""
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    for pixels in batches(folder / "real"):
        images = pixels / 255
        soft = (blurred(images) * 255).round() / 255
        psnr.update(soft, images)
        ssim.update(soft, images)
    similarity = ssim.compute()
    assert isinstance(similarity, Tensor)
    return {"psnr": float(psnr.compute()), "ssim": float(similarity)}


def distance_by_lexel(folder: Path, size: int) -> dict[str, float]:
    """The Fréchet distance of an evaluation; its cache of reference statistics is not used."""
    told = evaluate_samples(
        folder / "blurred", folder / "real", "lexel", metrics=("frechet",), network=NETWORK, batch_size=BATCH,
        device="cpu", cache=False,
    )  # fmt: skip
    return {f"fd_{NETWORK}": told["metrics"][f"fd_{NETWORK}"]}


def distance_by_torchmetrics(folder: Path, size: int) -> dict[str, float]:
    """The Fréchet distance of torchmetrics in the same network."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from lexel import networks

    distance = FrechetInceptionDistance(feature=Pooled(networks.build(NETWORK, resize="clean")))
    for name, real in (("real", True), ("blurred", False)):
        for pixels in batches(folder / name):
            distance.update(pixels, real=real)
    return {f"fd_{NETWORK}": float(distance.compute())}


WORK: dict[str, tuple[Callable[[Path, int], dict[str, float]], ...]] = {
    "PSNR and SSIM": (pairs_by_lexel, pairs_by_torchmetrics),
    "Fréchet distance": (distance_by_lexel, distance_by_torchmetrics),
}


def measured(folder: Path, size: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of processor seconds, of runs that take turns, and the values."""
    found: dict[str, dict[str, Any]] = {}
    for name, sides in WORK.items():
        taken: list[list[float]] = [[], []]
        values: list[dict[str, float]] = [{}, {}]
        for turn in range(repeats + 1):
            for side, work in enumerate(sides):
                begun = time.process_time()
                values[side] = work(folder, size)
                if turn:  # the first loads what is loaded once
                    taken[side].append(time.process_time() - begun)
        found[name] = {"seconds": [round(statistics.median(one), 3) for one in taken], "values": values}
    return found


def section(figures: dict[str, Any]) -> list[str]:
    """The table of RESULTS.md."""
    lines = [
        "## Evaluation beside torchmetrics",
        "",
        f"{figures['machine']}, commit {figures['commit']}, torchmetrics {figures['torchmetrics']},"
        f" `python -m benchmarks evaluation`: {figures['pictures']:,} PNG files of {figures['size']} px read, blurred"
        f" and measured; processor seconds, medians of {figures['repeats']} runs that take turns. The same network and"
        " rounding on both sides; torchmetrics' SSIM is float32 and mirrors borders.",
        "",
        "| metrics | Lexel | torchmetrics | of its time | values of Lexel | of torchmetrics |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in figures["work"].items():
        ours, theirs = one["seconds"]
        told = [", ".join(f"{value:.4f}" for value in values.values()) for values in one["values"]]
        lines.append(f"| {name} | {ours:.2f} s | {theirs:.2f} s | {ours / theirs:.2f} | {told[0]} | {told[1]} |")
    return lines


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it with --out."""
    try:
        import torchmetrics
    except ImportError:
        raise SystemExit("pip install torchmetrics") from None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.pictures, arguments.size)
        work = measured(Path(folder), arguments.size, arguments.repeats)
    figures = {
        "machine": results.machine("cpu", 1),
        "commit": results.commit(),
        "torchmetrics": torchmetrics.__version__,
        "pictures": arguments.pictures,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "work": work,
    }
    results.show(arguments.out, "evaluation", figures, section(figures))
