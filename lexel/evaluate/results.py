"""Results of evaluations as plain data: writing, reading, and comparing those that are on one scale."""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lexel import __version__, checkpoint
from lexel.data import first_reason
from lexel.data.unreadable import counted
from lexel.distributed import broadcast, processes
from lexel.errors import UsageError
from lexel.evaluate.metric import Values
from lexel.evaluate.sources import Source
from lexel.evaluate.stream import Visited
from lexel.machine import commit, machine
from lexel.metrics import Protocol
from lexel.runtime import Runtime


class Difference(NamedTuple):
    """One metric in two comparable results."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    distinct: bool | None  # whether the intervals lie apart; None where one is missing


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Difference]:
    """The metrics that two results share, side by side.

    Raises:
        UsageError: the results are not on one scale; the message says why.
    """
    for what, given in (("protocol", "name"), ("kind", None)):
        one, other = (result[what] if given is None else result[what][given] for result in (a, b))
        if one != other:
            raise UsageError(
                f"results of different {what}s cannot be compared: {one} and {other}; evaluate both under one"
            )
    # What an earlier version had no choice of was as the default is now.
    defaults = _plain(Protocol("", "", "").choices())
    one, other = (defaults | {k: v for k, v in r["protocol"].items() if k not in ("summary", "why")} for r in (a, b))
    for name in one | other:
        if one.get(name) != other.get(name):
            raise UsageError(
                f"results cannot be compared: both call their protocol {one['name']!r}, but {name} is "
                f"{one.get(name)} in one and {other.get(name)} in the other"
            )
    for what, path in (
        ("network", ("network", "name")),
        ("network weights", ("network", "fingerprint")),
        ("resize rule of the network", ("network", "resize")),
        ("data", ("data", "fingerprint")),
        ("reference", ("reference", "statistics")),
        ("LPIPS weights", ("lpips",)),
        *((f"weights of {name}", ("weights", name)) for name in a.get("weights") or {}),
    ):
        if what == "data" and a["kind"] == "generation":
            continue  # the samples are what is compared
        one, other = _at(a, path), _at(b, path)
        if None in (one, other) and path[0] in ("network", "lpips", "weights"):
            continue  # one of them was not measured with any, so no number of it is shared
        if one != other:
            raise UsageError(f"results cannot be compared: the {what} differs ({_short(one)} and {_short(other)})")
    if a["data"]["images"] != b["data"]["images"]:
        counts = f"{a['data']['images']} and {b['data']['images']}"
        raise UsageError(
            f"results cannot be compared: Fréchet distances and scores depend on the number, {counts} images"
        )
    shared = [name for name in a["metrics"] if name in b["metrics"]]
    return {name: _difference(a, b, name) for name in shared}


def check_free(path: str | Path | None) -> None:
    """Refuses to write a result over anything but an earlier one, such as a picture or a model's `config.json`.

    Raises:
        UsageError: `path` is a folder, or a file that is no result.
    """
    path = None if path is None else Path(path)
    if path is None or not path.exists():
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file for the result")
    try:
        ours = not {"metrics", "usage"}.isdisjoint(checkpoint.read_json(path))
    except UsageError:
        ours = False
    if not ours:
        raise UsageError(f"{path} exists and is no result, and would be overwritten; give another file")


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, atomically; what is no number (an infinite PSNR) becomes null."""
    with checkpoint.atomic(path) as partial:
        partial.write_text(json.dumps(_plain(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", defer_build=True)


Number = Annotated[float, Field(allow_inf_nan=False)] | None


class _Named(_Model):
    name: str


class _Network(_Model):
    name: str
    fingerprint: str
    resize: str


class _Data(_Model):
    images: int = Field(ge=0)
    fingerprint: str


class _Result(_Model):
    """The required fields of a result file; others are allowed."""

    kind: Literal["reconstruction", "generation"]
    metrics: dict[str, Number]
    intervals: dict[str, dict[str, Number]] = {}
    warnings: list[str] = []
    protocol: _Named
    network: _Network | None = None
    lpips: dict[str, str] | None = None
    weights: dict[str, dict[str, Any]] | None = None
    reference: dict[str, Any] | None = None
    data: _Data


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads what `write_result` wrote.

    Raises:
        UsageError: there is no such file, or it holds no result.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give a result of `lexel evaluate --json`")
    result = checkpoint.read_json(path)
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is no result of `lexel evaluate`: {where[:80]}: {first['msg']}") from None
    return {"intervals": {}, "warnings": [], **result}


def as_result(
    identity: Mapping[str, Any],
    protocol: Protocol,
    source: Source,
    visited: Visited,
    values: Values,
    warnings: list[str],
    where: Runtime,
    started: float,
) -> dict[str, Any]:
    """A result as plain data.

    Args:
        identity: kind, network, tokenizer, tokens, weights and precision of the evaluation.
        protocol: the conventions.
        source: the images.
        visited: which of them were measured.
        values: the numbers.
        warnings: beside those of the numbers.
        where: the device.
        started: `time.monotonic()` at the start.
    """
    if visited.unreadable:
        left_out = f"{len(visited.unreadable)} images could not be read and were left out"
        warnings = [*warnings, f"{left_out}; {first_reason(visited.unreadable)}"]
    weights = {name: about for name, about in identity["weights"].items() if about}
    return {
        "kind": identity["kind"],
        "metrics": values.metrics,
        "intervals": values.intervals,
        "warnings": [*broadcast(warnings), *values.warnings],
        "protocol": _plain(protocol.table()),
        "network": identity["network"],
        "lpips": weights.pop("lpips", None),
        "weights": weights,
        "tokenizer": identity.get("tokenizer"),
        "tokens": identity.get("tokens"),
        "data": {
            "images": visited.count,
            "fingerprint": visited.fingerprint,
            "size": list(source.size),
            "unreadable": counted(visited.unreadable),
        },
        "versions": {**versions(), "commit": commit()},
        "device": str(where.device),
        "machine": machine(where.device),
        "precision": identity["precision"],
        "processes": processes(),
        "seconds": round(time.monotonic() - started, 1),
    }


def versions() -> dict[str, str]:
    """The versions of what a result was made with."""
    python = platform.python_version()
    return {"lexel": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": python}


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> Difference:
    one, other = a["metrics"][name], b["metrics"][name]
    gap = None if one is None or other is None else other - one
    spans = [result["intervals"].get(name, {}) for result in (a, b)]
    if not all(span.get(end) is not None for span in spans for end in ("low", "high")):
        return Difference(one, other, gap, None)
    return Difference(one, other, gap, spans[0]["high"] < spans[1]["low"] or spans[1]["high"] < spans[0]["low"])


def _at(result: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = result
    for name in path:
        value = None if value is None else value.get(name)
    return value


def _plain(value: Any) -> Any:
    """Lists for tuples, as a file gives them back, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) > 24 else text
