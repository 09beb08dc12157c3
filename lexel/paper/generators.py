"""A row of generators: tokens of a tokenizer, a training, samples, and how near they are to real pictures."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexel.arrays import open_arrays
from lexel.checkpoint import read_json
from lexel.codec import Codec
from lexel.compare.plan import as_table
from lexel.compare.run import RESULT, earlier_result
from lexel.compare.summary import NETWORK
from lexel.config import Config
from lexel.data import ImageSet
from lexel.data.config import DataConfig
from lexel.evaluate import evaluate_samples, write_result
from lexel.generators import Generator
from lexel.loading import load_generator, load_tokenizer
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.runtime import PeakMemory, runtime
from lexel.samples import write_samples
from lexel.spacing import evenly_spaced
from lexel.train.generator import train_generator
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.session import Progress

SAMPLES = "samples.npz"
METRICS = ("frechet", "precision_recall")


class Finished(Config, extra="allow"):
    """The required fields of a row's result; others are allowed."""

    name: str
    recipe: dict[str, Any]
    asked: dict[str, Any]
    stopped: str | None
    metrics: dict[str, float | None]


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
    asked = {"samples": count, **sampling}
    earlier = earlier_result(folder, recipe, asked, Finished)
    if earlier is not None:
        return earlier
    result: dict[str, Any] = {"name": name, "kind": recipe.generator.kind, "asked": asked, "stopped": None}
    result |= {"metrics": {}, "recipe": as_table(recipe)}
    memory = PeakMemory()
    try:
        trained = train_generator(recipe, folder, device=device, progress=progress)
    except TrainingStopped as stopped:
        result["stopped"] = str(stopped)
    else:
        if not trained.finished:
            return None
        run = RunFolder.read(folder)
        result["peak_memory_bytes"] = memory.read(trained.model.device)
        result["images_per_second"] = run.last_lines("train")[-1]["images_per_second"]
        validation = [{}, *run.last_lines("validation")][-1]
        result |= {key: validation.get(key) for key in ("bits_per_token", "histogram_bits", "loss")}
        generator = load_generator(folder)
        result["parameters"] = sum(parameter.numel() for parameter in generator.transformer.parameters())
        seconds = sample(generator, folder / SAMPLES, measuring, sampling, count, recipe.train.seed, device)
        result["seconds_per_image"] = seconds / count
        measured = evaluate_samples(folder / SAMPLES, measuring, metrics=METRICS, network=NETWORK, device=device)
        result |= {"metrics": measured["metrics"], "warnings": measured["warnings"]}
    write_result(folder / RESULT, result)
    return read_json(folder / RESULT)


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
