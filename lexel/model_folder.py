"""Folders of models: what `config.json` says beside a model's options, written and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lexel import __version__, checkpoint
from lexel.errors import UsageError

BESIDE = ("model", "lexel", "provenance")  # the names that are no options


def save(
    folder: str | Path,
    kind: str,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Writes a model folder; see `checkpoint.save_folder`.

    Args:
        folder: made if it does not exist.
        kind: "tokenizer" or "generator".
        options: of the model's configuration.
        tensors: its weights.
        provenance: where they come from.
    """
    config = {"model": kind, "lexel": __version__, **options, "provenance": dict(provenance)}
    checkpoint.save_folder(folder, config, tensors)


def options_of(config: Mapping[str, Any], kind: str, source: str | Path) -> dict[str, Any]:
    """The options in a `config.json`, not checked yet.

    Raises:
        UsageError: `source` holds a model that is not of this kind.
    """
    if config.get("model") != kind:
        raise UsageError(f"{source} holds a {config.get('model', 'model of another library')}, not a {kind}")
    return {name: value for name, value in config.items() if name not in BESIDE}
