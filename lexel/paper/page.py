"""The page of the tables: what was measured here beside what was published, and the pictures behind it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lexel.compare.summary import COLUMNS, NETWORK
from lexel.compare.summary import COSTS as SHARED_COSTS
from lexel.paper.generators import pictures
from lexel.paper.plan import Table, TablesPlan
from lexel.report import Section, labelled_rows, write_page
from lexel.run_folder import RunFolder

SHOWN = 8  # pictures of a row
FRECHET = f"fd_{NETWORK}"
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f}M"),
    **{name: COLUMNS[name] for name in SHARED_COSTS},
}
GENERATED: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits_per_token": ("bits a token ↓", "{:.2f}".format),
    "histogram_bits": ("of the histogram", "{:.2f}".format),
    FRECHET: COLUMNS[FRECHET],
    "precision": ("precision ↑", "{:.2f}".format),
    "recall": ("recall ↑", "{:.2f}".format),
    "seconds_per_image": ("s to sample one", "{:.2g}".format),
}
RECONSTRUCTED = {name: COLUMNS[name] for name in ("psnr", "lpips_vgg", FRECHET, "usage", "perplexity")}
NOTE = (
    "Columns in brackets are the papers', on ImageNet at 256 x 256 with hundreds of times the pictures and steps: "
    "compare the order of rows, not the numbers. The Fréchet distance is taken in the named network and is no FID."
)


def rows(table: Table, results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A table as text, the first row being the head: measured numbers, then the published ones."""
    columns = {**(RECONSTRUCTED if table.of == "tokenizers" else GENERATED), **COSTS}
    flat = [_numbers(results.get(f"{table.of}/{row.run}")) for row in table.rows]
    shown = [name for name in columns if any(numbers.get(name) is not None for numbers in flat)]
    lines = [["", *(columns[name][0] for name in shown), *(f"({title})" for title in table.columns)]]
    for row, numbers in zip(table.rows, flat, strict=True):
        cells = ["-" if numbers.get(name) is None else columns[name][1](numbers[name]) for name in shown]
        lines.append([row.name, *cells, *row.published])
    return lines


def _numbers(result: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if result is None else {**result, **result["metrics"]}


def write_html(out: Path, plan: TablesPlan, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `tables.html` from the runs that are finished."""
    sections = []
    for name in plan.chosen:
        table = plan.file.tables[name]
        if not any(f"{table.of}/{row.run}" in results for row in table.rows):
            continue
        stopped = [
            f"{row.name}: {results[f'{table.of}/{row.run}']['stopped']}"
            for row in table.rows
            if results.get(f"{table.of}/{row.run}", {}).get("stopped")
        ]
        text = f"Published: {table.source}." + "".join(f" Ended early: {note}." for note in stopped)
        found = _pictures(out, table, results)
        figures = [labelled_rows(found)] if found else []
        sections.append(Section(table.title, text, table=rows(table, results), figures=figures, wide=True))
    first = next(iter(plan.tokenizers.values())).recipe
    lead = (
        f"{first.data.source} at {first.data.size} pixels; {first.train.steps:,} steps of {first.train.batch_size} "
        f"pictures for each tokenizer. {len(results)} of {len(plan.runs)} trainings are done. {NOTE}"
    )
    again = "\n".join(f"lexel train {key}/recipe.toml --out again/{key}" for key in results)
    sections.append(Section("Run a row again", "From this folder; each recipe is complete by itself.", code=again))
    write_page(out / "tables.html", "The paper's tables, small", lead, sections)


def _pictures(out: Path, table: Table, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Reconstructions of the same held-out pictures, or the first samples, of each row."""
    found: dict[str, Any] = {}
    for row in table.rows:
        result = results.get(f"{table.of}/{row.run}")
        if result is None or result["stopped"]:
            continue
        if table.of == "generators":
            found[row.name] = pictures(out / "generators" / row.run, SHOWN)
            continue
        last = RunFolder.read(out / "tokenizers" / row.run).last_snapshot()
        if "originals" in last:
            found.setdefault("originals", last["originals"][:SHOWN])
            found[row.name] = last["reconstructions"][:SHOWN]
    return found
