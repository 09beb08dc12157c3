"""Training of tokenizers and generators: a recipe in, a run folder out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel import config

if TYPE_CHECKING:
    from lexel.generators import Generator
    from lexel.tokenizer import Tokenizer
    from lexel.train.generator_recipe import GeneratorRecipe
    from lexel.train.recipes import TokenizerRecipe
    from lexel.train.session import StepCallback, TrainingResult

    Recipe = TokenizerRecipe | GeneratorRecipe


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
    """A tokenizer's recipe, or a generator's if it has a `generator` section: a TOML file, or the name of Lexel's own.

    Args:
        source: the path or the name.
        overrides: `section.key=value`, see `lexel.config.override`.

    Raises:
        UsageError: there is no such recipe, or it holds a key or value that is not known.
    """
    path = config.find_recipe(source)
    table = config.read(path)
    model: type[TokenizerRecipe] | type[GeneratorRecipe]
    if "generator" in table:
        from lexel.train.generator_recipe import GeneratorRecipe as model
    else:
        from lexel.train.recipes import TokenizerRecipe as model
    return config.check(config.override(table, overrides, model), model, path.name)


def train(
    recipe: "Recipe",
    out: str | Path,
    *,
    device: str = "auto",
    initial: "Tokenizer | Generator | None" = None,
    progress: "StepCallback | None" = None,
) -> "TrainingResult[Tokenizer] | TrainingResult[Generator]":
    """Trains what the recipe describes and writes `report.html`; the same call again goes on, bit for bit.

    Args:
        recipe: from `load_recipe`.
        out: the run folder.
        device: "auto", "cpu", "cuda", ...; a distributed launch decides itself.
        initial: the model behind the recipe's `init.source`, of the recipe's kind, if it was loaded already.
        progress: called after every step.

    Returns:
        The model, and whether it is `finished`: False where a signal ended it early and the same call would go on.

    Raises:
        UsageError: the recipe, the data or the run folder do not allow it.
        TrainingStopped: going on would spoil the run; the last good checkpoint is kept.
    """
    from lexel.distributed import launched_rank
    from lexel.report import write_report
    from lexel.train.recipes import TokenizerRecipe

    loop: Any
    if isinstance(recipe, TokenizerRecipe):
        from lexel.train.tokenizer import train_tokenizer as loop
    else:
        from lexel.train.generator import train_generator as loop
    result: TrainingResult[Tokenizer] | TrainingResult[Generator]
    result = loop(recipe, out, device=device, initial=initial, progress=progress)
    if launched_rank() == 0:
        write_report(out)
    return result
