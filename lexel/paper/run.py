"""Trains and measures the rows of the tables one after the other, and writes the page after each."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexel import __version__
from lexel.compare.run import METRICS, train_and_measure
from lexel.data import ImageSet
from lexel.data.config import open_data
from lexel.evaluate import write_result
from lexel.loading import load_tokenizer
from lexel.paper.generators import encode, train_and_measure_generator
from lexel.paper.page import write_html
from lexel.paper.plan import OWN, TablesPlan, base_recipes, choose_tables, make_plan, read_tables
from lexel.spacing import evenly_spaced
from lexel.train.session import Progress

LIMIT = 512  # held-out pictures that rows are measured on
SAMPLES = 256  # pictures that a generator samples to be measured


class TablesResult(NamedTuple):
    """The page and the numbers of the tables."""

    page: Path  # tables.html
    results: dict[str, dict[str, Any]]  # by "tokenizers/NAME" and "generators/NAME", as in tables.json
    finished: bool  # False when time ran out or a signal ended it: the same call goes on from there


def run_tables(
    data: str,
    out: str | Path,
    *,
    tables: str | Path = OWN,
    only: Sequence[str] = (),
    size: int | None = None,
    steps: int | None = None,
    generator_steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    limit: int = LIMIT,
    samples: int = SAMPLES,
    metrics: Sequence[str] = METRICS,
    overrides: Sequence[str] = (),
    generator_overrides: Sequence[str] = (),
    device: str = "auto",
    progress: Callable[[int, int, str, Progress], None] | None = None,
) -> TablesResult:
    """Runs reduced tables of the paper on your pictures, and writes them beside the published ones; resumable.

    Args:
        data: pictures, as `data.source` takes them; with classes where a generator shall learn classes.
        out: a folder: `tokenizers/NAME` and `generators/NAME` for each run, `tokens/NAME`, `tables.json`,
            `tables.html`.
        tables: a file as `lexel/paper/tables.toml`.
        only: names of tables; all by default.
        size: pixels a side; the base recipe's by default.
        steps, generator_steps: of every tokenizer and generator; the base recipes' by default.
        minutes: begins no further run after so many; the same call goes on.
        seed: of weights, data order and samples.
        limit: held-out pictures, evenly spaced, that reconstructions and samples are measured on.
        samples: pictures that a generator samples.
        metrics: of tokenizers, as in `compare`.
        overrides, generator_overrides: `section.key=value` for the base recipes.
        device: "auto", "cpu", "cuda", ...
        progress: called after every step with the number of the run, of all runs, its name and where it is.

    Raises:
        UsageError: a table, recipe or folder does not fit.
    """
    out, begun = Path(out), time.monotonic()
    known = read_tables(tables)
    chosen = choose_tables(known, only)
    base = base_recipes(data, size, steps, generator_steps, seed, overrides, generator_overrides)
    training, measuring = open_data(base.recipe.data)
    measuring = measuring.subset(evenly_spaced(len(measuring), limit))
    plan = make_plan(known, base, chosen)
    classes = None if training.labels is None else len(training.classes)
    for name in plan.generators:  # refused before anything is trained
        plan.generator(name, out, classes)
    results: dict[str, dict[str, Any]] = {}
    for number, (kind, name) in enumerate(plan.runs):
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break

        def report(now: Progress, number: int = number, name: str = f"{kind}/{name}") -> None:
            if progress is not None:
                progress(number, len(plan.runs), name, now)

        folder = out / kind / name
        if kind == "tokenizers":
            result = train_and_measure(plan.tokenizers[name], folder, metrics, limit, device, report)
            if result is not None and "parameters" not in result:
                result["parameters"] = _parameters(folder) if result["stopped"] is None else None
        else:
            result = _generator(plan, name, out, training, measuring, samples, device, report)
        if result is None:
            break
        results[f"{kind}/{name}"] = result
        summary = {"lexel": __version__, "tables": plan.file.model_dump(mode="json"), "planned": len(plan.runs)}
        write_result(out / "tables.json", {**summary, "results": results})
        write_html(out, plan, results)
    return TablesResult(out / "tables.html", results, len(results) == len(plan.runs))


def _generator(
    plan: TablesPlan,
    name: str,
    out: Path,
    training: ImageSet,
    measuring: ImageSet,
    samples: int,
    device: str,
    report: Callable[[Progress], None],
) -> dict[str, Any] | None:
    row = plan.file.generators[name]
    recipe = plan.generator(name, out, None if training.labels is None else len(training.classes))
    tokenizer = out / "tokenizers" / row.tokens
    encode(tokenizer, out / "tokens" / row.tokens, training, measuring, plan.tokenizers[row.tokens].recipe.data, device)
    folder = out / "generators" / name
    return train_and_measure_generator(name, recipe, folder, measuring, row.sample, samples, device, report)


def _parameters(folder: Path) -> int:
    """Encoder, decoder, projections and codes."""
    return sum(parameter.numel() for parameter in load_tokenizer(folder).parameters())
