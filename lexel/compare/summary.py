"""The table of a comparison: one row a method, means and deviations over seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NETWORK = "efficientnet_lite0"  # of the Fréchet distance, which carries its name
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
            row[name] = mean_and_deviation([values[name] for values in measured if values.get(name) is not None])
        rows.append(row)
    return rows


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
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
