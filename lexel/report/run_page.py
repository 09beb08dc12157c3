"""The page of one run: curves, reconstructions or samples, the codebook and its health."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lexel.metrics.health import diagnose
from lexel.quantizers import outline
from lexel.report.figures import Figure, Rows, code_histogram, code_map, latent_map, line_chart, picture_rows, series
from lexel.report.page import Section, write_page
from lexel.report.reference import ReferenceCurves, reference_for, settings_of
from lexel.run_folder import RunFolder
from lexel.run_log import SPEEDS, Run

STARTS = 3  # of a run, whose choices a page shows


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder from what the folder holds; returns its path."""
    files = RunFolder.read(folder)
    run = files.contents()
    reference = reference_for(folder)
    sections_of = generator_sections if "generator" in run.recipe else tokenizer_sections
    losses = loss_curves(run.train, reference.train if reference else ())
    charts = [Section("Losses", figures=losses), Section("Timing", figures=timing_figures(run.train))]
    shown = [each for each in (*sections_of(run, reference), *charts) if each.figures or each.findings]
    sections = [*shown, *choices_section(run), *recipe_section(files.recipe)]
    behind = "" if reference is None else f" {reference.caption(settings_of(run.recipe))}"
    return write_page(files.report, f"Run {run.name}", lead(run) + behind, sections, tiles(run))


# What a tokenizer's run shows


def lead(run: Run) -> str:
    """One sentence on where the run stands."""
    step = run.train[-1]["step"] if run.train else 0
    minutes = run.train[-1]["seconds"] / 60 if run.train else 0.0
    return f"{step:,} steps in {minutes:.1f} minutes."


def tiles(run: Run) -> list[tuple[str, str]]:
    """The figures people look for first, from the last validation."""
    if not run.validation:
        return []
    row = run.validation[-1]
    shown = {
        "psnr": ("PSNR, held out", "{:.2f} dB"),
        "usage": ("codebook usage", "{:.1%}"),
        "perplexity": ("perplexity", "{:,.0f}"),
        "dead_codes": ("dead codes", "{:,.0f}"),
        "bits_per_token": ("bits per token, held out", "{:.3f}"),
        "histogram_bits": ("entropy of the histogram", "{:.3f}"),
    }
    return [(name, form.format(row[key])) for key, (name, form) in shown.items() if key in row]


def tokenizer_sections(run: Run, reference: ReferenceCurves | None = None) -> list[Section]:
    """What a tokenizer's run shows that others do not, in reading order."""
    sections = []
    if run.validation and "usage" in run.validation[-1]:
        findings = diagnose(outline(run.recipe["model"]["quantizer"]), run.validation, run.train)
        sections.append(Section("Is the codebook healthy?", findings=findings))
    if "originals" in run.last:
        rows = [run.last["originals"][:12], run.last["reconstructions"][:12]]
        caption = "Above: held-out originals. Below: their reconstructions."
        sections.append(Section("Originals and reconstructions", figures=[picture_rows(rows, caption)], wide=True))
    if "histogram" in run.last:
        sections.append(Section("The codebook", figures=codebook_figures(run, reference)))
    if "indices" in run.last:
        sections.append(Section("Token maps", figures=map_figures(run.last)))
    if "prefixes" in run.last:
        line = {"PSNR": (run.last["prefixes"][0], run.last["prefixes"][-1])}
        caption = "PSNR in dB of the first held-out images, from the first of their tokens"
        chart = line_chart(line, caption, over="bits of an image", points=True)
        sections.append(Section("Rate against quality", figures=[chart]))
    return [*sections, Section("Evaluations", figures=loss_curves(run.evaluations))]


def generator_sections(run: Run, reference: ReferenceCurves | None = None) -> list[Section]:
    """What a generator's run shows that others do not, in reading order."""
    sections = []
    if "samples" in run.last:
        figure = picture_rows(
            [run.last["samples"]],
            "One sample of each of the first classes after the last step, without guidance.",
        )
        sections.append(Section("Samples", figures=[figure], wide=True))
    return [*sections, Section("Bits per token", figures=generator_figures(run, reference))]


def choices_section(run: Run) -> list[Section]:
    """What the run chose for its device: a column for each start, of the newest."""
    starts = run.choices[-STARTS:]
    names = dict.fromkeys(name for line in starts for name in line if name not in ("step", "kind", "seconds"))
    rows = [(name.replace("_", " "), *(str(line.get(name, "")) for line in starts)) for name in names]
    head = ("", *(f"from step {line['step']:,}" for line in starts))
    return [Section("Chosen for the device", table=[head, *rows])] if rows else []


def generator_figures(run: Run, reference: ReferenceCurves | None = None) -> list[Figure]:
    """Bits per token in training and validation, beside the entropy of the token histogram."""
    lines, behind = (
        {
            "training": series(each.train, "bits_per_token"),
            "validation": series(each.validation, "bits_per_token"),
            "entropy of the histogram": series(each.validation, "histogram_bits"),
        }
        for each in (run, reference or run)
    )
    caption = "bits per token; below the entropy of the token histogram, the model has learned context"
    chart = line_chart(lines, caption, behind=behind if reference else None)
    return [chart] if chart.html else []


def recipe_section(path: Path) -> list[Section]:
    """The resolved recipe, to run it again."""
    return [Section("Recipe", code=path.read_text(encoding="utf-8"))] if path.is_file() else []


# Charts by caption: the names in metrics.jsonl that share one; a name that is not listed gets a chart of its own.
CHARTS: dict[str, tuple[str, ...]] = {
    "total loss": ("loss",),
    "reconstruction losses": ("l1", "l2", "lpips"),
    "quantizer losses": ("quantization", "commitment", "codebook"),
    "entropy of the softmax over codes: per latent, and of the batch mean": ("entropy_sample", "entropy_batch"),
    "GAN losses": ("adversarial", "discriminator", "lecam"),
    "discriminator logits": ("logits_real", "logits_fake"),
    "gradient norms": ("gradient_norm", "discriminator_gradient_norm"),
    "learning rate": ("lr",),
}
NO_CURVES = {"step", "seconds", *SPEEDS, "adversarial_weight", "bits_per_token"}


def chart_of(rows: Rows, names: Sequence[str], caption: str, reference: Rows, **options: Any) -> Figure:
    """A chart of the numbers of these names, before those of a reference."""
    lines, behind = ({name.replace("_", " "): series(each, name) for name in names} for each in (rows, reference))
    return line_chart(lines, caption, behind=behind, **options)


def loss_curves(rows: Rows, reference: Rows = ()) -> list[Figure]:
    """Every number that training logs, those that belong together in one chart, before those of a reference."""
    logged = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    grouped = {name for names in CHARTS.values() for name in names}
    others = {name.replace("_", " "): (name,) for name in logged if name not in grouped | NO_CURVES}
    charts = [chart_of(rows, names, caption, reference) for caption, names in (CHARTS | others).items()]
    return [chart for chart in charts if chart.html]


def codebook_figures(run: Run, reference: ReferenceCurves | None = None) -> list[Figure]:
    """Usage over time, the histogram of codes, and the gradient that reaches the encoder."""
    rows, behind = run.validation, reference.validation if reference else ()
    steps = sorted(run.snapshots)  # thousands in a long run, each a file: a few are drawn, the last among them
    chosen = {step: run.snapshots[step] for step in [*steps[:: max(1, len(steps) // 4)], *steps[-1:]]}
    histograms = {f"step {step:,}": part["histogram"] for step, part in chosen.items() if "histogram" in part}
    perplexities = "perplexity of the codes, and of the softmax over codes"
    gradients = "gradient at the encoder against the decoder's: size and direction"
    norms = "norms of codes and latents, quantization error"
    figures = [
        chart_of(rows, ["usage"], "usage of the codebook, held-out pictures", behind, percent=True),
        code_histogram(histograms),
        chart_of(rows, ["perplexity", "softmax_perplexity"], perplexities, behind, log=True),
        chart_of(rows, ["gradient_ratio", "gradient_cosine"], gradients, behind),
        chart_of(rows, ["code_norm", "latent_norm", "quantization_error"], norms, behind),
    ]
    return [figure for figure in figures if figure.html]


def map_figures(snapshot: Mapping[str, NDArray[Any]]) -> list[Figure]:
    """Which code stands where in some pictures, and where codes and latents lie."""
    figures = [code_map(snapshot["originals"][:6], snapshot["indices"][:6])]
    if "codes" in snapshot:
        figures.append(latent_map(snapshot["latents"], snapshot["codes"]))
    return figures


def timing_figures(rows: Rows) -> list[Figure]:
    """Images a second over time: trained on, and where images are read, of reading and of training alone."""
    lines = {label: series(rows, name) for name, label in SPEEDS.items()}
    found = {label: points for label, points in lines.items() if points[0].size}
    return [line_chart(found, "images per second")] if found else []
