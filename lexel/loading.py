"""`lexel.load`: the model behind a name, be it a run, a folder, a published checkpoint or a hub id."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lexel import checkpoint, provenance
from lexel.config import check
from lexel.data import TRANSFORMS, Transform
from lexel.errors import UsageError, unknown
from lexel.model_folder import FILES_OF_GENERATORS, GENERATOR
from lexel.registry import lookup
from lexel.regular import expanded
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:  # generators and published layouts are imported where a source is one
    from lexel.generators import Generator

RUN_WEIGHTS = ("average", "live", "best")


def load(
    source: str | Path,
    family: str | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> "Tokenizer | Generator":
    """Any model, in evaluation mode: of a run, a model folder, a published checkpoint, or a hub id.

    Args:
        source: a run folder (finished or not), a checkpoint of a run, a model folder, a published checkpoint file or
            folder, or a hub id (owner/name, or owner/name/FILE for one of several files).
        family: the layout of a published checkpoint; needed where tensor names fit several.
        weights: of a run: "average" or "live" weights of its newest step, or those of the "best" validation; the
            default is "average" where the run keeps averages, as all of tokenizers do. Of a published checkpoint:
            "average" or "live", by default the averages where there are any. A model folder has one set of weights.
        overrides: options that a published file does not tell, such as {"autoencoder.groups": 16}.

    Raises:
        UsageError: nothing is there, the family is unknown or unclear, the file is not whole or not safe, or the
            source has no such weights.
    """
    run = None if family is not None else find_run(source)
    if run is None and (family is not None or not _is_ours(source)):
        checkpoint.check_there(source)
        from lexel.convert import convert

        return convert(source, family, weights, overrides).model
    if overrides:
        raise UsageError(f"{source} is a model of Lexel's; overrides apply to published checkpoints only")
    if run is not None:
        return load_run(run, weights, _step(source))
    if weights is not None:
        raise UsageError(
            f"{source} is no run with checkpoints: a model folder has one set of weights, so there are no {weights!r} "
            "weights to choose"
        )
    return load_folder(source)


def load_tokenizer(source: str | Path, weights: str | None = None) -> Tokenizer:
    """`load` where a tokenizer is needed.

    Raises:
        UsageError: as `load`, or the source holds a generator.
    """
    model = load(source, weights=weights)
    if not isinstance(model, Tokenizer):
        raise UsageError(f"{source} holds a generator; a tokenizer is needed here")
    return model


def load_generator(source: str | Path, weights: str | None = None) -> "Generator":
    """`load` where a generator is needed.

    Raises:
        UsageError: as `load`, or the source holds a tokenizer.
    """
    model = load(source, weights=weights)
    if isinstance(model, Tokenizer):
        raise UsageError(f"{source} holds a tokenizer; a generator is needed here")
    return model


def find_run(source: str | Path) -> RunFolder | None:
    """The run with checkpoints that a path names, by its folder or by one of its checkpoints."""
    path = expanded(source)
    folder = path.parent.parent if path.is_file() else path
    if path.is_file() and path.parent != RunFolder(folder, writes=False).checkpoints:
        return None
    run = RunFolder.read(folder)
    return run if run.recipe.is_file() and run.steps() else None


def load_run(run: RunFolder, weights: str | None = None, step: int | None = None) -> "Tokenizer | Generator":
    """The model of a run: its newest state, unless `weights` or `step` says otherwise.

    Args:
        run: with at least one checkpoint.
        weights: see `load`.
        step: of a checkpoint; the newest, or the best, by default.

    Raises:
        UsageError: there is no checkpoint for these weights, or it cannot be read.
    """
    recipe = run.read_recipe()
    averaged = "generator" not in recipe or (recipe.get("train") or {}).get("average_decay") is not None
    default = "average" if averaged else "live"
    weights = weights or default
    if weights not in RUN_WEIGHTS:
        raise unknown("weights", weights, RUN_WEIGHTS)
    steps = run.steps()
    if weights == default and step is None and run.export_is_current():
        return load_folder(run.path)
    if step is None:
        step = run.best_step() if weights == "best" else steps[-1]
    if step not in steps:
        raise UsageError(f"{run.path} has no checkpoint for weights = {weights!r}; it has steps {steps}")
    path = run.checkpoint(step)
    state = run.load(step)
    model: Tokenizer | Generator
    if "generator" in recipe:
        from lexel import generators

        if weights == "average" and not averaged:
            raise UsageError(
                f"{run.path} is a generator's run without train.average_decay, which keeps no averages; "
                "choose from live, best"
            )
        config = generators.read_config(_part(state, "config", path), str(path))
        live = weights == "live" or not averaged
        tensors = _part(state, "model", path) if live else _averaged(_part(state, "average", path))
        model = generators.Generator.with_weights(config, tensors, path)
        model.find_tokenizer_in(run.path)
        beside = (recipe.get("data") or {}).get("tokenizer")
        if not model.has_tokenizer() and isinstance(beside, str) and expanded(beside).exists():
            model.use_tokenizer(load_tokenizer(beside))
    else:
        tokenizer_config = check(recipe.get("model", {}), TokenizerConfig, str(run.recipe))
        tensors = _part(state, "model", path) if weights == "live" else _averaged(_part(state, "average", path))
        model = Tokenizer.with_weights(tokenizer_config, tensors, path)
    model.provenance = provenance.of_run(recipe, step, weights)
    return model


def load_folder(source: str | Path) -> "Tokenizer | Generator":
    """A tokenizer or generator from a Lexel folder or hub id, by its `config.json`."""
    folder = checkpoint.find_folder(source, FILES_OF_GENERATORS)  # with the tokenizer, if there is one
    config, tensors = checkpoint.load_folder(folder)
    if config.get("model") == GENERATOR:
        from lexel.generators import Generator

        return Generator.from_folder(folder, config, tensors)
    return Tokenizer.from_folder(folder, config, tensors)


def own_transform(tokenizer: Tokenizer, size: int | None = None, name: str | None = None) -> Transform:
    """The transform that a tokenizer was trained with, or one of another size or name.

    Args:
        tokenizer: its provenance has size and transform; 256 and "published" where it has not.
        size: pixels a side.
        name: a key of `lexel.data.TRANSFORMS`.

    Raises:
        UsageError: there is no such transform, or the tokenizer takes no pictures of that size.
    """
    name = name or tokenizer.provenance.get("transform", "published")
    return lookup(TRANSFORMS, name, "transform")(size or tokenizer.provenance.get("size", 256))


def _step(source: str | Path) -> int | None:
    """The step of a checkpoint's path; None for a folder."""
    path = expanded(source)
    return int(path.stem) if path.is_file() and path.stem.isdecimal() else None


def _part(state: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A table of a training state."""
    part = state.get(name)
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
        raise UsageError(f"{path} is no checkpoint of a run: it has no table {name!r}")
    return part


def _averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the state of an AveragedModel."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if name.startswith("module.")}


def _is_ours(source: str | Path) -> bool:
    """Whether a folder or hub repository is a Lexel model, or what is left of one."""
    path = expanded(source)
    if path.is_dir():
        if (path / checkpoint.CONFIG).is_file():
            return "lexel" in checkpoint.read_json(path / checkpoint.CONFIG)
        weights = [file.name for file in path.iterdir() if file.name.endswith(checkpoint.ENDINGS)]
        return weights in ([], [checkpoint.WEIGHTS])
    if isinstance(source, str) and not path.exists() and checkpoint.HUB_ID.fullmatch(source):
        config = checkpoint.find_folder(source, [checkpoint.CONFIG]) / checkpoint.CONFIG
        return config.is_file() and "lexel" in checkpoint.read_json(config)
    return False
