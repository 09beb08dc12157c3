"""Arithmetic and kept memory of a tokenizer's training step, counted without weights or data: a model, not a time."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lexel.memory import decodable, encoded
from lexel.runtime import without_weights
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.plan import kept_for_backward, networks_of
from lexel.train.recipes import TokenizerRecipe


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", default=["ibq_262144"], help="of tokenizers: names or files")


def counted(recipe: TokenizerRecipe) -> list[tuple[str, float, float | None]]:
    """Parts of a step for an image: name, GFLOP of the forward pass (two for a multiply-add), GiB kept in float32."""
    networks = networks_of(recipe)
    tokenizer = networks["tokenizer"]
    assert isinstance(tokenizer, Tokenizer)
    found: list[tuple[str, float, float | None]] = []

    def count(name: str, module: nn.Module, call: Callable[[Any], Any], inputs: Tensor) -> Any:
        with without_weights(), FlopCounterMode(display=False) as counter:
            result, kept = kept_for_backward(module, call, inputs)
        found.append((name, counter.get_total_flops() / 1e9, kept / 2**30))
        return result

    with without_weights():
        images = torch.empty(1, recipe.data.channels, recipe.data.size, recipe.data.size)
    z = count("encoder", tokenizer, partial(encoded, tokenizer), images)
    with without_weights():
        codes = decodable(tokenizer, z)
    count("decoder", tokenizer, tokenizer.decoder, codes)
    if "discriminator" in networks:
        count("discriminator", networks["discriminator"], networks["discriminator"], images)
    places = tokenizer.token_spec(recipe.data.size, recipe.data.size).shape
    codes_and_dims = tokenizer.codebook_size * tokenizer.quantizer.codebook_dim
    found.append((f"search, {math.prod(places)} tokens", 2 * math.prod(places) * codes_and_dims / 1e9, None))
    return found


def run(arguments: argparse.Namespace) -> None:
    """Prints a table for each recipe."""
    for name in arguments.recipes:
        recipe = load_recipe(name)
        if not isinstance(recipe, TokenizerRecipe):
            raise SystemExit(f"{name} is no recipe of a tokenizer; `lexel train {name} --dry-run` counts its memory")
        print(f"\n{name}, an image of {recipe.data.size} pixels\n")
        print("| part | GFLOP, forward | GiB kept for the backward pass, float32 |\n|---|---|---|")
        for part, flop, kept in counted(recipe.resolved()):
            print(f"| {part} | {flop:.1f} | {'' if kept is None else f'{kept:.2f}'} |")
