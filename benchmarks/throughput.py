"""JPEG files read, encoded and evaluated: images a second of reading alone, of the network alone, and of both.

The pictures are 500 x 375: windows of the photographs in a tar (--photographs), or smooth noise, seeded. The network is
that of a recipe, without training, which takes as long. Workers are those that the commands choose by default. Linux
only: memory is read from /proc.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from lexel import config
from lexel.codec import Codec
from lexel.data import open_images
from lexel.data.batches import default_workers, ordered_batches
from lexel.data.images import ImageSet
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer
from lexel.train.tokenizer import TokenizerRecipe

WIDTH, HEIGHT, QUALITY = 500, 375, 90
METRICS = ("psnr", "ssim", "usage")
BATCH = 32
BAR = 0.9  # of the slower of reading and network


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--photographs", type=Path, help="a tar of photographs, of 500 x 375 or more")
    parser.add_argument("--recipe", default="openmoji", help="whose network is used, without training")
    parser.add_argument("--size", type=int, default=64, help="pixels a side that the network takes")
    parser.add_argument("--threads", type=int, default=1, help="of the network; the other cores read")
    parser.add_argument("--folder", type=Path, help="where the pictures are made and stay; a temporary folder")
    parser.add_argument("--out", type=Path, help="the page to write the table to")


def sources(photographs: Path | None) -> list[Image.Image]:
    """Pictures that are larger than the windows."""
    if photographs is None:
        noise = np.random.default_rng(0).integers(0, 256, (24, 24, 36, 3), np.uint8)
        return [Image.fromarray(one).resize((768, 512), Image.Resampling.BICUBIC) for one in noise]
    with tarfile.open(photographs) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith((".png", ".jpg"))]
        opened = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]
    large = [one for one in opened if one.width >= WIDTH and one.height >= HEIGHT]
    if not large:
        raise UsageError(f"{photographs} has no picture of {WIDTH} x {HEIGHT} or more among its {len(opened):,}")
    return large


def make(folder: Path, count: int, photographs: Path | None) -> None:
    """JPEG files, a thousand a folder; what is there stays."""
    wholes = sources(photographs)
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        whole = wholes[generator.integers(len(wholes))]
        left, top = (int(generator.integers(room + 1)) for room in (whole.width - WIDTH, whole.height - HEIGHT))
        whole.crop((left, top, left + WIDTH, top + HEIGHT)).save(path, quality=QUALITY)


class Kept(ImageSet):
    """A few pictures in memory, again and again, so that reading costs nothing."""

    def __init__(self, pictures: list[np.ndarray], count: int) -> None:
        super().__init__([f"{number:06}" for number in range(count)])
        self._pictures = pictures

    def read(self, number: int) -> np.ndarray:
        return self._pictures[number % len(self._pictures)]


class Memory:
    """The memory of this process and of its children, in MiB, looked at every quarter of a second."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            self.seen.append(proportional())

    def growth(self) -> float:
        """The highest of the last third beyond the highest of the middle third."""
        third = len(self.seen) // 3
        return max(self.seen[-third:]) - max(self.seen[third:-third]) if third else 0.0


def proportional() -> float:
    """MiB of this process and its children; pages that several share are counted once (PSS)."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    total = 0
    for process in (own, *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended since
            continue
        total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / 1024


def rate(count: int, do: Callable[[], Any]) -> tuple[float, float, float]:
    """Images a second, the highest memory, and its growth in the last third."""
    with Memory() as memory:
        begun = time.perf_counter()
        do()
        taken = time.perf_counter() - begun
    return count / taken, max(memory.seen, default=0), memory.growth()


def section(figures: dict[str, Any]) -> list[str]:
    """The table of RESULTS.md."""
    lines = [
        "## Bulk work",
        "",
        f"{figures['machine']}, {figures['cores']} cores, commit {figures['commit']}, `python -m benchmarks"
        f" throughput`: {figures['pictures']:,} JPEG files of {WIDTH} x {HEIGHT},"
        f" {figures['content']}, to {figures['size']} px, the"
        f" network of `{figures['recipe']}` untrained, {figures['workers']} reading processes (the default). Wall time."
        " Memory is of all processes, shared pages counted once; growth is the last third's highest beyond the middle"
        " third's.",
        "",
        "| | images a second | of the slower of reading and network | MiB | grown by |",
        "|---|---|---|---|---|",
    ]
    for name, (speed, memory, growth) in figures["rates"].items():
        part = figures["parts"].get(name)
        share = "" if part is None else f"{speed / min(figures['rates'][one][0] for one in part):.2f}"
        lines.append(f"| {name} | {speed:.0f} | {share} | {memory:.0f} | {growth:.1f} |")
    return lines


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it with --out."""
    torch.set_num_threads(arguments.threads)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = (arguments.folder or Path(scratch)) / "pictures"
        make(folder, arguments.pictures, arguments.photographs)
        figures = measured(arguments, folder, Path(scratch))
    print(json.dumps(figures["rates"]))
    results.show(arguments.out, "throughput", figures, section(figures))


def measured(arguments: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """The rates, one after the other."""
    recipe = config.load(config.find_recipe(arguments.recipe), TokenizerRecipe, [f"data.size={arguments.size}"])
    torch.manual_seed(0)
    tokenizer, where = Tokenizer(recipe.model), runtime("cpu", "float32")
    transform, images = recipe.data.make_transform(), open_images(folder)
    workers, count = default_workers(images, transform), len(images)
    codec = Codec(tokenizer, where, transform, BATCH, workers)
    batch = next(iter(ordered_batches(images, transform, BATCH))).images
    loops = max(count // BATCH // 4, 1)  # the network alone always takes as long

    def read() -> None:
        for _ in ordered_batches(images, transform, BATCH, workers=workers):
            pass

    def encode_alone() -> None:
        for _ in range(loops):
            codec.tokenizer.encode(batch)

    def evaluate(source: Any, limit: int) -> None:
        evaluate_tokenizer(
            tokenizer, source, "lexel", size=arguments.size, metrics=METRICS, batch_size=BATCH, device="cpu",
            workers=workers if source is folder else 0, limit=limit,
        )  # fmt: skip

    few = loops * BATCH
    kept = Kept([transform(images.read(number), None) for number in range(BATCH)], few)
    with torch.no_grad():
        rates = {
            "reading": rate(count, read),
            "encoding, network alone": rate(few, encode_alone),
            "`lexel encode`": rate(count, lambda: codec.encode(folder, scratch / "tokens")),
            "evaluation, network and metrics alone": rate(few, lambda: evaluate(kept, few)),
            "`lexel evaluate`": rate(count, lambda: evaluate(folder, count)),
        }
    content = "smooth noise" if arguments.photographs is None else f"windows of {arguments.photographs.name}"
    return {
        "machine": results.machine("cpu", arguments.threads),
        "cores": len(os.sched_getaffinity(0)),
        "commit": results.commit(),
        "pictures": count,
        "content": content,
        "size": arguments.size,
        "recipe": arguments.recipe,
        "workers": workers,
        "rates": rates,
        "parts": {
            "`lexel encode`": ("reading", "encoding, network alone"),
            "`lexel evaluate`": ("reading", "evaluation, network and metrics alone"),
        },
    }
