"""A training step of generator B beside the published code's: `python -m benchmarks step --of generator --peer`.

Both are IBQ's generator B with the same weights on the same tokens, which no tokenizer makes on the way; without
dropout their losses are compared before anything is timed.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import published
from benchmarks.step import WAYS, compared, peak_of, row
from lexel.convert import convert
from lexel.data.tokens import TokenBatch
from lexel.train import load_recipe
from lexel.train.generator import Learner
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.processes import Processes

SIDE, BATCH = 16, 2
LABELS = torch.arange(BATCH)


def batch_of(codes: int) -> TokenBatch:
    tokens = torch.randint(codes, (BATCH, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    return TokenBatch(tokens, LABELS, LABELS)


def pair(checkout: Path, overrides: list[str]) -> tuple[Any, Learner]:
    """The published generator in training, and our learner with the same weights."""
    recipe = load_recipe("generator_b", ["train.precision=float32", "train.fsdp=false", *overrides])
    assert isinstance(recipe, GeneratorRecipe)
    network: Any = recipe.generator
    torch.manual_seed(0)
    model = published.transformer(checkout, network, recipe.train.lr, recipe.train.weight_decay)
    nn.init.normal_(model.transformer.head.weight, std=0.02)  # it begins at zero
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.pt"
        torch.save({"state_dict": model.transformer.state_dict()}, path)
        named = {"transformer.heads": network.heads, "transformer.gamma_init": network.gamma_init}
        own: Any = convert(path, "ibq_generator", overrides=named).model
    return model, Learner(recipe.train, own, Processes("cpu"))


def steps_of(model: Any, learner: Learner, data: TokenBatch) -> dict[str, Callable[[], Any]]:
    config = learner.config
    return {
        WAYS[0]: partial(learner.step, data, config.lr, config.weight_decay),
        WAYS[1]: published.transformer_step(model, data.indices, LABELS),
    }


def agree(model: Any, learner: Learner, data: TokenBatch) -> None:
    """Compares the losses without dropout.

    Raises:
        SystemExit: they differ.
    """
    learner.generator.eval()
    model.eval()
    with torch.no_grad():
        ours = learner.generator(data.indices, LABELS).nll.mean()
        theirs = model.shared_step(published.as_batch(data.indices, LABELS), 0)
    if abs(float(ours) - float(theirs)) > 1e-4 * abs(float(theirs)):
        raise SystemExit(f"the loss is {float(ours):.6g} here and {float(theirs):.6g} in the published step")
    learner.generator.train()
    model.train()


def beside(checkout: Path, overrides: list[str], repeats: int) -> dict[str, Any]:
    """Time, memory, waits and operations of both steps."""
    model, learner = pair(checkout, overrides)
    data = batch_of(learner.generator.config.transformer.codebook_size)
    agree(model, learner, data)
    steps = steps_of(model, learner, data)
    entry = compared(steps, checkout, repeats)
    entry["parameters"] = sum(parameter.numel() for parameter in learner.generator.parameters())
    for way, step in steps.items():
        entry[way]["MiB"] = peak_of(step)
    return entry


def section(entry: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "",
        f"`--of generator`: IBQ's generator B ({entry['parameters'] / 1e6:.0f} million parameters, float32, batch",
        f"{BATCH}, dropout, AdamW, gradients clipped) beside its published step, from the same weights, whose losses",
        "agree without dropout; tokens are given, no tokenizer runs.",
        "",
        "| way | s a step | times Lexel's | peak MiB | waits | operations | commit | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return lines + [f"| {row(entry, way)}" for way in WAYS]
