"""Classification from tokens: how much of an image's class its tokens, or a generator's states of them, tell.

What VQGAN-LC and GigaTok report beside the quality of images (https://arxiv.org/abs/2406.11837,
https://arxiv.org/abs/2504.08736): a small classifier on features that stay as they are. Features are the vectors of an
image's codes, its bare indices (the probe learns a vector for each), or a generator's hidden states, under the null
condition, so that no label is in them.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lexel.config import check
from lexel.data import PIXEL_LIMIT
from lexel.data.images import digest
from lexel.data.tokens import TokenSet
from lexel.data.tokens.format import find_manifest
from lexel.data.unreadable import counted
from lexel.errors import UsageError, unknown
from lexel.evaluate.classifiers import PROBES, LogisticRegression, Probe, ProbeConfig, Table, fit
from lexel.evaluate.feature_files import FeatureFiles
from lexel.evaluate.labelled import Labelled, StageCallback, images_as_tokens, token_sets
from lexel.evaluate.results import versions
from lexel.parts import Part
from lexel.regular import expanded
from lexel.runtime import ProgressCallback, Runtime, runtime
from lexel.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lexel.generators import Generator

FEATURES = {
    "codes": "The vectors of an image's codes, as the tokenizer's decoder gets them.",
    "embeddings": "The indices alone: the probe learns a vector for each code.",
    "hidden": "A generator's hidden states of the tokens, under its null condition.",
}
HIDDEN = "training-hidden", "validation-hidden"  # the folders of hidden states that are kept


def probe(
    source: str | Path | TokenSet,
    validation: str | Path | TokenSet | float | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    generator: "Generator | None" = None,
    features: str | None = None,
    kind: str = "linear",
    layers: int | None = None,
    size: int | None = None,
    workers: int | None = 0,
    pixel_limit: int = PIXEL_LIMIT,
    max_unreadable: float = 1.0,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "float32",
    progress: StageCallback | None = None,
    resume: str | Path | None = None,
    part: Part | None = None,
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
        workers: processes that read images; None for as many as pay.
        pixel_limit: files of images with more pixels are unreadable.
        max_unreadable: the part of the images, of those to learn from and of those to measure on, that may be
            unreadable and left out; of a `part` the part of its share.
        batch_size: images that pass through tokenizer and generator together.
        device, precision: of tokenizer and generator; the probe is fitted on the CPU in float32 and above.
        progress: called with (stage, done, total).
        resume: a folder for what takes long: the tokens of images, a generator's hidden states of tokens. The same call
            goes on there; other classifiers can be fitted to what it holds.
        part: make only this share of it; the same call without a part, with the same folder, makes what is missing,
            and gives the result, bit for bit that of a single call with a folder.
        settings: of `ProbeConfig`: seed, pool, penalty, epochs, width, ...

    Returns:
        A result as plain data: `metrics` has `accuracy`, `top5_accuracy` (None for five classes or fewer),
        `majority_accuracy` (of always naming the class that is the most frequent in training) and
        `training_accuracy`, shares of images in [0, 1]. Of a part `images` alone: how many it has.

    Raises:
        UsageError: there are no labels, or fewer than two classes; models and tokens do not belong together; an
            option is unknown or reaches nothing.
    """
    started = time.monotonic()
    features = _features(kind, features, tokenizer, generator, layers)
    if part is not None and resume is None:
        raise UsageError(f"part {part} needs a folder for what it makes: --resume DIR, the same for all parts")
    config = check(settings, ProbeConfig, "the probe's options")
    folder = None if resume is None else Path(resume)
    where = runtime(device, precision)
    warnings: list[str] = []
    report = progress or (lambda stage, done, total: None)

    if isinstance(source, TokenSet) or find_manifest(expanded(source)):
        if size is not None:
            raise UsageError("size is of images; tokens have theirs")
        if folder is not None and features != "hidden":
            raise UsageError(f"features {features!r} of tokens are looked up, not made: leave --resume and --part out")
        training, measured = token_sets(source, validation, max_unreadable)
    else:
        if tokenizer is None and generator is not None:
            tokenizer = generator.tokenizer
        if tokenizer is None:
            raise UsageError(f"{source} holds no tokens; for images give the tokenizer that makes their tokens")
        if part is not None and features == "hidden":
            raise UsageError("parts of hidden states are of tokens: make those first, by `lexel encode --part`")
        settled = tokenizer, size, workers, pixel_limit, max_unreadable, batch_size, where, report, warnings
        found = images_as_tokens(str(source), validation, *settled, resume=folder, part=part)
        if isinstance(found, int):
            return _of_part(part, found, warnings)
        training, measured = found
    present = sorted(set(training.labels.tolist()))
    if len(present) < 2:
        raise UsageError(f"a probe needs images of at least two classes to learn from; {source} has {len(present)}")

    make = _maker(features, training, tokenizer, generator, layers, where)
    vocabulary = training.spec.codebook_size * (training.spec.books or 1) if features == "embeddings" else None
    making: ProgressCallback = lambda done, total: report("features", done, total)  # noqa: E731
    learning: ProgressCallback = lambda done, total: report("training", done, total)  # noqa: E731
    makers: list[Callable[[np.ndarray], Tensor]] = [
        lambda numbers, read=data.read: make(read(numbers))  # type: ignore[misc]
        for data in (training, measured)
    ]
    if folder is not None and generator is not None:
        made_of = [generator.fingerprint(), layers, precision, batch_size]
        files = [
            FeatureFiles(folder / name, maker, len(data), batch_size, digest([*made_of, data.made_by, data.about]))
            for name, maker, data in zip(HIDDEN, makers, (training, measured), strict=True)
        ]
        images = sum(one.write(part or Part(1, 1), making) for one in files)
        if part is not None:
            return _of_part(part, images, warnings)
        makers = [*files]
    tables = [
        Table(maker, len(data), batch_size, vocabulary, making)
        for maker, data in zip(makers, (training, measured), strict=True)
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
        "data": {
            name: {**side.about, "unreadable": counted(side.unreadable)}
            for name, side in (("training", training), ("validation", measured))
        },
        "tokenizer": training.made_by,
        "generator": None if generator is None else generator.fingerprint(),
        "warnings": warnings,
        "versions": versions(),
        "device": str(where.device),
        "precision": precision,
        "seconds": round(time.monotonic() - started, 1),
    }


def _of_part(part: Part | None, images: int, warnings: list[str]) -> dict[str, Any]:
    return {"kind": "probe", "part": str(part), "images": images, "warnings": warnings}


def _features(
    kind: str, features: str | None, tokenizer: Tokenizer | None, generator: "Generator | None", layers: int | None
) -> str:
    """The features that are meant; refuses options that do not go together."""
    if kind not in PROBES:
        raise unknown("probe", kind, PROBES)
    features = features or ("hidden" if generator else "codes" if tokenizer else "embeddings")
    if features not in FEATURES:
        raise unknown("features", features, FEATURES)
    if (features == "hidden") != (generator is not None):
        raise UsageError(f"features {features!r} {'need' if features == 'hidden' else 'use no'} generator")
    if layers is not None and features != "hidden":
        raise UsageError(f"layers are a generator's; features {features!r} have none")
    return features


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
    generator: "Generator | None",
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
