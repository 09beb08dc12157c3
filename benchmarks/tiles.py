"""Pictures in overlapping tiles beside whole ones: what changes, what is seen where tiles meet, and the memory."""

import argparse
import ctypes
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import lexel
from benchmarks import results
from benchmarks.memory import resident
from lexel.data import open_images, to_images
from lexel.tiling import Reach, Tiled
from lexel.tokenizer import Tokenizer


class Row(NamedTuple):
    """Medians over the pictures."""

    overlap: int  # pixels
    equal: float  # share of the codes that are the whole picture's
    psnr: float  # dB, of the pictures decoded in tiles against those decoded whole, from the same codes
    seam: float  # step across the tiles' borders, relative to the whole picture's step there
    quality: float  # dB, of the reconstruction in tiles against the picture


def psnr(first: Tensor, second: Tensor) -> float:
    """dB between images in [-1, 1]; infinite where they are equal to 8 bits of a byte."""
    error = (first - second).square().mean().item() / 4
    return float("inf") if error < 1e-12 else -10 * float(np.log10(error))


def steps(images: Tensor, places: list[int]) -> float:
    """Mean step from each column to the one before it, at these columns."""
    return sum((images[..., place] - images[..., place - 1]).abs().mean().item() for place in places) / len(places)


def measured(tiled: Tiled, pictures: list[Tensor]) -> Row:
    """One overlap, over all pictures."""
    model, rows = tiled.tokenizer, []
    for images in pictures:
        tokens = model.encode(images)
        whole, decoded = model.decode(tokens), tiled.decode(tokens)
        seams = [first * tiled.factor for first, _ in tiled.tiles(images.shape[-1] // tiled.factor)[1:]]
        own = tiled.encode(images)
        equal = (own == tokens).float().mean().item()
        rows.append(
            (equal, psnr(decoded, whole), steps(decoded, seams) / steps(whole, seams), psnr(tiled.decode(own), images))
        )
    return Row(tiled.overlap, *(statistics.median(values) for values in zip(*rows, strict=True)))


def peak(model: Tokenizer | Tiled, images: Tensor) -> float:
    """MiB beyond the picture that encoding, and decoding strip by strip, hold at most."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier pictures left would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    indices = model.encode(images)
    for _ in model.decode_rows(indices) if isinstance(model, Tiled) else [model.decode(indices)]:
        pass
    return (resident("VmHWM") - before) / 1024


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run, a folder or a published tokenizer")
    parser.add_argument("--data", required=True, help="pictures larger than a tile")
    parser.add_argument("--images", type=int, default=8, help="of them")
    parser.add_argument("--tile", type=int, default=256, help="pixels of a side")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of overlaps, and the memory of a large picture."""
    torch.set_num_threads(1)
    model = lexel.load(arguments.model)
    if not isinstance(model, Tokenizer) or model.downsampling is None:
        raise SystemExit(f"{arguments.model} is no tokenizer whose tokens have a place in the picture")
    model.eval()
    images = open_images(arguments.data, channels=model.channels)
    pictures = [
        model.pad(to_images(np.asarray(images.read(number))[None]))
        for number in range(min(arguments.images, len(images)))
    ]
    tiled = Tiled(model, arguments.tile)
    seen = [told(reach, tiled.factor) for reach in (tiled.encoder_reach, tiled.decoder_reach)]
    print(f"{arguments.model}: a latent looks {seen[0]}, a pixel {seen[1]}; {results.machine('cpu', 1)}")
    quality = statistics.median(psnr(model.decode(model.encode(images)), images) for images in pictures)
    print(f"whole pictures: {quality:.2f} dB against the picture")
    overlaps = sorted({0, arguments.tile // 16, arguments.tile // 8, arguments.tile // 4, tiled.overlap})
    fitting = [overlap for overlap in overlaps if overlap % tiled.factor == 0]
    print("\n".join(table([measured(Tiled(model, arguments.tile, overlap), pictures) for overlap in fitting])))
    for times in (1, 2, 4):
        large = pictures[0].repeat(1, 1, times, times)
        held = [f"{peak(one, large):,.0f} MiB {how}" for one, how in ((tiled, "in tiles"), (model, "whole"))]
        print(f"{large.shape[-1]} x {large.shape[-2]} pixels: {', '.join(held)}")


def told(reach: Reach | None, factor: int) -> str:
    """How far a reach goes, in words."""
    return "over the whole picture" if reach is None else f"{factor * max(reach)} pixels far"


def table(rows: list[Row]) -> list[str]:
    """The lines of a table."""
    lines: list[Any] = [
        "| overlap, px | codes as of the whole | decoded against the whole | step at the seams, times the whole's | "
        "reconstruction against the picture |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row.overlap} | {100 * row.equal:.2f} % | {row.psnr:.1f} dB | {row.seam:.3f} | {row.quality:.2f} dB |"
        for row in rows
    ]
