"""Views of the studio as plain data: reconstructions, tokens, codes, samples, curves."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexel.data import crop_back, to_images, to_uint8
from lexel.errors import UsageError
from lexel.generators import Generator
from lexel.generators.base import FREE
from lexel.metrics.health import diagnose
from lexel.metrics.pixels import WINDOW_SIDES, psnr, ssim
from lexel.quantizers import outline
from lexel.report.run_page import NO_CURVES
from lexel.runtime import Runtime
from lexel.samples import encode_captions
from lexel.studio import pictures
from lexel.studio.jobs import Job
from lexel.studio.models import Entry
from lexel.tokenizer import Tokenizer

SAMPLES = 16  # images of one job
CAPTION = 1000  # characters


def facts(entry: Entry) -> dict[str, Any]:
    """The facts of a model that a page needs first."""
    tokenizer, size = entry.tokenizer, entry.transform.size
    about: dict[str, Any] = {
        "key": entry.key,
        "kind": entry.kind,
        "size": size,
        "examples": len(entry.examples),
        "continuous": tokenizer.continuous,
        "quantizer": tokenizer.config.quantizer["kind"],
        "autoencoder": tokenizer.config.autoencoder.kind,
        "parameters": sum(parameter.numel() for parameter in entry.model.parameters()),
        "fingerprint": tokenizer.fingerprint()[:12],
    }
    if not tokenizer.continuous:
        about |= {"codebook_size": tokenizer.codebook_size, "layout": layout(tokenizer, size, size)}
    if entry.kind == "generator":
        about |= generator_facts(entry.generator)
    return about


def generator_facts(generator: Generator) -> dict[str, Any]:
    """The family of a generator, its classes and whether it can be guided."""
    classes = getattr(generator.condition, "classes", None)
    names = generator.config.class_names or ([str(n) for n in range(classes)] if classes else [])
    return {
        "family": generator.config.transformer.kind,
        "condition": generator.condition.kind,
        "captions": generator.condition.kind == "text",
        "classes": names,
        "guided": generator.condition.guided,
    }


def layout(tokenizer: Tokenizer, height: int, width: int) -> dict[str, Any]:
    """The drawing of a picture's tokens: books, rows, columns, and whether a token has a place in the picture."""
    spec = tokenizer.token_spec(height, width)
    grid = spec.grids[0]
    spatial = len(spec.grids) == 1 and len(grid) == 2 and tokenizer.downsampling is not None
    if len(spec.grids) == 1 and len(grid) == 2:
        rows, columns = grid
    else:
        columns = math.isqrt(spec.cells - 1) + 1
        rows = -(-spec.cells // columns)
    return {
        "books": spec.books or 1,
        "rows": rows,
        "columns": columns,
        "cells": spec.cells,
        "spatial": spatial,
        "shape": list(spec.shape),
        "bits": round(spec.bits, 1),
    }


def reconstruct(entry: Entry, picture: np.ndarray, whole: bool = False, job: Job | None = None) -> dict[str, Any]:
    """A picture (H, W, C) uint8 through a tokenizer and back, with error map, numbers and tokens.

    Args:
        entry: the model.
        picture: of any size.
        whole: keeps its proportions, reduced to at most `pictures.WHOLE_PIXELS`; else the square of the training.
        job: that this is; it can be stopped between its steps.
    """
    job = job or Job()
    job.progress(0, 3)
    tokenizer = entry.tokenizer
    array = pictures.at_most(picture, pictures.WHOLE_PIXELS) if whole else entry.transform(picture)
    height, width = array.shape[:2]
    started = time.monotonic()
    with torch.no_grad():
        images = to_images(array)[None]
        padded = tokenizer.pad(images)
        job.progress(1, 3)
        indices = tokenizer.encode(padded.to(entry.device)).cpu()
        job.progress(2, 3)
        back = crop_back(tokenizer.decode(indices.to(entry.device)), height, width).cpu()
    seconds = time.monotonic() - started
    made = to_uint8(back[0])
    numbers: dict[str, Any] = {"PSNR": round(float(psnr(images, back)), 2)}
    if images.shape[1] == 3 and min(height, width) >= WINDOW_SIDES["gaussian"]:
        numbers["SSIM"] = round(float(ssim(images, back)), 4)
    numbers["mean error"] = round(float((images - back).abs().mean()) * 127.5, 2)
    shown: dict[str, Any] = {
        "width": width,
        "height": height,
        "original": pictures.as_address(array),
        "reconstruction": pictures.as_address(made),
        "errors": pictures.as_address(pictures.error_map(array, made)),
        "numbers": {name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "seconds": round(seconds, 3),
    }
    if not tokenizer.continuous:
        shown |= {
            "indices": indices[0].flatten().tolist(),
            "layout": layout(tokenizer, *padded.shape[-2:]),
            "padded": [padded.shape[-1], padded.shape[-2]],
            "distinct": int(indices.unique().numel()),
            "codebook_size": tokenizer.codebook_size,
        }
    return shown


def decode(entry: Entry, indices: Any, shape: Any) -> dict[str, Any]:
    """The picture of tokens.

    Args:
        entry: the model.
        indices: integers, flattened.
        shape: of one image's tokens.

    Raises:
        UsageError: they are no tokens of this model.
    """
    tokens = as_tokens(indices, shape)
    return {"picture": pictures.as_address(to_uint8(entry.tokenizer.decode(tokens[None].to(entry.device))[0]))}


def as_tokens(indices: Any, shape: Any) -> Tensor:
    """Integers of a request as a tensor of a shape.

    Raises:
        UsageError: they are no integers, or not so many.
    """
    for name, values in (("indices", indices), ("shape", shape)):
        if not isinstance(values, list) or not all(type(v) is int and abs(v) < 2**62 for v in values):
            raise UsageError(f"{name} must be a list of integers")
    if not 1 <= len(shape) <= 3 or any(side < 1 for side in shape) or math.prod(shape) != len(indices):
        raise UsageError(f"{len(indices)} indices do not have the shape {shape}")
    return torch.tensor(indices, dtype=torch.long).view(*shape)


def generate(entry: Entry, options: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Samples images; the job gets what is there so far.

    Args:
        entry: a generator.
        options: `class`, `count`, `cfg_scale`, `temperature`, `top_k`, `top_p`, `seed`, `given`.
        job: that this is.

    Raises:
        UsageError: an option does not fit.
    """
    generator, tokenizer = entry.generator, entry.tokenizer
    count = integer(options, "count", 4, 1, SAMPLES)
    given = options.get("given")
    if given is not None:  # tokens that stay, -1 where new ones are wanted
        given = as_tokens(given, list(generator.sampled_shape))
    condition: Any = count
    if generator.condition.kind == "class":
        label = str(options.get("class", "0"))
        condition = generator.class_numbers([label]) * count
    elif generator.condition.kind == "text":
        condition = caption_features(entry, options.get("caption"), count)
    elif generator.condition.kind != "none":
        raise UsageError(f"the condition {generator.condition.kind!r} cannot be given here; use `lexel sample`")
    last = [0.0]

    def preview(tokens: Tensor) -> None:
        if time.monotonic() - last[0] < 0.4 or tokens.shape[1:].numel() != math.prod(generator.sampled_shape):
            return
        last[0] = time.monotonic()
        known = tokens.view(len(tokens), *generator.sampled_shape)
        images = to_uint8(tokenizer.decode(known.clamp(min=0).to(entry.device)))
        job.preview = {
            "images": [pictures.as_address(image) for image in images],
            "free": (known[0].flatten() == FREE).tolist(),
        }

    with entry.lock:  # a generator keeps caches between calls
        tokens = generator.sample(
            condition,
            cfg_scale=number(options, "cfg_scale", 1.0, 0.0, 100.0),
            temperature=number(options, "temperature", 1.0, 0.0, 100.0),
            top_k=integer(options, "top_k", 0, 0, 2**31),
            top_p=number(options, "top_p", 1.0, 0.0, 1.0),
            seed=integer(options, "seed", 0, 0, 2**31),
            given=None if given is None else given[None].repeat(count, *[1] * given.dim()),
            progress=job.progress,
            watch=preview,
        )
    images = to_uint8(tokenizer.decode(tokens.to(entry.device)))
    flat = [] if tokenizer.continuous else [image.flatten().tolist() for image in tokens]
    return {"images": [pictures.as_address(image) for image in images], "tokens": flat}


def caption_features(entry: Entry, caption: Any, count: int) -> Tensor:
    """Features of a caption for so many images, (count, length, features).

    Raises:
        UsageError: there is no caption, or the studio was opened without a text encoder.
    """
    if not isinstance(caption, str) or not caption.strip() or len(caption) > CAPTION:
        raise UsageError(f"write a caption of 1 to {CAPTION:,} characters")
    if entry.text_encoder is None:
        raise UsageError("captions need the text encoder of the training: open the studio with --text-encoder NAME")
    where = Runtime(entry.device, None)
    return encode_captions(entry.generator, [caption], entry.text_encoder, where).expand(count, -1, -1)


def number(options: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number of a request.

    Raises:
        UsageError: it is none, or out of range.
    """
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:40]!r}")
    return float(value)


def integer(options: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number of a request.

    Raises:
        UsageError: it is none, or out of range.
    """
    value = number(options, name, default, low, high)
    if value != int(value):
        raise UsageError(f"{name} must be a whole number, got {value:g}")
    return int(value)


def training(entry: Entry) -> dict[str, Any]:
    """A run's curves, the steps that kept pictures, and the verdicts on its codebook.

    Raises:
        UsageError: there is no run behind the model.
    """
    run = entry.run()
    if run is None:
        raise UsageError(f"{entry.key} is no run with a log; train one with `lexel train`")
    curves: dict[str, Any] = {}
    for part, rows in (("training", run.train), ("held out", run.validation)):
        for name in dict.fromkeys(name for row in rows for name in row if name not in {*NO_CURVES, "kind"}):
            points = [[row["step"], row[name]] for row in rows if isinstance(row.get(name), int | float)]
            curves.setdefault(name, {})[part] = thinned(points)
    findings: list[dict[str, str]] = []
    if "model" in run.recipe and run.validation and "usage" in run.validation[-1]:
        seen = diagnose(outline(run.recipe["model"]["quantizer"]), run.validation, run.train)
        findings = [finding._asdict() for finding in seen]
    return {
        "key": entry.key,
        "step": run.train[-1]["step"] if run.train else 0,
        "steps": run.recipe.get("train", {}).get("steps"),
        "seconds": run.train[-1]["seconds"] if run.train else 0,
        "curves": curves,
        "findings": findings,
        "pictures": sorted(run.snapshots),
    }


def thinned(points: Sequence[Any], most: int = 800) -> list[Any]:
    """At most about so many points, the last one among them."""
    kept = list(points[:: -(-len(points) // most)]) if points else []
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def snapshot(entry: Entry, step: int) -> dict[str, Any]:
    """The pictures that a run kept at a step.

    Raises:
        UsageError: it kept none.
    """
    run = entry.run()
    if run is None or step not in run.snapshots:
        raise UsageError(f"{entry.key} kept no pictures at step {step}")
    kept = run.snapshots[step]
    names = [name for name in ("originals", "reconstructions", "samples") if name in kept]
    return {"rows": {name: [pictures.as_address(picture) for picture in kept[name][:8]] for name in names}}
