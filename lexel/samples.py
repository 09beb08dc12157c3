"""Images from a generator, written as they come: a grid to look at, a set to measure, or the tokens themselves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lexel.checkpoint import atomic
from lexel.data import ImageSet, Transform, to_uint8
from lexel.errors import UsageError
from lexel.generators import Generator, NextToken
from lexel.metrics.statistics import NpzWriter
from lexel.runtime import Runtime
from lexel.tokenizer import Tokenizer

AT_ONCE = 64  # images sampled, decoded and written together, if no batch is larger; what is made does not depend on it
INT8 = "int8"  # the decoding implementation that rounds weights
MEASURED = 2  # images on which its cost is measured
ALL = "all"  # in place of class names: every class
WRITERS = (".png", ".jpg", ".jpeg", ".webp", ".npz", ".npy")


class Written(NamedTuple):
    """What `write_samples` wrote."""

    path: Path
    extra_bits: float | None  # int8 decoding: bits a token more than exact weights would have given, on a few images
    measured_on: int  # images


def class_labels(generator: Generator, names: Sequence[str], per_class: int, seed: int | None = None) -> list[int]:
    """The class of each image to sample: exactly `per_class` of each class.

    Args:
        generator: knows its classes.
        names: numbers or labels of classes; `["all"]` is every class.
        per_class: images of each.
        seed: of a random order; None gives class after class. Evaluators that split samples in file order, such as
            ADM's inception score, are defined for a random order only.

    Raises:
        UsageError: there is no such class, or the generator has no classes.
    """
    classes = getattr(generator.condition, "classes", 0)
    chosen = list(range(classes)) if list(names) == [ALL] and classes else generator.class_numbers(names)
    labels = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(per_class)
    if seed is not None:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return labels.tolist()


def write_samples(
    generator: Generator,
    labels: Sequence[int],
    out: str | Path,
    runtime: Runtime,
    tokenizer: Tokenizer | None = None,
    first_number: int = 0,
    columns: int | None = None,
    given: torch.Tensor | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **settings: Any,
) -> Written:
    """Samples an image for each label and writes them to one file, whose ending says how.

    `.png`, `.jpg`, `.webp`: a grid. `.npz`: images as ADM's evaluator takes them (`arr_0`, uint8), as a stream, so that
    50,000 of them never lie in memory. `.npy`: the tokens, int64 (N, h, w).

    Args:
        generator: put on the runtime's device.
        labels: the class of each image.
        out: the file.
        runtime: device and precision.
        tokenizer: makes images of tokens; the one in the generator's folder by default.
        first_number: number of the first image in the random stream.
        columns: of a grid; about as many as rows by default.
        given: int64 (N, h, w), tokens that stay as they are, -1 where they are to be sampled; of one image for all, or
            of each.
        progress: called with (images done, images).
        settings: of `Generator.sample`.

    Raises:
        UsageError: the ending is unknown, or there is no tokenizer.
    """
    out = Path(out)
    ending = out.suffix.lower()
    if ending not in WRITERS:
        raise UsageError(f"{out} has no known ending; choose from {', '.join(WRITERS)}")
    if not labels:
        raise UsageError("there are no classes to sample from")
    if given is not None:
        if len(given) not in (1, len(labels)):
            raise UsageError(f"tokens are given for {len(given)} images; 1 or {len(labels)} are needed")
        given = given.expand(len(labels), *given.shape[1:])
    generator = generator.to(runtime.device).eval()
    if ending == ".npy":
        tokens = [
            part.cpu().numpy() for part in _sampled(generator, labels, runtime, first_number, given, progress, settings)
        ]
        with atomic(out) as path, path.open("wb") as file:  # given a name, NumPy would change ".NPY"
            np.save(file, np.concatenate(tokens))
        return _written(generator, labels, out, settings)
    decoder = (tokenizer or generator.tokenizer).to(runtime.device)
    if runtime.device.type == "cuda":  # half-precision convolutions are fastest with channels last
        decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator.check_tokenizer(decoder.fingerprint(), "the tokenizer")
    parts = _sampled(generator, labels, runtime, first_number, given, progress, settings)
    pictures = (_pictures(decoder, part, runtime) for part in parts)
    if ending == ".npz":
        first = next(pictures)
        with NpzWriter(out, (len(labels), *first.shape[1:])) as writer:
            writer.add(first)
            for more in pictures:
                writer.add(more)
        return _written(generator, labels, out, settings)
    grid = picture_grid(np.concatenate(list(pictures)), columns)
    with atomic(out) as path:
        Image.fromarray(grid).save(path)
    return _written(generator, labels, out, settings)


def _written(generator: Generator, labels: Sequence[int], out: Path, settings: Mapping[str, Any]) -> Written:
    """The result, with what int8 weights cost on the first few images if they were used."""
    if settings.get("implementation") != INT8 or not isinstance(generator, NextToken):
        return Written(out, None, 0)
    few = list(labels[:MEASURED])
    kept = {name: settings[name] for name in ("cfg_scale", "cfg_schedule", "temperature", "seed") if name in settings}
    tokens = generator.sample(few, implementation=INT8, **kept)
    return Written(out, generator.extra_bits(tokens, few, INT8), len(few))


def _sampled(
    generator: Generator,
    labels: Sequence[int],
    runtime: Runtime,
    first: int,
    given: torch.Tensor | None,
    progress: Any,
    settings: Any,
) -> Any:
    at_once = max(AT_ONCE, settings.get("batch_size") or 0)
    for begin in range(0, len(labels), at_once):
        part = torch.tensor(labels[begin : begin + at_once], device=runtime.device)
        numbers = range(first + begin, first + begin + len(part))
        report = None if progress is None else _images_done(progress, begin, len(part), len(labels))
        known = None if given is None else given[begin : begin + len(part)].to(runtime.device)
        yield generator.sample(
            part, image_numbers=numbers, given=known, dtype=runtime.half, progress=report, **settings
        )


def read_tokens(path: str | Path) -> torch.Tensor:
    """Tokens of images from an .npy file, int64 (N, h, w); those of one image may be (h, w).

    Raises:
        UsageError: the file is missing or holds no integers of that shape.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give tokens as .npy, such as `lexel sample --out tokens.npy` writes")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npy: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"{path} must hold integers (N, h, w)")
    return torch.from_numpy(array.astype(np.int64).reshape(-1, *array.shape[-2:]))


def _images_done(
    progress: Callable[[int, int | None], None], before: int, count: int, total: int
) -> Callable[[int, int], None]:
    """Turns tokens done of a part's tokens into images done of all."""
    return lambda done, tokens: progress(before + count * done // tokens, total)


def _pictures(tokenizer: Tokenizer, indices: torch.Tensor, runtime: Runtime) -> np.ndarray:
    with runtime.autocast():
        return to_uint8(tokenizer.decode(indices))


def picture_grid(pictures: np.ndarray, columns: int | None = None, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Pictures (N, H, W, 3), each pixel `scale` wide, in rows of so many columns, on white: uint8 (H', W', 3)."""
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pictures.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


class Nearest(NamedTuple):
    """The training picture nearest to each sample."""

    pictures: np.ndarray  # uint8 (N, H, W, 3)
    distances: np.ndarray  # (N,) root mean squared difference in grey levels, 0 to 255
    names: list[str]


def nearest_pictures(samples: np.ndarray, images: ImageSet, transform: Transform) -> Nearest:
    """Finds for each sample (N, H, W, 3) the picture that differs least from it, pixel by pixel.

    A generator that has learned a few thousand pictures by heart shows them here: a distance of a few grey levels is a
    copy, up to what the tokenizer loses.
    """
    best = np.full(len(samples), np.inf)
    pictures = np.zeros_like(samples)
    names = [""] * len(samples)
    for number in range(len(images)):
        picture = transform(images.read(number), None)
        distances = np.square(samples.astype(np.float32) - picture).mean(axis=(1, 2, 3))
        for sample in np.flatnonzero(distances < best):
            best[sample], pictures[sample], names[sample] = distances[sample], picture, images.names[number]
    return Nearest(pictures, np.sqrt(best), names)
