"""Provenance of weights that may be published: names of data and files without a machine's folders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lexel import __version__
from lexel.config import check
from lexel.errors import UsageError
from lexel.regular import expanded

REMOTE = re.compile(r"(\w+:)?(\w+)://")  # a source that is no path here: s3://, https://, tar:https://
KIND = re.compile(r"[a-z][\w-]+:")  # what a source is, before its path: tar:shards/{0..9}.tar
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


def public_name(source: str | Path) -> str:
    """The name of a data set or file without its folders; hub ids stay, addresses lose their user and query."""
    text = str(source)
    if REMOTE.match(text):
        return re.sub(r"(://)[^/@]*@", r"\1", text).split("?")[0]
    kind = KIND.match(text)
    if kind and not Path(text).exists():
        return kind[0] + ",".join(public_name(part) for part in text[kind.end() :].split(","))
    path = expanded(text)
    if path.exists():
        return path.resolve().name
    if HUB.fullmatch(text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def without_folders(table: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, or another nested table, in which every text with a folder in it has its name only."""
    return {name: _without_folders(value) for name, value in table.items()}


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_folders(value)
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return public_name(value) if isinstance(value, str) and re.search(r"[/\\]", value) else value


def of_run(recipe: Mapping[str, Any], step: int, weights: str) -> dict[str, Any]:
    """The provenance of a run's weights.

    Args:
        recipe: the run's recipe as tables.
        step: of the weights.
        weights: "average", "live" or "best".
    """
    data = recipe.get("data", {})
    source = (data.get("images") or {}).get("source") or data.get("tokens") or data.get("source")
    facts = {"lexel": __version__, "data": None if source is None else public_name(source)}
    facts |= {name: data[name] for name in ("size", "transform") if "generator" not in recipe and name in data}
    return facts | {"step": step, "weights": weights}


class Provenance(BaseModel):
    """The fields of a provenance that commands read; others are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    size: Annotated[int, Field(ge=1, le=2**20)] | None = None  # pixels a side of the images it was trained with
    transform: str | None = None
    step: Annotated[int, Field(ge=0, le=2**53)] | None = None
    weights: str | None = None


def of_folder(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The provenance in a `config.json`, checked.

    Args:
        config: what the file says.
        source: names it in errors.

    Raises:
        UsageError: a value is of a wrong type.
    """
    table = config.get("provenance") or {}
    if not isinstance(table, dict):
        raise UsageError(f"{source}: provenance is no table")
    check(table, Provenance, f"{source}: provenance")
    return {name: value for name, value in table.items() if value is not None or name not in Provenance.model_fields}
