"""Pages that people look at: one self-contained HTML file a run, no network, readable on a phone.

`write_report(run)` reads a run folder and nothing else. The parts it is made of (`line_chart`, `picture_rows`,
`code_map`, `latent_map`, `page`) serve the demo's and the comparison's pages too.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

import lexel
from lexel import config
from lexel.checkpoint import atomic
from lexel.errors import UsageError
from lexel.metrics.health import Finding, diagnose
from lexel.run_folder import read_metrics
from lexel.samples import picture_grid

COLOURS = ["#2f6fde", "#e07b39", "#1d8a55", "#8e5bd0", "#c0392b", "#00838f", "#8d6e00", "#5b6675"]
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files, and the page's own font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4b2",
    "axes.labelcolor": "#5b6675",
    "xtick.color": "#5b6675",
    "ytick.color": "#5b6675",
    "axes.grid": True,
    "grid.color": "#e3e7ed",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "lexel",  # the same run gives the same file
}

Rows = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption; `html` is an inline SVG or an image with its data inside."""

    html: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One card of a page."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    table: Sequence[Sequence[str]] = ()  # the first row is the head
    findings: Sequence[Finding] = ()
    code: str = ""
    wide: bool = False  # figures below each other over the whole width


@dataclass
class Run:
    """What a run folder says."""

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, NDArray[Any]]:
        """The newest snapshot, or nothing."""
        return self.snapshots[max(self.snapshots)] if self.snapshots else {}


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Reads `metrics.jsonl` and `snapshots/` of a run folder.

    Raises:
        UsageError: the folder is no run folder.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is no run folder: it has no metrics.jsonl")
    run = Run(name or folder.name, folder)
    if (folder / "recipe.toml").is_file():
        run.recipe = config.read(folder / "recipe.toml")
    for row in read_metrics(folder / "metrics.jsonl"):
        (run.validation if row["kind"] == "validation" else run.train).append(row)
    for path in sorted((folder / "snapshots").glob("*.safetensors")):
        run.snapshots[int(path.stem)] = load_file(path)
    return run


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder from what the folder holds; returns its path."""
    run = read_run(folder)
    shown = generator_sections(run) if "generator" in run.recipe else tokenizer_sections(run)
    sections = [*shown, *recipe_section(run.folder)]
    return write_page(run.folder / "report.html", f"Run {run.name}", lead(run), sections, tiles(run))


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    tiles: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> Path:
    """Writes one self-contained page."""
    environment = Environment(
        loader=PackageLoader("lexel", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    footer = footer or f"Made by Lexel {lexel.__version__}."
    html = environment.get_template("report.html.j2").render(
        title=title, lead=lead, tiles=tiles, sections=sections, footer=footer
    )
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


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
        "bits_per_token": ("bits a token, held out", "{:.3f}"),
        "histogram_bits": ("entropy of the histogram", "{:.3f}"),
    }
    return [(name, form.format(row[key])) for key, (name, form) in shown.items() if key in row]


def tokenizer_sections(run: Run) -> list[Section]:
    """Everything a tokenizer's run has to show, in reading order."""
    sections = []
    if run.validation and "usage" in run.validation[-1]:
        quantizer = run.recipe["model"]["quantizer"]
        findings = diagnose(quantizer["kind"], quantizer["codebook_size"], run.validation, run.train)
        sections.append(Section("Is the codebook healthy?", findings=findings))
    if "originals" in run.last:
        rows = [run.last["originals"][:12], run.last["reconstructions"][:12]]
        caption = "Above: held-out originals. Below: the same pictures through the tokenizer and back."
        sections.append(Section("Originals and reconstructions", figures=[picture_rows(rows, caption)], wide=True))
    if "histogram" in run.last:
        sections.append(Section("The codebook", figures=codebook_figures(run)))
    if "indices" in run.last:
        sections.append(Section("What the tokenizer sees", figures=map_figures(run.last)))
    sections.append(Section("Losses", figures=loss_curves(run.train)))
    sections.append(Section("Timing", figures=timing_figures(run.train)))
    return [section for section in sections if section.figures or section.findings]


def generator_sections(run: Run) -> list[Section]:
    """Everything a generator's run has to show, in reading order."""
    sections = []
    if "samples" in run.last:
        figure = picture_rows(
            [run.last["samples"]],
            "An image of each of the first classes, sampled after the last step without guidance.",
        )
        sections.append(Section("Samples", figures=[figure], wide=True))
    sections.append(Section("What it has learned", figures=generator_figures(run)))
    sections.append(Section("Losses", figures=loss_curves(run.train)))
    sections.append(Section("Timing", figures=timing_figures(run.train)))
    return [section for section in sections if section.figures]


def generator_figures(run: Run) -> list[Figure]:
    """Bits a token, learned from and held out, beside what counting the tokens alone would give."""
    lines = {
        "training": series(run.train, "bits_per_token"),
        "validation": series(run.validation, "bits_per_token"),
        "entropy of the histogram": series(run.validation, "histogram_bits"),
    }
    chart = line_chart(lines, "bits a token; below the histogram's entropy, order has been learned")
    return [chart] if chart.html else []


def recipe_section(folder: Path) -> list[Section]:
    """The resolved recipe, to run it again."""
    path = folder / "recipe.toml"
    return [Section("Recipe", code=path.read_text(encoding="utf-8"))] if path.is_file() else []


# What belongs into one chart, by the names in metrics.jsonl; what is not named here gets a chart of its own.
CHARTS: dict[str, tuple[str, ...]] = {
    "the whole loss": ("loss",),
    "what reconstructions miss": ("l1", "l2", "lpips"),
    "from latents to codes": ("quantization", "commitment", "codebook"),
    "entropy of the softmax: of one latent, of the batch": ("entropy_sample", "entropy_batch"),
    "the adversary": ("adversarial", "discriminator", "lecam"),
    "the discriminator's logits": ("logits_real", "logits_fake"),
    "norms of the gradients": ("gradient_norm", "discriminator_gradient_norm"),
    "learning rate": ("lr",),
}
NO_CURVES = {"step", "seconds", "images_per_second", "adversarial_weight", "bits_per_token"}


def loss_curves(rows: Rows) -> list[Figure]:
    """Every number that training logs, those that belong together in one chart."""
    logged = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    grouped = {name for names in CHARTS.values() for name in names}
    others = {name.replace("_", " "): (name,) for name in logged if name not in grouped | NO_CURVES}
    charts = [
        line_chart({name.replace("_", " "): series(rows, name) for name in names}, caption)
        for caption, names in (CHARTS | others).items()
    ]
    return [chart for chart in charts if chart.html]


def codebook_figures(run: Run) -> list[Figure]:
    """Usage over time, the histogram of codes, and the gradient that reaches the encoder."""
    rows = run.validation
    figures = [
        line_chart({"usage": series(rows, "usage")}, "usage of the codebook, held-out pictures", percent=True),
        code_histogram(
            {f"step {step:,}": part["histogram"] for step, part in run.snapshots.items() if "histogram" in part}
        ),
        line_chart(
            {name.replace("_", " "): series(rows, name) for name in ("perplexity", "softmax_perplexity")},
            "perplexity of the codes, and of the softmax over codes",
            log=True,
        ),
        line_chart(
            {name.replace("_", " "): series(rows, name) for name in ("gradient_ratio", "gradient_cosine")},
            "gradient at the encoder against the decoder's: size and direction",
        ),
        line_chart(
            {name.replace("_", " "): series(rows, name) for name in ("code_norm", "latent_norm", "quantization_error")},
            "norms of codes and latents, quantization error",
        ),
    ]
    return [figure for figure in figures if figure.html]


def map_figures(snapshot: Mapping[str, NDArray[Any]]) -> list[Figure]:
    """Which code stands where in some pictures, and where codes and latents lie."""
    figures = [code_map(snapshot["originals"][:6], snapshot["indices"][:6])]
    if "codes" in snapshot:
        figures.append(latent_map(snapshot["latents"], snapshot["codes"]))
    return figures


def timing_figures(rows: Rows) -> list[Figure]:
    """Pictures per second over time."""
    points = series(rows, "images_per_second")
    return [line_chart({"images per second": points}, "images per second")] if points[0].size else []


# Parts


def series(rows: Rows, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and values of one number, where it was logged."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def line_chart(
    lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], caption: str, log: bool = False, percent: bool = False
) -> Figure:
    """Curves over steps; several lines get a legend. Empty where no line has a point."""
    lines = {name: line for name, line in lines.items() if line[0].size}
    if not lines:
        return Figure("")
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 2.4))
        axes = canvas.subplots()
        for colour, (name, (steps, values)) in zip(_colours(len(lines)), lines.items(), strict=True):
            axes.plot(steps, values, color=colour, label=name, linewidth=1.8, marker="o" if len(steps) < 3 else None)
        if log:
            axes.set_yscale("log")
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        return Figure(_svg(canvas), caption)


def code_histogram(histograms: Mapping[str, NDArray[Any]]) -> Figure:
    """Codes sorted by how often they are used: a healthy codebook is flat, a collapsed one falls to zero."""
    if not histograms:
        return Figure("")
    chosen = dict(list(histograms.items())[:: max(1, len(histograms) // 4)])
    chosen |= dict(list(histograms.items())[-1:])
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 2.4))
        axes = canvas.subplots()
        for colour, (name, histogram) in zip(_colours(len(chosen)), chosen.items(), strict=True):
            counts = np.sort(histogram.ravel())[::-1] / max(1, histogram.sum())
            share = np.linspace(0, 1, len(counts))
            axes.plot(share, np.maximum(counts * len(counts), 1e-3), color=colour, label=name, linewidth=1.6)
        axes.axhline(1.0, color="#9aa4b2", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("codes, the most used first")
        axes.set_ylabel("use against uniform")
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, fontsize=9)
        return Figure(
            _svg(canvas), "how often each code is used on held-out pictures (dotted: all alike; floor: never)"
        )


def picture_rows(rows: Sequence[NDArray[Any]], caption: str = "", smallest: int = 64) -> Figure:
    """Rows of equally many pictures (N, H, W, 3) uint8 in one image; small ones are enlarged without smoothing."""
    scale = max(1, -(-smallest // min(rows[0].shape[1:3])))
    return Figure(_img(picture_grid(np.concatenate(rows), columns=len(rows[0]), scale=scale)), caption)


def code_map(originals: NDArray[Any], indices: NDArray[Any]) -> Figure:
    """Pictures (N, H, W, 3) above their codes (N, h, w): every code has a colour of its own."""
    if indices.ndim > 3:  # residual and product: the first code of each place
        indices = indices[:, 0]
    # Golden-ratio steps spread neighbouring numbers over the colour circle.
    hue = (indices * 0.61803398875) % 1.0
    colours = matplotlib.colors.hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.55), np.full_like(hue, 0.92)], axis=-1))
    factor = originals.shape[1] // indices.shape[1]
    maps = (colours * 255).round().astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)
    distinct = ", ".join(str(len(np.unique(grid))) for grid in indices)
    return picture_rows([originals, maps], f"Which code stands where (one colour a code); distinct codes: {distinct}.")


def latent_map(latents: NDArray[Any], codes: NDArray[Any]) -> Figure:
    """Latents (n, D) and codes (m, D) in the plane of the latents' and codes' two main directions."""
    both = np.concatenate([latents, codes]).astype(np.float64)
    centre = both.mean(axis=0)
    directions = np.linalg.svd(both - centre, full_matrices=False)[2][:2]
    if len(directions) < 2:  # one-dimensional codes lie on a line
        directions = np.concatenate([directions, np.zeros_like(directions)])
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 4.2))
        axes = canvas.subplots()
        for points, colour, name in [(latents, COLOURS[1], "latents"), (codes, COLOURS[0], "codes")]:
            x, y = ((points - centre) @ directions.T).T
            axes.scatter(x, y, s=7, color=colour, alpha=0.45, linewidths=0, label=name, rasterized=True)
        axes.legend(frameon=False, fontsize=9, markerscale=2.5)
        caption = "Codes and held-out latents on their two main axes. Codes that lie among the latents can be chosen."
        return Figure(_svg(canvas, dpi=150), caption)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _svg(canvas: Canvas, dpi: int = 100) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", dpi=dpi, transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _img(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="pixels" alt="" src="data:image/png;base64,{data}">'
