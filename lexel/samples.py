"""Images from a generator, written as they come: a grid to look at, a set to measure, or the tokens themselves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from lexel.arrays import NpzWriter, read_array
from lexel.checkpoint import atomic
from lexel.conditions import CaptionFeatures
from lexel.data import ImageSet, Transform, to_uint8
from lexel.data.arrays import picture_grid
from lexel.data.captions import CaptionFile
from lexel.errors import UsageError
from lexel.generators import Generator, NextToken
from lexel.networks import FeatureNetwork
from lexel.runtime import ProgressCallback, Runtime
from lexel.text_encoder import TextEncoder
from lexel.tokenizer import Tokenizer

AT_ONCE = 64  # images sampled, decoded and written together, if no batch is larger; what is made does not depend on it
INT8 = "int8"  # the decoding implementation that rounds weights
MEASURED = 2  # images on which its cost is measured
ALL = "all"  # in place of class names: every class
WRITERS = (".png", ".jpg", ".jpeg", ".webp", ".npz", ".npy")


Condition = Sequence[int] | torch.Tensor | int  # classes, features of captions, or how many images


class Written(NamedTuple):
    """The result of `write_samples`."""

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


def asked_for(
    generator: Generator,
    names: Sequence[str] | None,
    captions: torch.Tensor | None,
    per_class: int,
    seed: int | None = None,
) -> Condition:
    """The condition of each image to sample, of the kind that the generator has learned.

    Args:
        generator: says which kind that is.
        names: of classes, for a class condition: see `class_labels`.
        captions: features (N, length, features), for a text condition.
        per_class: images of each class or caption; of an unconditional generator, of all.
        seed: of a random order of classes.

    Raises:
        UsageError: what the kind needs was not given, or another was.
    """
    kind = generator.condition.kind
    given = {"class": names is not None, "text": captions is not None}
    for other, there in given.items():
        if there and other != kind:
            raise UsageError(f"the generator's condition is {kind!r}; it takes no {'classes' if names else 'captions'}")
    if kind == "none":
        return per_class
    if kind == "text":
        if captions is None:
            raise UsageError("the generator's condition is 'text'; give --captions FILE, features of captions (.npy)")
        return captions.repeat_interleave(per_class, 0)
    if names is None:
        raise UsageError("the generator's condition is 'class'; give --classes, by number or label")
    return class_labels(generator, names, per_class, seed)


def write_samples(
    generator: Generator,
    condition: Condition,
    out: str | Path,
    runtime: Runtime,
    tokenizer: Tokenizer | None = None,
    first_number: int = 0,
    columns: int | None = None,
    given: torch.Tensor | None = None,
    progress: ProgressCallback | None = None,
    candidates: int = 1,
    classifier: FeatureNetwork | None = None,
    rounding: Literal["round", "truncate"] = "round",
    **settings: Any,
) -> Written:
    """Samples images and writes them to one file, whose ending says how.

    `.png`, `.jpg`, `.webp`: a grid. `.npz`: images as ADM's evaluator takes them (`arr_0`, uint8), as a stream, so that
    50,000 of them never lie in memory. `.npy`: the tokens, int64 (N, *grid).

    Args:
        generator: put on the runtime's device.
        condition: the class of each image, features of captions (N, length, features), or how many images.
        out: the file.
        runtime: device and precision.
        tokenizer: makes images of tokens; the one in the generator's folder by default.
        first_number: number of the first image in the random stream.
        columns: of a grid; about as many as rows by default.
        given: int64 (N, *grid), tokens that stay as they are, -1 where they are to be sampled; of one image for all, or
            of each.
        progress: called with (images done, images).
        candidates: images that are sampled for each that is written: the one whose class is the likeliest to the
            classifier is kept (rejection sampling, as of VQ-VAE-2 and VQGAN, at an acceptance rate of 1 / candidates).
        classifier: with logits of the generator's classes, in their order; needed for candidates.
        rounding: of pixels to 8 bits; SEED-Voken's sampler truncates, ADM's and LlamaGen's evaluations round.
        settings: of `Generator.sample`.

    Raises:
        UsageError: the ending is unknown, there is no tokenizer, or the classifier does not know the classes.
    """
    out = Path(out)
    ending = out.suffix.lower()
    if ending not in WRITERS:
        raise UsageError(f"{out} has no known ending; choose from {', '.join(WRITERS)}")
    count = how_many(condition)
    if not count:
        raise UsageError("there is nothing to sample: no classes, captions or images are asked for")
    if given is not None:
        if len(given) not in (1, count):
            raise UsageError(f"tokens are given for {len(given)} images; 1 or {count} are needed")
        given = given.expand(count, *given.shape[1:])
    generator = generator.to(runtime.device).eval()
    if ending == ".npy" and candidates == 1:  # without images, and so without a tokenizer
        _save_tokens(out, _sampled(generator, condition, runtime, first_number, given, progress, settings))
        return _written(generator, condition, out, settings)
    decoder = (tokenizer or generator.tokenizer).to(runtime.device)
    if runtime.device.type == "cuda":  # half-precision convolutions are fastest with channels last
        decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator.check_tokenizer(decoder.fingerprint(), "the tokenizer")
    judge = None if candidates == 1 else Judge(candidates, classifier, decoder, runtime)
    parts = _sampled(generator, condition, runtime, first_number, given, progress, settings, judge)
    pictures = (_pictures(decoder, part, runtime, rounding) for part in parts)
    if ending == ".npy":
        _save_tokens(out, parts)
    elif ending == ".npz":
        first = next(pictures)
        with NpzWriter(out, (count, *first.shape[1:])) as writer:
            for some in chain([first], pictures):
                writer.add(some)
    else:
        grid = picture_grid(np.concatenate(list(pictures)), columns)
        with atomic(out) as path:
            Image.fromarray(grid).save(path)
    return _written(generator, condition, out, settings)


def sampled_images(
    generator: Generator,
    condition: Condition,
    runtime: Runtime,
    tokenizer: Tokenizer,
    first_number: int = 0,
    rounding: Literal["round", "truncate"] = "round",
    **settings: Any,
) -> Iterator[np.ndarray]:
    """Images of a generator, uint8 (n, H, W, 3), a batch at a time; the arguments are those of `write_samples`."""
    for part in _sampled(generator, condition, runtime, first_number, None, None, settings):
        yield _pictures(tokenizer, part, runtime, rounding)


def _save_tokens(out: Path, parts: Iterable[torch.Tensor]) -> None:
    tokens = np.concatenate([part.cpu().numpy() for part in parts])
    with atomic(out) as path, path.open("wb") as file:  # given a name, NumPy would change ".NPY"
        np.save(file, tokens)


def _written(generator: Generator, condition: Condition, out: Path, settings: Mapping[str, Any]) -> Written:
    """The result, with what int8 weights cost on the first few images if they were used."""
    if settings.get("implementation") != INT8 or not isinstance(generator, NextToken):
        return Written(out, None, 0)
    few = cut(condition, 0, MEASURED)
    kept = {name: settings[name] for name in ("cfg_scale", "cfg_schedule", "temperature", "seed") if name in settings}
    tokens = generator.sample(few, implementation=INT8, **kept)
    return Written(out, generator.extra_bits(tokens, few, INT8), len(tokens))


def how_many(condition: Condition) -> int:
    """The number of images that a condition is of."""
    return condition if isinstance(condition, int) else len(condition)


def cut(condition: Condition, begin: int, end: int) -> Condition:
    """The images [begin, end) of a condition."""
    if isinstance(condition, int):
        return max(0, min(end, condition) - begin)
    return condition[begin:end]


def images_at_once(candidates: int, batch_size: int | None) -> int:
    """Images that are sampled, decoded and written together: where parts are cut, too."""
    return max(AT_ONCE, batch_size or 0) if candidates == 1 else max(1, AT_ONCE // candidates)


def _sampled(
    generator: Generator,
    condition: Condition,
    runtime: Runtime,
    first: int,
    given: torch.Tensor | None,
    progress: ProgressCallback | None,
    settings: Mapping[str, Any],
    judge: "Judge | None" = None,
) -> Iterator[torch.Tensor]:
    """Tokens of the images, some at a time; with a judge the best of m candidates.

    The candidates of image n are the images n m to n m + m - 1 of the random stream.
    """
    if judge is not None:
        condition = judge.labels(generator, condition)
    count, each = how_many(condition), 1 if judge is None else judge.candidates
    at_once = images_at_once(each, settings.get("batch_size"))
    for begin in range(0, count, at_once):
        end = min(begin + at_once, count)
        some = cut(condition, begin, end)
        tokens = generator.sample(
            some if judge is None else torch.as_tensor(some).repeat_interleave(each),
            image_numbers=range((first + begin) * each, (first + end) * each),
            given=None if given is None else given[begin:end].repeat_interleave(each, 0).to(runtime.device),
            dtype=runtime.half,
            progress=None if progress is None else _images_done(progress, begin, end - begin, count),
            **settings,
        )
        yield tokens if judge is None else judge.best(tokens, torch.as_tensor(some))


class Judge:
    """Rejection sampling: keeps the best of several candidates by a classifier's probability of the class.

    Args:
        candidates: images for each that is kept, at least 2.
        classifier: a network with class scores.
        tokenizer: makes images of tokens.
        runtime: device and precision.

    Raises:
        UsageError: there are too few candidates, or the network has no classes.
    """

    def __init__(
        self, candidates: int, classifier: FeatureNetwork | None, tokenizer: Tokenizer, runtime: Runtime
    ) -> None:
        if candidates < 2:
            raise UsageError(f"candidates must be at least 1 (1 is off), got {candidates}")
        if classifier is None or not classifier.classes:
            raise UsageError("candidates need a classifier: a feature network with class scores")
        self.candidates, self.tokenizer, self.runtime = candidates, tokenizer, runtime
        self.classifier = classifier.to(runtime.device)

    def labels(self, generator: Generator, condition: Condition) -> torch.Tensor:
        """The class of each image, int64 (N,), on the generator's device.

        Raises:
            UsageError: the generator has no classes, or others than the classifier.
        """
        if isinstance(condition, int) or generator.condition.kind != "class":
            raise UsageError("candidates are chosen by their class; the generator has none")
        known = getattr(generator.condition, "classes", 0)
        if self.classifier.classes != known:
            raise UsageError(
                f"the classifier {self.classifier.name} knows {self.classifier.classes} classes, the generator {known};"
                " they must be the same, in the same order"
            )
        return generator.condition.check(condition)

    def best(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The best of every `candidates` images of tokens (N * candidates, *grid), of classes (N,): (N, *grid)."""
        with self.runtime.autocast():
            images = self.tokenizer.decode(tokens).float()
        logits = self.classifier(images).logits
        probabilities = logits.log_softmax(-1).view(len(labels), self.candidates, -1)
        scores = probabilities.gather(2, labels.view(-1, 1, 1).expand(-1, self.candidates, 1))[..., 0]
        rows = torch.arange(len(labels), device=tokens.device) * self.candidates + scores.argmax(1)
        return tokens[rows]


def read_tokens(path: str | Path, grid: tuple[int, ...] = (0, 0)) -> torch.Tensor:
    """Tokens of images from an .npy file, int64 (N, *grid); those of one image may be (*grid).

    Args:
        path: the file.
        grid: of an image's tokens; only the number of its axes is used.

    Raises:
        UsageError: the file is missing or damaged, or holds no integers of that shape.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file; give tokens as .npy, such as `lexel sample --out tokens.npy` writes")
    array = read_array(path, kind=np.integer)
    if array.ndim not in (len(grid), len(grid) + 1):
        raise UsageError(f"{path} must hold integers (N, {', '.join('hwd'[: len(grid)])}), got {array.shape}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise UsageError(f"{path} has tokens beyond int64")
    return torch.from_numpy(array.astype(np.int64)).reshape(-1, *array.shape[-len(grid) :])


def read_captions(path: str | Path) -> torch.Tensor:
    """Features of captions from a file (see `CaptionFile`): float32 (N, length, features).

    Raises:
        UsageError: the file is missing or damaged, or holds no numbers of that shape.
    """
    captions = CaptionFile(path)
    return torch.from_numpy(captions.rows(range(len(captions))))


def encode_captions(generator: Generator, texts: Sequence[str], encoder: str | Path, runtime: Runtime) -> torch.Tensor:
    """Features of texts by a text encoder, float32 (N, length, features), as long as the generator takes them.

    Raises:
        UsageError: the generator has no text condition, or it learned from another encoder's features.
    """
    condition = generator.condition
    if not isinstance(condition, CaptionFeatures):
        raise UsageError(f"the generator's condition is {condition.kind!r}; it takes no captions")
    text = TextEncoder(encoder, condition.length, runtime)
    if text.channels != condition.features:
        raise UsageError(f"{encoder} gives {text.channels} features, the generator takes {condition.features}")
    return torch.from_numpy(text.encode(texts))


def _images_done(progress: ProgressCallback, before: int, count: int, total: int) -> ProgressCallback:
    """Turns tokens done of a part's tokens into images done of all."""
    return lambda done, tokens: progress(before + count * done // (tokens or 1), total)


def _pictures(
    tokenizer: Tokenizer, indices: torch.Tensor, runtime: Runtime, rounding: Literal["round", "truncate"]
) -> np.ndarray:
    with runtime.autocast():
        return to_uint8(tokenizer.decode(indices), rounding)


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
