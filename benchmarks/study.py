"""The tables of docs/studies/which-quantizer.md, from benchmarks/which-quantizer.json: results of `compare` go in here.

python -m benchmarks study --setting "openmoji 1024 32 1000" --add runs/compare/runs/*      (adds seeds, or rows)
python -m benchmarks study                                                                  (writes the tables)
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lexel.compare.run import RESULT, gradient_health, read_finished
from lexel.compare.summary import summarise

FIGURES = Path(__file__).with_name("which-quantizer.json")
PAGE = Path(__file__).parents[1] / "docs" / "studies" / "which-quantizer.md"

# The columns of the first table, and the prototype of the same formulas that stands in where a setting has no run.
FINALISTS = {
    "none": ("none", None),
    "VQ": ("vq", None),
    "SimVQ": ("simvq", None),
    "affine at 0.25": ("affine_c25", None),
    "affine": ("affine", "ste_c10"),
    "IBQ": ("ibq", None),
    "ibq_affine": ("ibq_affine", None),
    "blended": ("ibq_affine_blend", "half_c05"),
}
SETTINGS = {
    "cifar10": "CIFAR-10",
    "cifar10-all": "all of CIFAR-10",
    "photos_64": "photographs, 64 px",
    "photos_64-all": "all photographs, 64 px",
    "openmoji": "drawings, 32 px, 16 tokens",
}
DETAILS = [
    "openmoji 1024 32 1000",
    "photo-crops 1024 32 1000",
    "openmoji 16384 32 1000",
    "photo-crops 16384 32 1000",
    "photo-crops 16384 32 4000",
]
COLUMNS = {  # of a detailed table: heading, name in the figures, form
    "codes in use": ("usage", "{:.1%}"),
    "perplexity": ("perplexity", "{:,.0f}"),
    "PSNR, dB": ("psnr", "{:.2f}"),
    "LPIPS (VGG)": ("lpips_vgg", "{:.3f}"),
    "fd": ("fd_efficientnet_lite0", "{:.0f}"),
    "gradient: size": ("gradient_ratio", "{:.2f}"),
    "cosine": ("gradient_cosine", "{:.2f}"),
}


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--setting", help='where results go: "DATA CODES DIMENSION STEPS"; with --add')
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="run folders of `lexel compare`")


def run(arguments: argparse.Namespace) -> None:
    """Adds results to the figures, and writes the tables of the page again."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if arguments.add and not arguments.setting:
        raise SystemExit("--add needs --setting, which names the table: --setting 'openmoji 1024 32 1000'")
    for folder in arguments.add:
        result = read_finished(folder / RESULT)
        add(figures.setdefault(arguments.setting, []), summarise([result | gradient_health(folder)])[0])
    parts = ",\n".join(
        f"{json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"
        for key, rows in figures.items()
    )
    FIGURES.write_text(f"{{\n{parts}\n}}\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for section, lines in tables(figures).items():
        start, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
        head, rest = text.split(start)
        text = head + start + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


def add(rows: list[dict[str, Any]], new: Mapping[str, Any]) -> None:
    """Adds the row of one run to a table: as a seed of the row of its quantizer, or as a row.

    A number that only some seeds have is left out. A seed that is there stays as it is.
    """
    numbers = {name: value for name, value in new.items() if isinstance(value, dict) and value["mean"] is not None}
    old = next((row for row in rows if row["quantizer"] == new["quantizer"]), None)
    if old is None:
        rows.append({name: value for name, value in new.items() if not isinstance(value, dict)})
        rows[-1] |= {name: joined(value["values"]) for name, value in numbers.items()}
    elif new["seeds"][0] not in old["seeds"]:
        order = sorted(range(len(old["seeds"]) + 1), key=[*old["seeds"], *new["seeds"]].__getitem__)
        for name in ("seeds", "runs"):
            old[name] = [[*old[name], *new[name]][number] for number in order]
        for name in [name for name, value in old.items() if isinstance(value, dict)]:
            if name in numbers:
                values = [*old[name]["values"], *numbers[name]["values"]]
                old[name] = joined([values[number] for number in order])
            else:
                del old[name]


def joined(values: list[float]) -> dict[str, Any]:
    """A number over seeds, to six digits behind the point."""
    deviation = round(statistics.stdev(values), 6) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 6), "deviation": deviation, "values": [round(v, 6) for v in values]}


def tables(figures: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """The lines of every table of the page, by the name of its place there."""
    return {"finalists": finalists(figures)} | {key: detailed(figures[key]) for key in DETAILS}


def finalists(figures: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """The first table: a line a setting, a column a method, the number of seeds in brackets where there are several."""
    lines = [heading(["PSNR, dB (LPIPS)", *FINALISTS])]
    for key in (key for key in figures if key.split()[0] in SETTINGS and key.split()[2] == "32"):
        data, codes, _, steps = key.split()
        rows = {row["quantizer"]: row for row in figures[key]}
        stand_ins = {row["quantizer"]: row for row in figures.get(f"prototypes {key}", [])}
        cells = [f"{SETTINGS[data]}, {int(codes):,} codes, {int(steps):,} steps"]
        for name, prototype in FINALISTS.values():
            row = rows.get(name) or stand_ins.get(prototype or "")
            lpips = f" ({row['lpips_vgg']['mean']:.3f})".replace("0.", ".") if row and "lpips_vgg" in row else ""
            cells.append(number(row["psnr"], "{:.2f}", True) + lpips if row else "-")
        if sum(cell != "-" for cell in cells) > 2:
            lines.append(line(cells))
    return lines


def detailed(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A table with every number of a setting, best PSNR first."""
    lines = [heading(["quantizer", "seeds", *COLUMNS])]
    for row in sorted(rows, key=lambda row: -row["psnr"]["mean"]):
        cells = [number(row[name], form) if name in row else "-" for name, form in COLUMNS.values()]
        lines.append(line([row["quantizer"], str(len(row["seeds"])), *cells]))
    return lines


def number(value: Mapping[str, Any], form: str, count: bool = False) -> str:
    """A mean with its deviation over seeds, and on request their number."""
    text = form.format(value["mean"])
    if value["deviation"] is None:
        return text
    deviation = form.format(value["deviation"])
    text += f" ± {deviation}" if deviation.strip("0.%") else ""
    return text + (f" ({len(value['values'])})" if count else "")


def heading(cells: list[str]) -> str:
    """The first two lines of a table."""
    return line(cells) + "\n" + "|---" * len(cells) + "|"


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
