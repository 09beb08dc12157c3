"""The page of a comparison: table, learning curves, codes and latents, reconstructions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lexel.compare.summary import summarise, table
from lexel.report import Figure, Section, latent_map, line_chart, picture_rows, series, write_page
from lexel.run_folder import RunFolder
from lexel.run_log import Run
from lexel.train.tokenizer import TokenizerRecipe

LINES = 8  # curves in one chart: as many as there are colours
NOTE = (
    "Usage is distinct codes over all held-out pictures / K; perplexity is exp(entropy) of the same histogram. "
    "± is the standard deviation over seeds. The gradient is the encoder's beside the decoder's at the last "
    "validation: how many times as large, and the cosine between them; plain straight-through has 1 and 1. The "
    "Fréchet distance is taken in the named network and is no FID. Images per second are those of training, with its "
    "validations, on this machine. Bits are those of one latent's indices: residual and product quantizers have "
    "several."
)
MAPS = "The first seed's codes and latents on their two main axes: codes that lie among the latents can be chosen."
CURVES = {
    "usage": ("usage of the codebook, held-out pictures", {"percent": True}),
    "perplexity": ("perplexity of the codes", {"log": True}),
    "psnr": ("PSNR of held-out pictures, dB", {}),
    "quantization_error": ("mean squared distance of latents to their codes", {"log": True}),
    "gradient_ratio": ("size of the encoder's gradient against the decoder's", {"log": True}),
    "gradient_cosine": ("direction: cosine of the encoder's and the decoder's gradient", {}),
}


def write_html(out: Path, recipe: TokenizerRecipe, results: Sequence[Mapping[str, Any]], planned: int) -> None:
    """Writes `compare.html` from the runs that are finished."""
    runs = {
        result["name"]: RunFolder.read(out / "runs" / result["name"]).contents(result["quantizer"])
        for result in results
    }
    seeds = len({result["seed"] for result in results})
    data = recipe.data
    length = f"{recipe.train.steps:,} steps" if recipe.train.steps else f"{recipe.train.epochs} epochs"
    lead = (
        f"{data.source} at {data.size} pixels, {length} of {recipe.train.batch_size} pictures, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; only the quantizer changes. "
        f"{len(results)} of {planned} trainings are done."
    )
    sections = [Section("Results on held-out pictures", NOTE, table=table(summarise(results)))]
    notes = [f"{result['name']}: {result['stopped']}" for result in results if result["stopped"]]
    if notes:
        sections.append(Section("Ended early", "These trainings could not go on.", code="\n".join(notes)))
    for size, dim in dict.fromkeys((result["codebook_size"], result["codebook_dim"]) for result in results):
        group = [r for r in results if (r["codebook_size"], r["codebook_dim"]) == (size, dim)]
        by_label: dict[str, list[Run]] = {}
        for result in group:
            by_label.setdefault(result["quantizer"], []).append(runs[result["name"]])
        name = f"{size:,} codes of dimension {dim}"
        sections.append(Section(f"Learning curves: {name}", figures=_learning_curves(by_label)))
        sections.append(Section(f"Codes and latents: {name}", MAPS, figures=_latent_maps(by_label)))
        sections.append(Section(f"Reconstructions: {name}", figures=_reconstructions(by_label), wide=True))
    again = "\n".join(
        f"lexel train runs/{result['name']}/recipe.toml --out again/{result['name']}" for result in results
    )
    sections.append(Section("Run a row again", "From this folder; each recipe is complete by itself.", code=again))
    sections = [section for section in sections if section.figures or section.table or section.code]
    write_page(out / "compare.html", "Quantizers compared", lead, sections)


def _learning_curves(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    """Means over seeds, at most LINES methods in a chart."""
    figures = []
    labels = list(by_label)
    for name, (caption, options) in CURVES.items():
        for first in range(0, len(labels), LINES):
            part = labels[first : first + LINES]
            lines = {label: _mean_series(by_label[label], name) for label in part}
            positive = {label: line for label, line in lines.items() if not options.get("log") or (line[1] > 0).all()}
            figures.append(line_chart(positive, caption, options.get("log", False), options.get("percent", False)))
    return [figure for figure in figures if figure.html]


def _mean_series(runs: Sequence[Run], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A validation number over steps, averaged over the runs that have the step."""
    values: dict[float, list[float]] = {}
    for each in runs:
        for step, value in zip(*series(each.validation, name), strict=True):
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    return np.array(steps), np.array([statistics.fmean(values[step]) for step in steps])


def _latent_maps(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    figures = []
    for label, runs in by_label.items():
        last = runs[0].last
        if "codes" in last and last["codes"].shape[1] == last["latents"].shape[1]:
            figures.append(replace(latent_map(last["latents"], last["codes"]), caption=label))
    return figures


def _reconstructions(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    """The same held-out pictures through every method's first seed."""
    shown = {label: runs[0].last for label, runs in by_label.items() if "originals" in runs[0].last}
    if not shown:
        return []
    originals = next(iter(shown.values()))["originals"][:8]
    caption = "From above: originals, " + ", ".join(shown) + "."
    return [picture_rows([originals, *(last["reconstructions"][:8] for last in shown.values())], caption)]
