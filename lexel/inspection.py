"""Inspection of a run, a model or a recipe: parameters, provenance, health of the codebook."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lexel.checkpoint import CONFIG
from lexel.config import own_recipes
from lexel.errors import UsageError
from lexel.quantizers import outline
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.plan import count_parameters, networks_of
from lexel.train.recipes import TokenizerRecipe

if TYPE_CHECKING:
    from lexel.generators import Generator  # a tokenizer's recipe does without the generators

SAMPLED = 4096  # codes among which the nearest neighbours are looked for


def inspect(source: str | Path) -> dict[str, Any]:
    """The facts about a source as plain data; `findings` (see `lexel.metrics.health.diagnose`) where there is a run.

    Args:
        source: a run folder, a model folder, a published checkpoint, a hub id; or a recipe, by path or by name, which
            is built on the meta device.

    Raises:
        UsageError: it is none of these.
    """
    path = Path(source)
    if path.suffix == ".toml" or (not path.exists() and str(source) in own_recipes()):
        return _of_recipe(source)
    run = RunFolder(path, writes=False)
    if path.is_dir() and run.recipe.is_file():
        return _of_run(run)
    from lexel.loading import load

    model = load(source)
    return _of_tokenizer(model) if isinstance(model, Tokenizer) else _of_generator(model)


def _of_recipe(source: str | Path) -> dict[str, Any]:
    recipe = load_recipe(source)
    networks = networks_of(recipe)
    facts: dict[str, Any] = {"kind": "recipe"}
    if isinstance(recipe, TokenizerRecipe):
        tokenizer = networks["tokenizer"]
        assert isinstance(tokenizer, Tokenizer)
        facts |= _shape(tokenizer)
    else:
        facts |= {**recipe.generator.model_dump(mode="json"), "family": recipe.generator.kind, "kind": "recipe"}
    facts["parameters"] = _count(next(iter(networks.values())))  # of what is trained, without what only helps
    return facts | {f"parameters of the {name}": count for name, count in count_parameters(networks).items()}


def _of_run(run: RunFolder) -> dict[str, Any]:
    """A run is looked at even before its first checkpoint: its log is enough for a verdict."""
    from lexel.loading import load_generator, load_tokenizer
    from lexel.metrics.health import diagnose

    recipe = load_recipe(run.recipe)
    contents = run.contents()
    train, validation = contents.train, contents.validation
    facts: dict[str, Any] = {"steps done": max((line["step"] for line in [*train[-1:], *validation[-1:]]), default=0)}
    saved = bool(run.steps()) or (run.path / CONFIG).is_file()
    if not isinstance(recipe, TokenizerRecipe):
        found = _of_generator(load_generator(run.path)) if saved else {"kind": "generator"}
        return found | facts | _last(validation)
    found = _of_tokenizer(load_tokenizer(run.path)) if saved else {"kind": "tokenizer"}
    coded = [line for line in validation if {"usage", "perplexity"} <= line.keys()]  # continuous latents have no codes
    findings = diagnose(outline(recipe.model.quantizer), coded, train) if coded or not validation else []
    return found | facts | _last(validation) | {"findings": [finding._asdict() for finding in findings]}


def _last(validation: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"step", "kind", "seconds"}
    return {} if not validation else {name: value for name, value in validation[-1].items() if name not in names}


def _shape(tokenizer: Tokenizer) -> dict[str, Any]:
    quantizer = tokenizer.quantizer
    return {
        "quantizer": tokenizer.config.quantizer["kind"],
        "codebook size": quantizer.codebook_size,
        "codebook dimension": quantizer.codebook_dim,
        "downsampling": tokenizer.downsampling,
    }


def _of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    facts = {"kind": "tokenizer", **_shape(tokenizer), "parameters": _count(tokenizer)}
    facts |= _codebook(tokenizer)
    return facts | {f"provenance: {name}": value for name, value in tokenizer.provenance.items()}


def _codebook(tokenizer: Tokenizer) -> dict[str, Any]:
    """Lengths of the codes, and how near the nearest other code is among a sample: 0 means that codes are equal."""
    try:
        codebook = tokenizer.quantizer.codebook.detach().float()
    except UsageError:  # too many codes for a table
        return {}
    codes = codebook.flatten(0, -2)
    norms = codes.norm(dim=1)
    sample = codes[:: -(-len(codes) // SAMPLED)]
    distances = torch.cdist(sample, sample).fill_diagonal_(torch.inf).amin(1)
    return {
        "code norms (least, mean, most)": " ".join(
            f"{value:.4g}" for value in (norms.min(), norms.mean(), norms.max())
        ),
        "distance to the nearest other code (least, median)": f"{distances.min():.4g} {distances.median():.4g}",
    }


def _of_generator(generator: "Generator") -> dict[str, Any]:
    network = generator.config.transformer
    facts = {**network.model_dump(mode="json"), "family": network.kind, "kind": "generator"}
    facts |= {"parameters": _count(generator), "tokenizer": generator.config.tokenizer}
    return facts | {f"provenance: {name}": value for name, value in generator.provenance.items()}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
