"""A row of generators: tokens of a tokenizer, a training, samples, and how near they are to real pictures."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexel.arrays import open_arrays
from lexel.codec import Codec
from lexel.compare.run import result_of
from lexel.compare.summary import NETWORK
from lexel.data import ImageSet
from lexel.data.config import DataConfig
from lexel.evaluate import evaluate_samples
from lexel.generators import Generator
from lexel.loading import load_generator, load_tokenizer
from lexel.run_folder import RunFolder
from lexel.runtime import runtime
from lexel.samples import write_samples
from lexel.spacing import evenly_spaced
from lexel.train.generator import train_generator
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.session import Progress

SAMPLES = "samples.npz"
METRICS = ("frechet", "precision_recall")


def encode(tokenizer: Path, out: Path, training: ImageSet, measuring: ImageSet, data: DataConfig, device: str) -> None:
    """The tokens of both sets, once: `out/train` and `out/validation`."""
    for name, images in (("train", training), ("validation", measuring)):
        codec = Codec(load_tokenizer(tokenizer), runtime(device), data.make_transform(), batch_size=32)
        codec.encode(images, out / name)


def train_and_measure_generator(
    name: str,
    recipe: GeneratorRecipe,
    folder: Path,
    measuring: ImageSet,
    sampling: Mapping[str, Any],
    count: int,
    device: str,
    progress: Callable[[Progress], None],
) -> dict[str, Any] | None:
    """Trains a generator, samples `count` images and measures them, or reads its result; None where a signal ended it.

    Images are sampled of the classes of evenly spaced real ones, so that both have the same share of each.
    """

    def measure() -> dict[str, Any]:
        generator = load_generator(folder)
        seconds = sample(generator, folder / SAMPLES, measuring, sampling, count, recipe.train.seed, device)
        measured = evaluate_samples(folder / SAMPLES, measuring, metrics=METRICS, network=NETWORK, device=device)
        validation = [{}, *RunFolder.read(folder).last_lines("validation")][-1]
        return {
            **{key: validation.get(key) for key in ("bits_per_token", "histogram_bits", "loss")},
            "parameters": sum(parameter.numel() for parameter in generator.transformer.parameters()),
            "seconds_per_image": seconds / count,
            "metrics": measured["metrics"],
            "warnings": measured["warnings"],
        }

    return result_of(
        folder,
        recipe,
        {"samples": count, **sampling},
        {"name": name, "kind": recipe.generator.kind},
        lambda: train_generator(recipe, folder, device=device, progress=progress),
        measure,
    )


def sample(
    generator: Generator,
    out: Path,
    measuring: ImageSet,
    settings: Mapping[str, Any],
    count: int,
    seed: int,
    device: str,
) -> float:
    """Writes `count` samples of the classes that the held-out images have; returns the seconds it took."""
    classes = getattr(generator.condition, "classes", None)
    condition: Any = count
    if classes is not None:
        labels = measuring.labels or [0]
        spread = evenly_spaced(len(labels), count)
        condition = [labels[spread[number % len(spread)]] % classes for number in range(count)]
        if measuring.labels is not None:
            known = generator.config.class_names or []
            condition = [known.index(measuring.classes[label]) if known else label for label in condition]
    elif not generator.condition.guided:
        settings = {key: value for key, value in settings.items() if not key.startswith("cfg_")}
    started = time.monotonic()
    write_samples(generator, condition, out, runtime(device), seed=seed, **settings)
    return time.monotonic() - started


def pictures(folder: Path, count: int) -> np.ndarray:
    """The first samples of a row, uint8 (count, H, W, 3)."""
    with open_arrays(folder / SAMPLES) as arrays:
        shown = min(count, arrays.header(shape="N H W C", kind=np.uint8).shape[0])
        return np.stack(list(arrays.rows(range(shown), shape="N H W C", kind=np.uint8)))
