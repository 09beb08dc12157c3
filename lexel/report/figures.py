"""Figures of a page: charts as inline SVG, pictures as PNG within the page."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexel.data.arrays import picture_grid, to_display

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

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


def series(rows: Rows, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and values of one number, where it was logged."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


Lines = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]


def line_chart(
    lines: Lines,
    caption: str,
    log: bool = False,
    percent: bool = False,
    *,
    behind: Lines | None = None,
    over: str = "step",
    points: bool = False,
) -> Figure:
    """Curves over steps; several lines get a legend. Empty where no line has a point.

    Args:
        lines: steps and values of each.
        caption: above the chart.
        log: whether the values' axis is logarithmic.
        percent: whether values are shares of 1.
        behind: curves of the same names to compare with, pale and dashed.
        over: what the values are over, if not steps.
        points: whether each point is marked, however many there are.
    """
    lines = {name: line for name, line in lines.items() if line[0].size}
    if not lines:
        return Figure("")
    with _canvas(4.6, 2.4) as canvas:
        axes = canvas.subplots()
        for colour, (name, (steps, values)) in zip(cycle(COLOURS), lines.items(), strict=False):
            axes.plot(
                steps, values, color=colour, label=name, linewidth=1.8, marker="o" if points or len(steps) < 3 else None
            )
            if behind and name in behind:
                axes.plot(*behind[name], color=colour, alpha=0.45, linewidth=1.4, linestyle="--", zorder=1)
        if log:
            axes.set_yscale("log")
        if percent:
            axes.set_ylim(0, 1.02)
            _in_percent(axes.yaxis)
        axes.set_xlabel(over)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        return Figure(_svg(canvas), caption)


def code_histogram(histograms: Mapping[str, NDArray[Any]]) -> Figure:
    """Codes sorted by how often they are used: a healthy codebook is flat, a collapsed one falls to zero."""
    if not histograms:
        return Figure("")
    with _canvas(4.6, 2.4) as canvas:
        axes = canvas.subplots()
        for colour, (name, histogram) in zip(cycle(COLOURS), histograms.items(), strict=False):
            counts = np.sort(histogram.ravel())[::-1] / max(1, histogram.sum())
            share = np.linspace(0, 1, len(counts))
            axes.plot(share, np.maximum(counts * len(counts), 1e-3), color=colour, label=name, linewidth=1.6)
        axes.axhline(1.0, color="#9aa4b2", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("codes, the most used first")
        axes.set_ylabel("use against uniform")
        _in_percent(axes.xaxis)
        axes.legend(frameon=False, fontsize=9)
        return Figure(
            _svg(canvas), "how often each code is used on held-out pictures (dotted: all alike; floor: never)"
        )


def picture_rows(rows: Sequence[NDArray[Any]], caption: str = "", smallest: int = 64) -> Figure:
    """Rows of equally many pictures (N, H, W, C) uint8 in one image; small ones are enlarged without smoothing."""
    rows = [to_display(row) for row in rows]
    scale = max(1, -(-smallest // min(rows[0].shape[1:3])))
    return Figure(_img(picture_grid(np.concatenate(rows), columns=len(rows[0]), scale=scale)), caption)


def labelled_rows(rows: Mapping[str, NDArray[Any]], caption: str = "") -> Figure:
    """Rows of pictures (N, H, W, 3) uint8, each with its name at the left; all need not have the same N."""
    widest = max(len(pictures) for pictures in rows.values())
    lines = []
    for name, pictures in rows.items():
        blank = np.full((widest - len(pictures), *pictures.shape[1:]), 255, dtype=np.uint8)
        image = picture_rows([np.concatenate([pictures, blank])]).html
        lines.append(f'<div class="row"><span>{escape(name)}</span>{image}</div>')
    return Figure("".join(lines), caption)


def code_map(originals: NDArray[Any], indices: NDArray[Any]) -> Figure:
    """Pictures (N, H, W, 3) above their codes: every code has a colour of its own.

    Codes are (N, h, w), (N, Q, h, w) of which the first of each place is shown, or (N, T), laid out row by row.
    """
    from matplotlib.colors import hsv_to_rgb

    if indices.ndim > 3:  # residual and product: the first code of each place
        indices = indices[:, 0]
    distinct = ", ".join(str(len(np.unique(grid))) for grid in indices)
    length = indices.shape[1]
    if indices.ndim == 2:  # 1-D tokens, in a square; places after the last token repeat it
        side = math.isqrt(length - 1) + 1
        indices = indices[:, np.minimum(np.arange(side * -(-length // side)), length - 1)].reshape(
            len(indices), -1, side
        )
    # Golden-ratio steps spread neighbouring numbers over the colour circle.
    hue = (indices * 0.61803398875) % 1.0
    colours = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.55), np.full_like(hue, 0.92)], axis=-1))
    height, width = originals.shape[1:3]
    rows, columns = np.arange(height) * indices.shape[1] // height, np.arange(width) * indices.shape[2] // width
    maps = (colours * 255).round().astype(np.uint8)[:, rows][:, :, columns]
    return picture_rows([originals, maps], f"Which code stands where (one colour a code); distinct codes: {distinct}.")


def in_plane(points: NDArray[Any]) -> NDArray[Any]:
    """Points (n, D) on their two main axes: (n, 2); those of one dimension lie on a line."""
    centred = points - points.mean(axis=0)
    flat = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def latent_map(latents: NDArray[Any], codes: NDArray[Any]) -> Figure:
    """Latents (n, D) and codes (m, D) in the plane of the latents' and codes' two main directions."""
    latents, codes = (rows[np.isfinite(rows).all(1)] for rows in (latents, codes))
    both = np.concatenate([latents, codes]).astype(np.float64)
    if not len(both):
        return Figure("", "No latent and no code is finite.")
    flat = in_plane(both)
    with _canvas(4.6, 4.2) as canvas:
        axes = canvas.subplots()
        parts = np.split(flat, [len(latents)])
        for points, colour, name in zip(parts, (COLOURS[1], COLOURS[0]), ("latents", "codes"), strict=True):
            x, y = points.T
            axes.scatter(x, y, s=7, color=colour, alpha=0.45, linewidths=0, label=name, rasterized=True)
        axes.legend(frameon=False, fontsize=9, markerscale=2.5)
        caption = "Codes and held-out latents on their two main axes. Codes that lie among the latents can be chosen."
        return Figure(_svg(canvas, dpi=150), caption)


@contextmanager
def _canvas(width: float, height: float) -> "Iterator[Canvas]":
    """An empty drawing of so many inches, in the pages' style."""
    import matplotlib  # late: most of what reads runs draws nothing
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(width, height))


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _svg(canvas: "Canvas", dpi: int = 100) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", dpi=dpi, transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _img(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="pixels" alt="" src="data:image/png;base64,{data}">'
