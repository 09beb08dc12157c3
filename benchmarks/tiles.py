"""Pictures in overlapping tiles beside whole ones: what changes, what is seen where tiles meet, and the memory."""

import argparse
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
from lexel.tiles import Tiles, reach_of, spans
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


def measured(model: Tokenizer, pictures: list[Tensor], size: int, overlap: int) -> Row:
    """One overlap, over all pictures."""
    tiles, factor = Tiles(size, overlap), model.downsampling
    assert factor is not None
    rows = []
    for images in pictures:
        tokens = model.encode(images)
        whole, tiled = model.decode(tokens), model.decode(tokens, tiles=tiles)
        width = images.shape[-1] // factor
        seams = [span.first * factor for span in spans(width, size // factor, overlap // factor)[1:]]
        own = model.encode(images, tiles)
        equal = (own == tokens).float().mean().item()
        quality = psnr(model.decode(own, tiles=tiles), images)
        rows.append((equal, psnr(tiled, whole), steps(tiled, seams) / steps(whole, seams), quality))
    return Row(overlap, *(statistics.median(values) for values in zip(*rows, strict=True)))


def peak(model: Tokenizer, images: Tensor, tiles: Tiles | None) -> float:
    """MiB beyond the picture that encoding and decoding hold at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    model.decode(model.encode(images, tiles), tiles=tiles)
    return (resident("VmHWM") - before) / 1024


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run, a folder or a published tokenizer")
    parser.add_argument("--data", required=True, help="pictures larger than a tile")
    parser.add_argument("--images", type=int, default=8, help="of them")
    parser.add_argument("--tile", type=int, default=256, help="pixels of a side")
    parser.add_argument("--mosaic", type=int, default=4, help="memory: a picture of so many times so many of the first")


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
    factor, size = model.downsampling, arguments.tile
    reaches = [
        reach_of(model.latents, pictures[0], factor, 1),
        reach_of(
            model.decode_codes,
            model.quantizer.indices_to_codes(model.encode(pictures[0][..., :size, :size])),
            1,
            factor,
        ),
    ]
    seen = ["beyond" if reach is None else f"{reach * factor} px" for reach in reaches]
    print(f"{arguments.model}: the encoder sees {seen[0]}, the decoder {seen[1]}; {results.machine('cpu', 1)}")
    quality = statistics.median(psnr(model.decode(model.encode(images)), images) for images in pictures)
    print(f"whole pictures: {quality:.2f} dB against the picture")
    print("\n".join(table([measured(model, pictures, size, size * part // 16) for part in (0, 1, 2, 4)])))
    large = pictures[0].repeat(1, 1, arguments.mosaic, arguments.mosaic)
    for tiles in (None, Tiles(size)):
        told = "whole" if tiles is None else f"in tiles of {size}"
        print(f"{large.shape[-1]} x {large.shape[-2]} pixels {told}: {peak(model, large, tiles):,.0f} MiB")


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
