"""A static, sortable page out of evaluation results, grouped by the bits of a picture.

Numbers stand in one table only where they were measured alike: same protocol, same images, same networks
(`lexel.evaluate.compare_results` knows). Anything else is refused with the reason.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lexel.data import read_image
from lexel.errors import UsageError
from lexel.evaluate import compare_results, read_result
from lexel.report import Figure, Section, labelled_rows, write_page

HIGHER_IS_BETTER = {
    "psnr",
    "ssim",
    "usage",
    "perplexity",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "text_survival",
    "reachable_codes",
}
CODE = ("weights", "lexel", "machine")  # the last columns
PICTURE_SIDE = 512  # pixels; larger pictures are made smaller


def write_leaderboard(
    results: Mapping[str, str | Path], out: str | Path, pictures: Mapping[str, str | Path] | None = None
) -> Path:
    """Writes `index.html` into a folder; returns its path.

    Args:
        results: files of `lexel evaluate --json`, by the name that each gets on the page.
        out: the folder; made if it does not exist.
        pictures: a picture file for some of the names.

    Raises:
        UsageError: there are no results, two cannot be compared, or a picture belongs to none of them.
    """
    if not results:
        raise UsageError("a leaderboard needs results; write them with `lexel evaluate --json`")
    read = {name: read_result(path) for name, path in results.items()}
    check_comparable(read)
    strangers = set(pictures or {}) - set(read)
    if strangers:
        raise UsageError(f"there is no result {min(strangers)!r} for the picture; names are {', '.join(read)}")
    first = next(iter(read.values()))
    metrics = list(dict.fromkeys(name for result in read.values() for name in result["metrics"]))
    groups: dict[float | None, dict[str, Any]] = {}
    for name, result in read.items():
        groups.setdefault(bits_of(result), {})[name] = result
    order = sorted(groups, key=lambda bits: (bits is None, bits))
    sections = [
        Section(
            "Bits a picture not recorded" if bits is None else f"{bits:,.0f} bits a picture",
            table=table(groups[bits], metrics),
        )
        for bits in order
    ]
    if pictures:
        rows = [labelled_rows({name: small_picture(path)[None]}) for name, path in pictures.items()]
        sections.append(Section("Pictures", figures=[Figure("".join(row.html for row in rows))], wide=True))
    sections.append(Section("How it was measured", table=conditions(first)))
    protocol, data = first["protocol"]["name"], first["data"]
    lead = f"{len(read)} results under the protocol {protocol}, over the same {data['images']:,} images."
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(folder / "index.html", "Leaderboard", lead, sections, sortable=True)


def check_comparable(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses results that are not on one scale; every pair is looked at, since a metric may be in some only.

    Raises:
        UsageError: names the two and the reason.
    """
    names = list(results)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            try:
                compare_results(results[one], results[other])
            except UsageError as error:
                raise UsageError(f"{one} and {other}: {error}") from None


def bits_of(result: Mapping[str, Any]) -> float | None:
    """Bits of a picture's tokens; None in results that do not tell."""
    tokens = result.get("tokens")
    bits = tokens.get("bits") if isinstance(tokens, dict) else None
    return float(bits) if isinstance(bits, int | float) else None


def table(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> list[list[str]]:
    """One row a result, the best first by the first metric; the first row is the head."""
    shown = [name for name in metrics if any(result["metrics"].get(name) is not None for result in results.values())]
    rows = [["", *(f"{name} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name in shown), *CODE]]

    def rank(name: str) -> tuple[bool, float]:
        value = results[name]["metrics"].get(shown[0]) if shown else None
        if value is None:
            return True, 0.0
        return False, -value if shown[0] in HIGHER_IS_BETTER else value

    for name in sorted(results, key=rank):
        result = results[name]
        cells = [_cell(result["metrics"].get(metric), result["intervals"].get(metric)) for metric in shown]
        rows.append([name, *cells, *code_of(result)])
    return rows


def code_of(result: Mapping[str, Any]) -> list[str]:
    """By what a result was made, as CODE names it; "-" where an older file does not say."""
    versions = result.get("versions") or {}
    weights, machine = result.get("tokenizer") or "-", result.get("machine") or result.get("device") or "-"
    return [str(weights)[:12], str(versions.get("commit") or versions.get("lexel") or "-"), str(machine)]


def conditions(result: Mapping[str, Any]) -> list[list[str]]:
    """The conditions that all results have in common."""
    data, network = result["data"], result.get("network")
    rows = [["", "all results"], ["protocol", result["protocol"]["name"]], ["images", f"{data['images']:,}"]]
    if isinstance(result.get("public_set"), str):
        rows.append(["public set", result["public_set"]])
    rows.append(["fingerprint of the images", data["fingerprint"][:12]])
    if network:
        rows.append(["feature network", f"{network['name']} {network['fingerprint'][:12]}"])
    return rows


def small_picture(path: str | Path) -> np.ndarray:
    """A picture file, at most `PICTURE_SIDE` pixels a side: uint8 (H, W, 3).

    Raises:
        UsageError: it cannot be read.
    """
    image = Image.fromarray(read_image(path))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return np.asarray(image)


def _cell(value: float | None, interval: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}"
    if interval and interval.get("standard_error") is not None:
        return f"{text} ± {1.96 * interval['standard_error']:.2g}"
    return text
