"""Quantizers on equal terms: one recipe, and only the quantizer changes.

`compare` trains the recipe once for every quantizer, codebook size, code dimension and seed: the same pictures in the
same order, the same start of encoder and decoder for a seed, the same losses and the same number of steps. Each
training is a run folder of its own that `lexel train` could have made, so anyone can rerun a row. What is finished is
not trained again, and what was stopped goes on.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lexel import __version__
from lexel.checkpoint import read_json
from lexel.config import Config, check, read
from lexel.data.config import open_data
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer, write_result
from lexel.metrics.protocols import PROTOCOLS
from lexel.quantizers import QUANTIZERS
from lexel.report import Figure, Run, Section, latent_map, line_chart, picture_rows, read_run, series, write_page
from lexel.run_folder import TrainingStopped
from lexel.train.run import Progress
from lexel.train.tokenizer import IMAGE_TERMS, TokenizerRecipe, load_run, train_tokenizer

METRICS = ("psnr", "lpips", "usage", "frechet")
NETWORK = "efficientnet_lite0"  # behind the Fréchet distance, which carries its name
RESULT = "result.json"
LINES = 8  # curves in one chart: as many as there are colours


class Variant(Config):
    """A quantizer with options of its own, under a name of its own."""

    kind: str  # a key of QUANTIZERS
    options: dict[str, Any] = {}  # of its constructor
    weights: dict[str, float] = {}  # of its loss terms, instead of the published ones
    train: dict[str, Any] = {}  # changes of the recipe's section train, such as a schedule; the page tells them


class Arm(NamedTuple):
    """One training of a comparison."""

    label: str  # the quantizer's name, or the variant's
    codebook_size: int
    codebook_dim: int
    seed: int
    recipe: TokenizerRecipe

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.label}-{self.codebook_size}x{self.codebook_dim}-seed{self.seed}"


class Compared(NamedTuple):
    """What `compare` leaves behind."""

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
) -> Compared:
    """Trains and measures quantizers under one recipe; called again it goes on.

    Every method has its published loss weights; of the recipe's weights those of the pictures hold for all, those of
    quantizer terms only for the recipe's own quantizer, which keeps its options too. A run whose codebook collapses
    goes on to its end, since that is a result; one whose loss becomes NaN is a row that says so.

    Args:
        recipe: what to train.
        quantizers: keys of QUANTIZERS, or names of `variants`.
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
    arms = plan(recipe, quantizers, codebook_sizes, dims, seeds, variants or {})
    out = Path(out)
    results: list[dict[str, Any]] = []
    finished = True
    for number, arm in enumerate(arms):
        folder = out / "runs" / arm.name

        def tell(now: Progress, number: int = number, name: str = arm.name) -> None:
            if progress is not None:
                progress(number, len(arms), name, now)

        result = run(arm, folder, metrics, limit, device, tell)
        if result is None:
            finished = False
            break
        results.append(result | health(folder))
        write_json(out, recipe, results, len(arms))
    if results:
        write_html(out, recipe, results, len(arms))
    return Compared(out / "compare.html", summarise(results), finished)


def plan(
    recipe: TokenizerRecipe,
    quantizers: Sequence[str],
    codebook_sizes: Sequence[int] = (),
    dims: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    variants: Mapping[str, Variant] | None = None,
) -> list[Arm]:
    """All trainings of a comparison, checked; seeds change slowest, so that every method has a result early."""
    variants = variants or {}
    for label, variant in variants.items():
        if label in QUANTIZERS:
            raise UsageError(f"the variant {label!r} has a quantizer's name; choose another, such as '{label}_2'")
        if variant.kind not in QUANTIZERS:
            raise UsageError(f"variant {label!r}: unknown kind {variant.kind!r}; choose from {_names(QUANTIZERS)}")
    for label in quantizers:
        if label not in QUANTIZERS and label not in variants:
            raise UsageError(f"unknown quantizer {label!r}; choose from {_names([*QUANTIZERS, *variants])}")
    for what, values in (("quantizers", quantizers), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{what} must be given, each once; got {list(values) or 'none'}")
    own = recipe.model.quantizer
    sizes = codebook_sizes or [own["codebook_size"]]
    widths = dims or [own["codebook_dim"]]
    return [
        Arm(label, size, dim, seed, _recipe_of(recipe, label, variants.get(label), size, dim, seed))
        for seed in seeds
        for size in sizes
        for dim in widths
        for label in quantizers
    ]


def _recipe_of(
    recipe: TokenizerRecipe, label: str, variant: Variant | None, size: int, dim: int, seed: int
) -> TokenizerRecipe:
    """The recipe with this quantizer, and nothing else changed but what a variant says."""
    own = dict(recipe.model.quantizer)
    variant = variant or Variant(kind=label)
    is_own = label == own["kind"]
    options = own if is_own else variant.options
    table = recipe.model_dump(mode="json", exclude_none=True)
    table["model"]["quantizer"] = {**options, "kind": variant.kind, "codebook_size": size, "codebook_dim": dim}
    shared = {term: weight for term, weight in recipe.train.weights.items() if is_own or term in IMAGE_TERMS}
    # Where a codebook collapses, what it does until the end is a result too.
    table["train"] |= {"collapse_patience": 0, **variant.train, "seed": seed}
    table["train"]["weights"] = {**shared, **variant.weights}
    return check(table, TokenizerRecipe, f"{label} with {size} codes of dimension {dim}").resolved()


def run(
    arm: Arm,
    folder: Path,
    metrics: Sequence[str],
    limit: int | None,
    device: str,
    progress: Callable[[Progress], None],
) -> dict[str, Any] | None:
    """Trains and measures one arm, or reads what was done before; None where a signal ended the training."""
    path = folder / RESULT
    if path.is_file():
        result = read_json(path)
        if result["recipe"] != _plain(arm.recipe) or result["asked"] != [sorted(metrics), limit]:
            raise UsageError(f"{folder} holds a result of another recipe or measurement; choose another folder")
        return result
    result = {
        "name": arm.name,
        "quantizer": arm.label,
        "codebook_size": arm.codebook_size,
        "codebook_dim": arm.codebook_dim,
        "seed": arm.seed,
        "recipe": _plain(arm.recipe),
        "asked": [sorted(metrics), limit],
        "stopped": None,
    }
    memory = PeakMemory()
    try:
        trained = train_tokenizer(arm.recipe, folder, device=device, progress=progress)
    except TrainingStopped as stopped:
        result |= {"stopped": str(stopped), "metrics": {}}
    else:
        if not trained.finished:
            return None
        place = next(trained.tokenizer.parameters()).device
        result["peak_memory_bytes"] = memory.read(place)
        result["images_per_second"] = read_run(folder).train[-1]["images_per_second"]
        tokenizer = load_run(folder)
        data = arm.recipe.data
        rules = replace(PROTOCOLS["lexel"], transform=data.transform, lpips=("vgg",))
        measured = evaluate_tokenizer(
            tokenizer,
            open_data(data)[1],
            rules,
            size=data.size,
            metrics=metrics,
            network=NETWORK,
            limit=limit,
            batch_size=arm.recipe.train.batch_size,
            device=device,
            workers=data.workers,
        )
        quantizer = tokenizer.quantizer
        result |= {
            "bits": getattr(quantizer, "books", 1) * math.log2(quantizer.codebook_size),
            "metrics": measured["metrics"],
            "intervals": measured["intervals"],
            "warnings": measured["warnings"],
            "images": measured["data"]["images"],
        }
    write_result(path, result)
    return read_json(path)


def health(folder: Path) -> dict[str, float]:
    """The encoder's gradient at the last validation of a run, beside the decoder's."""
    validations = read_run(folder).validation
    return {name: validations[-1][name] for name in HEALTH if validations and name in validations[-1]}


class PeakMemory:
    """The most memory that was in use since this was made: of the GPU where there is one, else of the process."""

    PEAK = Path("/proc/self/status")
    RESET = Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.measurable = self.RESET.exists() and self.PEAK.exists()
        if self.measurable:
            try:
                self.RESET.write_text("5")  # Linux: forget the process's peak so far
            except OSError:  # not allowed here: no number is better than one of another run
                self.measurable = False

    def read(self, device: torch.device) -> int | None:
        """Bytes; None where this system does not tell."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        if not self.measurable:
            return None
        lines = self.PEAK.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# The table


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each quantizer, size and dimension: means over seeds and their spread.

    A row holds `quantizer`, `codebook_size`, `codebook_dim`, `bits`, `seeds`, `runs`, `stopped` (how many ended
    early), and for each number `{"mean", "deviation", "values"}`; the deviation of one value is None.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        key = (result["codebook_size"], result["codebook_dim"], result["quantizer"])
        groups.setdefault(key, []).append(result)
    rows = []
    for (size, dim, label), group in groups.items():
        row: dict[str, Any] = {
            "quantizer": label,
            "codebook_size": size,
            "codebook_dim": dim,
            "bits": next((result["bits"] for result in group if "bits" in result), None),
            "seeds": [result["seed"] for result in group],
            "runs": [result["name"] for result in group],
            "stopped": sum(result["stopped"] is not None for result in group),
        }
        measured = [{**result["metrics"], **{n: result.get(n) for n in (*HEALTH, *COSTS)}} for result in group]
        for name in dict.fromkeys(name for values in measured for name in values):
            row[name] = spread([values[name] for values in measured if values.get(name) is not None])
        rows.append(row)
    return rows


HEALTH = ("gradient_ratio", "gradient_cosine")
COSTS = ("images_per_second", "peak_memory_bytes")
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "usage": ("usage", "{:.1%}".format),
    "perplexity": ("perplexity", "{:,.0f}".format),
    "psnr": ("PSNR, dB ↑", "{:.2f}".format),
    "ssim": ("SSIM ↑", "{:.3f}".format),
    "lpips_vgg": ("LPIPS (VGG) ↓", "{:.3f}".format),
    f"fd_{NETWORK}": ("Fréchet (EfficientNet-Lite0) ↓", "{:.3g}".format),
    "gradient_ratio": ("gradient: size", "{:.2f}".format),
    "gradient_cosine": ("gradient: cosine", "{:.2f}".format),
    "images_per_second": ("images/s", "{:.1f}".format),
    "peak_memory_bytes": ("peak memory, GiB", lambda value: f"{value / 2**30:.2f}"),
}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of a number over seeds."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows as text, the first row being the head."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["quantizer", "K", "D", "bits", *(COLUMNS[name][0] for name in shown)]]
    for row in rows:
        line = [row["quantizer"], f"{row['codebook_size']:,}", str(row["codebook_dim"])]
        line.append("-" if row["bits"] is None else f"{row['bits']:.4g}")
        lines.append(line + [_cell(row.get(name), COLUMNS[name][1]) for name in shown])
    return lines


def _cell(number: Mapping[str, Any] | None, form: Callable[[float], str]) -> str:
    if number is None or number["mean"] is None:
        return "-"
    text = form(number["mean"])
    return text if number["deviation"] is None else f"{text} ± {form(number['deviation'])}"


def write_json(out: Path, recipe: TokenizerRecipe, results: Sequence[Mapping[str, Any]], planned: int) -> None:
    """Writes `compare.json`: the recipe, the rows of the table, and every run's result."""
    summary = {"lexel": __version__, "recipe": _plain(recipe), "planned": planned}
    write_result(out / "compare.json", {**summary, "rows": summarise(results), "runs": list(results)})


# The page


def write_html(out: Path, recipe: TokenizerRecipe, results: Sequence[Mapping[str, Any]], planned: int) -> None:
    """Writes `compare.html` from what is there."""
    runs = {result["name"]: read_run(out / "runs" / result["name"], result["quantizer"]) for result in results}
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
        here = [r for r in results if (r["codebook_size"], r["codebook_dim"]) == (size, dim)]
        by_label: dict[str, list[Run]] = {}
        for result in here:
            by_label.setdefault(result["quantizer"], []).append(runs[result["name"]])
        name = f"{size:,} codes of dimension {dim}"
        sections.append(Section(f"Learning curves: {name}", figures=_curves(by_label)))
        sections.append(Section(f"Codes and latents: {name}", MAPS, figures=_maps(by_label)))
        sections.append(Section(f"Reconstructions: {name}", figures=_pictures(by_label), wide=True))
    again = "\n".join(
        f"lexel train runs/{result['name']}/recipe.toml --out again/{result['name']}" for result in results
    )
    sections.append(Section("Run a row again", "From this folder; each recipe is complete by itself.", code=again))
    sections = [section for section in sections if section.figures or section.table or section.code]
    write_page(out / "compare.html", "Quantizers compared", lead, sections)


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


def _curves(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    """Means over seeds, at most LINES methods in a chart."""
    figures = []
    labels = list(by_label)
    for name, (caption, options) in CURVES.items():
        for first in range(0, len(labels), LINES):
            part = labels[first : first + LINES]
            lines = {label: _mean_series(by_label[label], name) for label in part}
            positive = {label: line for label, line in lines.items() if not options.get("log") or (line[1] > 0).all()}
            figures.append(line_chart(positive, caption, **options))
    return [figure for figure in figures if figure.html]


def _mean_series(runs: Sequence[Run], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A validation number over steps, averaged over the runs that have the step."""
    values: dict[float, list[float]] = {}
    for each in runs:
        for step, value in zip(*series(each.validation, name), strict=True):
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    return np.array(steps), np.array([statistics.fmean(values[step]) for step in steps])


def _maps(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    figures = []
    for label, runs in by_label.items():
        last = runs[0].last
        if "codes" in last and last["codes"].shape[1] == last["latents"].shape[1]:
            figures.append(replace(latent_map(last["latents"], last["codes"]), caption=label))
    return figures


def _pictures(by_label: Mapping[str, Sequence[Run]]) -> list[Figure]:
    """The same held-out pictures through every method's first seed."""
    shown = {label: runs[0].last for label, runs in by_label.items() if "originals" in runs[0].last}
    if not shown:
        return []
    originals = next(iter(shown.values()))["originals"][:8]
    caption = "From above: originals, " + ", ".join(shown) + "."
    return [picture_rows([originals, *(last["reconstructions"][:8] for last in shown.values())], caption)]


def read_variants(path: str | Path) -> dict[str, Variant]:
    """Variants from a TOML file with a table for each, such as `[ibq_st]` with `kind` and `options`.

    Raises:
        UsageError: the file is missing or a table is no variant.
    """
    entries = read(path)
    for label, entry in entries.items():
        if not isinstance(entry, dict):
            raise UsageError(f"{Path(path).name}: {label} is a value; variants are tables such as [{label}]")
    return {label: check(entry, Variant, f"{Path(path).name}, [{label}]") for label, entry in entries.items()}


def _plain(recipe: TokenizerRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)


def _names(names: Any) -> str:
    return ", ".join(sorted(names))
