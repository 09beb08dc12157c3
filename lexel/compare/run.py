"""Trains and measures every run of a comparison, and writes its page after the last."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from lexel import __version__
from lexel.checkpoint import read_json
from lexel.compare.page import write_html
from lexel.compare.plan import UNQUANTIZED, PlannedRun, Variant, as_table, expand
from lexel.compare.summary import HEALTH, NETWORK, summarise
from lexel.config import Config, check
from lexel.data.config import open_data
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer, write_result
from lexel.loading import load_tokenizer
from lexel.metrics.protocols import PROTOCOLS
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.runtime import PeakMemory
from lexel.train.session import Progress, TrainingResult
from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer

METRICS = ("psnr", "lpips", "usage", "frechet")
RESULT = "result.json"


class ComparisonResult(NamedTuple):
    """The page and the numbers of a comparison."""

    page: Path  # compare.html
    rows: list[dict[str, Any]]  # one for each quantizer, size and dimension, as in compare.json
    finished: bool  # False when a signal ended it early: the same call goes on from there


def compare(
    recipe: TokenizerRecipe,
    quantizers: Sequence[str],
    out: str | Path,
    *,
    codebook_sizes: Sequence[int] = (),
    dims: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    variants: Mapping[str, Variant] | None = None,
    metrics: Sequence[str] = METRICS,
    limit: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int, str, Progress], None] | None = None,
) -> ComparisonResult:
    """Trains and measures quantizers under one recipe; called again it goes on.

    Every method has its published loss weights; of the recipe's weights those of the pictures hold for all, those of
    quantizer terms only for the recipe's own quantizer, which keeps its options too. A run whose codebook collapses
    goes on to its end, since that is a result; one whose loss becomes NaN is a row that says so.

    Args:
        recipe: what to train.
        quantizers: keys of QUANTIZERS, names of `variants`, or "none": the same network without codes.
        out: a folder: `runs/NAME` for each training, `compare.json`, `compare.html`.
        codebook_sizes: numbers of codes, K; the recipe's by default.
        dims: lengths of a code, D; the recipe's by default.
        seeds: of weights and data order; the spread in the table is over them.
        variants: quantizers with options, weights or training options of their own, by name.
        metrics: some of psnr, ssim, lpips, usage, frechet, inception_score.
        limit: measures at most so many held-out pictures, evenly spaced.
        device: "auto", "cpu", "cuda", ...
        progress: called after every step with the number of the training, of all trainings, its name and where it is.

    Raises:
        UsageError: the recipe with one of the quantizers does not work (nothing is trained then), or a run folder
            belongs to another recipe.
    """
    runs = expand(recipe, quantizers, codebook_sizes, dims, seeds, variants or {})
    out = Path(out)
    results: list[dict[str, Any]] = []
    finished = True
    for number, planned in enumerate(runs):
        folder = out / "runs" / planned.name

        def report(now: Progress, number: int = number, name: str = planned.name) -> None:
            if progress is not None:
                progress(number, len(runs), name, now)

        result = train_and_measure(planned, folder, metrics, limit, device, report)
        if result is None:
            finished = False
            break
        results.append(result | gradient_health(folder))
        write_json(out, recipe, results, len(runs))
    if results:
        write_html(out, recipe, results, len(runs))
    return ComparisonResult(out / "compare.html", summarise(results), finished)


class FinishedRun(Config, extra="allow"):
    """The required fields of the result of a run that was trained and measured; others are allowed."""

    name: str
    recipe: dict[str, Any]
    asked: Any
    stopped: str | None
    metrics: dict[str, float | None]


class Finished(FinishedRun):
    """The required fields of a run's result in a comparison."""

    quantizer: str
    codebook_size: int = Field(ge=1)
    codebook_dim: int = Field(ge=1)
    seed: int
    asked: list[Any]
    bits: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None


def read_finished(path: Path, form: type[Config] = Finished) -> dict[str, Any]:
    """The result of a training that an earlier call finished.

    Raises:
        UsageError: it is damaged.
    """
    result = read_json(path)
    check(result, form, f"{path} is damaged; delete it to train and measure that run again")
    return result


def earlier_result(folder: Path, recipe: Config, asked: Any, form: type[Config]) -> dict[str, Any] | None:
    """The result that an earlier call left in a run folder; None where there is none.

    Raises:
        UsageError: it is damaged, or is that of another recipe or measurement.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_finished(path, form)
    before = result["recipe"]
    with contextlib.suppress(UsageError):  # options that came later have their defaults
        before = as_table(check(before, type(recipe), str(path)))
    if before != as_table(recipe) or result["asked"] != asked:
        raise UsageError(f"{folder} holds a result of another recipe or measurement; choose another folder")
    return result


def result_of(
    folder: Path,
    recipe: Config,
    asked: Any,
    facts: Mapping[str, Any],
    train: Callable[[], TrainingResult[Any]],
    measure: Callable[[], Mapping[str, Any]],
    form: type[Config] = FinishedRun,
) -> dict[str, Any] | None:
    """A run's result: an earlier call's, else after training and measuring; None where a signal ended the training.

    Args:
        folder: of the run, where the result is kept.
        recipe: of the run.
        asked: what is measured; a result of something else is refused.
        facts: what is known of the run before.
        train: trains it.
        measure: called once it is trained: `metrics` and whatever else there is to tell.
        form: the fields that a result must have.

    Raises:
        UsageError: an earlier result is damaged, or is that of another recipe or measurement.
    """
    earlier = earlier_result(folder, recipe, asked, form)
    if earlier is not None:
        return earlier
    result = {**facts, "recipe": as_table(recipe), "asked": asked, "stopped": None}
    memory = PeakMemory()
    try:
        trained = train()
    except TrainingStopped as stopped:
        result |= {"stopped": str(stopped), "metrics": {}}
    else:
        if not trained.finished:
            return None
        result["peak_memory_bytes"] = memory.read(next(trained.model.parameters()).device)
        result["images_per_second"] = RunFolder.read(folder).last_lines("train")[-1]["images_per_second"]
        result |= measure()
    write_result(folder / RESULT, result)
    return read_json(folder / RESULT)


def train_and_measure(
    planned: PlannedRun,
    folder: Path,
    metrics: Sequence[str],
    limit: int | None,
    device: str,
    progress: Callable[[Progress], None],
) -> dict[str, Any] | None:
    """Trains and measures one run, or reads its result if it is finished; None where a signal ended the training."""
    recipe = planned.recipe

    def measure() -> dict[str, Any]:
        tokenizer = load_tokenizer(folder)
        quantizer = tokenizer.quantizer
        coded = recipe.model.quantizer["kind"] != UNQUANTIZED
        measured = evaluate_tokenizer(
            tokenizer,
            open_data(recipe.data)[1],
            replace(PROTOCOLS["lexel"], transform=recipe.data.transform, lpips=("vgg",)),
            size=recipe.data.size,
            metrics=[name for name in metrics if coded or name != "usage"],
            network=NETWORK,
            limit=limit,
            batch_size=recipe.train.batch_size,
            device=device,
            workers=recipe.data.workers,
        )
        return {
            "bits": (quantizer.books or 1) * math.log2(quantizer.codebook_size) if coded else None,
            "metrics": measured["metrics"],
            "intervals": measured["intervals"],
            "warnings": measured["warnings"],
            "images": measured["data"]["images"],
        }

    return result_of(
        folder,
        recipe,
        [sorted(metrics), limit],
        {
            "name": planned.name,
            "quantizer": planned.label,
            "codebook_size": planned.codebook_size,
            "codebook_dim": planned.codebook_dim,
            "seed": planned.seed,
        },
        lambda: train_tokenizer(recipe, folder, device=device, progress=progress),
        measure,
        Finished,
    )


def gradient_health(folder: Path) -> dict[str, float]:
    """The encoder's gradient at the last validation of a run, beside the decoder's."""
    validations = RunFolder.read(folder).last_lines("validation")
    return {name: validations[-1][name] for name in HEALTH if validations and name in validations[-1]}


def write_json(out: Path, recipe: TokenizerRecipe, results: Sequence[Mapping[str, Any]], planned: int) -> None:
    """Writes `compare.json`: the recipe, the rows of the table, and every run's result."""
    summary = {"lexel": __version__, "recipe": as_table(recipe), "planned": planned}
    write_result(out / "compare.json", {**summary, "rows": summarise(results), "runs": list(results)})
