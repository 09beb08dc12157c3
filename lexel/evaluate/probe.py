"""Classification from tokens: how much of an image's class its tokens, or a generator's states of them, tell.

What VQGAN-LC and GigaTok report beside the quality of images (https://arxiv.org/abs/2406.11837,
https://arxiv.org/abs/2504.08736): a small classifier on features that stay as they are. Features are the vectors of an
image's codes, its bare indices (the probe learns a vector for each), or a generator's hidden states, under the null
condition, so that no label is in them.
"""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexel import __version__
from lexel.config import check
from lexel.data import PIXEL_LIMIT, ImageSet, first_reason, ordered_batches
from lexel.data.config import HELD_OUT, DataConfig, open_data
from lexel.data.images import digest
from lexel.data.tokens import INDEX, TokenSet
from lexel.data.tokens.format import MANIFEST_PARTIAL
from lexel.errors import UsageError, unknown
from lexel.evaluate.classifiers import PROBES, LogisticRegression, Probe, ProbeConfig, Table, fit
from lexel.generators import Generator
from lexel.loading import own_transform
from lexel.provenance import public_name
from lexel.regular import expanded
from lexel.runtime import ProgressCallback, Runtime, runtime
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer

FEATURES = {
    "codes": "The vectors of an image's codes, as the tokenizer's decoder gets them.",
    "embeddings": "The indices alone: the probe learns a vector for each code.",
    "hidden": "A generator's hidden states of the tokens, under its null condition.",
}
StageCallback = Callable[[str, int, int | None], None]  # called with (stage, done, total)


class Labelled(NamedTuple):
    """Tokens of images and the classes of the images."""

    read: Callable[[np.ndarray], Tensor]  # numbers to int64 (B, *grid), or to latents (B, D, *grid)
    labels: Tensor  # int64 (N,)
    classes: list[str]
    spec: TokenSpec
    made_by: str  # the tokenizer's fingerprint
    about: dict[str, Any]  # source, images, fingerprint

    def __len__(self) -> int:
        return len(self.labels)


def probe(
    source: str | Path | TokenSet,
    validation: str | Path | TokenSet | float | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    generator: Generator | None = None,
    features: str | None = None,
    kind: str = "linear",
    layers: int | None = None,
    size: int | None = None,
    workers: int = 0,
    pixel_limit: int = PIXEL_LIMIT,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "float32",
    progress: StageCallback | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fits a classifier to the tokens of labelled images and counts how often it is right on others.

    Args:
        source: a token set with labels, or images with classes (as `open_images` takes them) and a tokenizer.
        validation: other tokens or images to measure on, "validation" or another split of the images, or the part to
            hold out; by default images' own validation split, or else 5 %.
        tokenizer: turns images into tokens, and has the vectors of codes. By default the generator's.
        generator: has hidden states.
        features: a key of FEATURES; by default "hidden" with a generator, "codes" with a tokenizer, else "embeddings".
        kind: a key of PROBES: "linear" or "attentive".
        layers: hidden states after so many blocks; see `Generator.hidden`.
        size: pixels a side of images; the tokenizer's by default.
        workers: processes that read images.
        pixel_limit: files of images with more pixels are unreadable.
        batch_size: images that pass through tokenizer and generator together.
        device, precision: of tokenizer and generator; the probe is fitted on the CPU in float32 and above.
        progress: called with (stage, done, total).
        settings: of `ProbeConfig`: seed, pool, penalty, epochs, width, ...

    Returns:
        A result as plain data: `metrics` has `accuracy`, `top5_accuracy` (None for five classes or fewer),
        `majority_accuracy` (of always naming the class that is the most frequent in training) and
        `training_accuracy`, shares of images in [0, 1].

    Raises:
        UsageError: there are no labels, or fewer than two classes; models and tokens do not belong together; an
            option is unknown or reaches nothing.
    """
    started = time.monotonic()
    if kind not in PROBES:
        raise unknown("probe", kind, PROBES)
    features = features or ("hidden" if generator else "codes" if tokenizer else "embeddings")
    if features not in FEATURES:
        raise unknown("features", features, FEATURES)
    if (features == "hidden") != (generator is not None):
        raise UsageError(f"features {features!r} {'need' if features == 'hidden' else 'use no'} generator")
    if layers is not None and features != "hidden":
        raise UsageError(f"layers are a generator's; features {features!r} have none")
    config = check(settings, ProbeConfig, "the probe's options")
    where = runtime(device, precision)
    warnings: list[str] = []
    report = progress or (lambda stage, done, total: None)

    if isinstance(source, TokenSet) or _holds_tokens(source):
        if size is not None:
            raise UsageError("size is of images; tokens have theirs")
        training, measured = _token_sets(source, validation)
    else:
        if tokenizer is None and generator is not None:
            tokenizer = generator.tokenizer
        if tokenizer is None:
            raise UsageError(f"{source} holds no tokens; for images give the tokenizer that makes their tokens")
        training, measured = _images(
            str(source), validation, tokenizer, size, workers, pixel_limit, batch_size, where, report, warnings
        )
    present = sorted(set(training.labels.tolist()))
    if len(present) < 2:
        raise UsageError(f"a probe needs images of at least two classes to learn from; {source} has {len(present)}")

    make = _maker(features, training, tokenizer, generator, layers, where)
    vocabulary = training.spec.codebook_size * (training.spec.books or 1) if features == "embeddings" else None
    making: ProgressCallback = lambda done, total: report("features", done, total)  # noqa: E731
    learning: ProgressCallback = lambda done, total: report("training", done, total)  # noqa: E731
    tables = [
        Table(lambda numbers, read=part.read: make(read(numbers)), len(part), batch_size, vocabulary, making)  # type: ignore[misc]
        for part in (training, measured)
    ]
    classes = len(training.classes)
    fitted = fit(kind, tables[0], training.labels, classes, config, learning)
    if isinstance(fitted, LogisticRegression) and not fitted.converged:
        warnings.append("the logistic regression did not converge; a larger penalty is easier")
    accuracy, top5 = _accuracy(fitted, tables[1], measured.labels)
    majority = int(torch.bincount(training.labels, minlength=classes).argmax())
    return {
        "kind": "probe",
        "metrics": {
            "accuracy": accuracy,
            "top5_accuracy": top5 if classes > 5 else None,
            "majority_accuracy": float((measured.labels == majority).double().mean()),
            "training_accuracy": _accuracy(fitted, tables[0], training.labels)[0],
        },
        "probe": kind,
        "features": {"kind": features, "shape": list(tables[0].shape), "layers": layers},
        "settings": config.model_dump(mode="json"),
        "solver": fitted.solver,
        "classes": classes,
        "data": {"training": training.about, "validation": measured.about},
        "tokenizer": training.made_by,
        "generator": None if generator is None else generator.fingerprint(),
        "warnings": warnings,
        "versions": {
            "lexel": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": str(where.device),
        "precision": precision,
        "seconds": round(time.monotonic() - started, 1),
    }


def _accuracy(fitted: Probe, table: Table, labels: Tensor) -> tuple[float, float]:
    """The share of images whose class has the highest score, and one of the five highest."""
    first = among = begin = 0
    for rows in table.batches():
        scores = fitted.scores(rows)
        own = labels[begin : begin + len(rows), None]
        best = scores.topk(min(5, scores.shape[1]), 1).indices == own
        first, among, begin = first + int(best[:, 0].sum()), among + int(best.any(1).sum()), begin + len(rows)
    return first / len(labels), among / len(labels)


# ---------------------------------------------------------------------------------------------------------- features


def _maker(
    features: str,
    data: Labelled,
    tokenizer: Tokenizer | None,
    generator: Generator | None,
    layers: int | None,
    where: Runtime,
) -> Callable[[Tensor], Tensor]:
    """Turns tokens (B, *grid) into features on the CPU: float32 (B, T, D), or int64 (B, T)."""
    source = str(data.about["source"])
    if features == "codes":
        if tokenizer is None:
            raise UsageError("features 'codes' need the tokenizer that made the tokens: it has their vectors")
        if tokenizer.fingerprint() != data.made_by:
            raise UsageError(
                f"the tokens of {source} were made by another tokenizer "
                f"({data.made_by[:12]} instead of {tokenizer.fingerprint()[:12]}); give that one"
            )
        quantizer = tokenizer.to(where.device).eval().quantizer
        if tokenizer.continuous:
            return _rows
        grid = quantizer.latent_grid(data.spec.shape)

        @torch.no_grad()
        def codes(tokens: Tensor) -> Tensor:
            return _rows(quantizer.indices_to_codes(tokens.to(where.device), grid))

        return codes
    if features == "embeddings":
        if data.spec.codebook_size == 1:
            raise UsageError(
                f"features {features!r} are of indices; the tokenizer of {source} is continuous: use codes"
            )
        books = data.spec.books
        first = 0 if books is None else torch.arange(books)[:, None] * data.spec.codebook_size
        return lambda tokens: (tokens if books is None else tokens.flatten(2) + first).flatten(1)
    assert generator is not None
    generator.check_tokenizer(data.made_by, f"the tokenizer of {source}")
    if generator.token_spec != data.spec:
        raise UsageError(
            f"the tokens of {source} have the grid {data.spec.shape} of {data.spec.codebook_size:,} codes, the "
            f"generator's {generator.token_spec.shape} of {generator.token_spec.codebook_size:,}"
        )
    condition = generator.condition
    if not condition.guided and condition.kind != "none":
        raise UsageError(
            f"the generator has no null condition for its condition {condition.kind!r}; "
            "its states would be those of one condition"
        )
    generator.to(where.device).eval()

    @torch.no_grad()
    def hidden(tokens: Tensor) -> Tensor:
        null = condition.null(condition.example(len(tokens)).to(where.device))
        with where.autocast():
            return generator.hidden(tokens.to(where.device), null, layers).float().cpu()

    return hidden


def _rows(codes: Tensor) -> Tensor:
    """Vectors (B, D, *grid) as rows, float32 (B, T, D), on the CPU."""
    return codes.flatten(2).transpose(1, 2).float().cpu()


# ------------------------------------------------------------------------------------------------------------- tokens


def _holds_tokens(source: str | Path) -> bool:
    """Whether a folder holds tokens, be their writing finished or not."""
    return any((expanded(source) / name).is_file() for name in (INDEX, MANIFEST_PARTIAL))


def _token_sets(
    source: str | Path | TokenSet, validation: str | Path | TokenSet | float | None
) -> tuple[Labelled, Labelled]:
    """Tokens to learn from and tokens to measure on, with one numbering of classes."""
    tokens = source if isinstance(source, TokenSet) else TokenSet.open(source)
    _require_labels(tokens.labels, str(tokens.folder))
    if validation is None or isinstance(validation, float):
        training, measured = tokens.hold_out(HELD_OUT if validation is None else validation)
        return _of_set(training), _of_set(measured)
    measured = validation if isinstance(validation, TokenSet) else TokenSet.open(validation)
    _require_labels(measured.labels, str(measured.folder))
    measured.require(tokens.fingerprint)
    if measured.token_spec != tokens.token_spec:
        raise UsageError(f"{measured.folder} has grids {measured.grid}, {tokens.folder} {tokens.grid}")
    if not len(measured):
        raise UsageError(f"{measured.folder} holds no images")
    return _of_set(tokens), _of_set(measured.with_classes(tokens.classes))


def _of_set(tokens: TokenSet) -> Labelled:
    assert tokens.labels is not None
    listed = [tokens.fingerprint, list(tokens.names), tokens.labels.tolist(), tokens.histogram().tolist()]
    about = {"source": public_name(tokens.folder), "images": len(tokens), "fingerprint": digest(listed)}
    labels = torch.from_numpy(tokens.labels)
    return Labelled(tokens.tokens, labels, list(tokens.classes), tokens.token_spec, tokens.fingerprint, about)


def _require_labels(labels: Any, source: str) -> None:
    if labels is None:
        raise UsageError(f"the images of {source} have no classes; a folder with a subfolder for each class has")


def _images(
    source: str,
    validation: Any,
    tokenizer: Tokenizer,
    size: int | None,
    workers: int,
    pixel_limit: int,
    batch_size: int,
    where: Runtime,
    report: StageCallback,
    warnings: list[str],
) -> tuple[Labelled, Labelled]:
    """The tokens of images to learn from and to measure on, kept in memory."""
    transform = own_transform(tokenizer, size)
    spec = tokenizer.token_spec(transform.size, transform.size)
    table = {
        "source": source,
        "validation": validation,
        "size": transform.size,
        "workers": workers,
        "memory": 0.0,
        "pixel_limit": pixel_limit,
        "channels": tokenizer.channels,
    }
    sets = open_data(check(table, DataConfig, "the images"))
    for images in sets:
        _require_labels(images.labels, source if images is sets[0] else str(validation or source))
    tokenizer.to(where.device).eval()
    made_by = tokenizer.fingerprint()

    def encoded(images: ImageSet, name: str) -> Labelled:
        assert images.labels is not None
        batches = ordered_batches(images, transform, batch_size, workers=workers)
        parts, numbers = [], []
        for batch in batches:
            with where.autocast(), torch.no_grad():
                pictures = batch.images.to(where.device)
                indices = tokenizer.encode(pictures)
            parts.append(indices.cpu())
            numbers += batch.numbers.tolist()
            report("encoding", len(numbers), len(images))
        if batches.unreadable:
            first, reason = next(iter(batches.unreadable.items()))
            warnings.append(f"{len(batches.unreadable)} images could not be read; {first}: {reason}")
        if not numbers:
            raise UsageError(
                f"none of the {len(images)} images of {name} can be read; {first_reason(batches.unreadable)}"
            )
        tokens = torch.cat(parts)
        labels = torch.tensor([images.labels[number] for number in numbers])
        about = {"source": public_name(name), "images": len(numbers), "fingerprint": images.fingerprint()}
        read = lambda chosen: tokens[torch.from_numpy(chosen)]  # noqa: E731
        return Labelled(read, labels, list(images.classes), spec, made_by, about)

    training, measured = sets
    return encoded(training, source), encoded(measured.with_classes(training.classes), str(validation or source))
