"""Training of tokenizers and generators: a recipe in, a run folder out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lexel import config

if TYPE_CHECKING:
    from lexel.generators import Generator
    from lexel.tokenizer import Tokenizer
    from lexel.train.generator import GeneratorRecipe, TrainedGenerator
    from lexel.train.run import ProgressCallback
    from lexel.train.tokenizer import TokenizerRecipe, Trained

    Recipe = TokenizerRecipe | GeneratorRecipe


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
    """A tokenizer's recipe, or a generator's if it has a `generator` section: a TOML file, or the name of Lexel's own.

    Raises:
        UsageError: there is no such recipe, or it holds a key or value that is not known.
    """
    path = config.find_recipe(source)
    table = config.read(path, overrides)
    if "generator" in table:
        from lexel.train.generator import GeneratorRecipe

        return config.check(table, GeneratorRecipe, path.name)
    from lexel.train.tokenizer import TokenizerRecipe

    return config.check(table, TokenizerRecipe, path.name)


def train(
    recipe: "Recipe",
    out: str | Path,
    *,
    device: str = "auto",
    initial: "Tokenizer | Generator | None" = None,
    progress: "ProgressCallback | None" = None,
) -> "Trained | TrainedGenerator":
    """Trains what the recipe describes; not `finished` where a signal ended it early and the same call would go on.

    `initial` is the model behind the recipe's `init.source`, of the recipe's kind, where that is no Lexel folder.
    """
    from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer

    if isinstance(recipe, TokenizerRecipe):
        tokenizer = cast("Tokenizer | None", initial)
        return train_tokenizer(recipe, out, device=device, initial=tokenizer, progress=progress)
    from lexel.train.generator import train_generator

    generator = cast("Generator | None", initial)
    return train_generator(recipe, out, device=device, initial=generator, progress=progress)
