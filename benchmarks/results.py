"""The figures of benchmarks: a JSON file that keeps every number, and a Markdown page with a section for each."""

import argparse
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from lexel.machine import commit as code
from lexel.machine import processor

PAGE = Path(__file__).parent / "RESULTS.md"

# Sections of the page: the module that writes its lines, and whether from its own figures or from all of them.
SECTIONS = {
    "quantizers": ("quantizers", False),
    "scans": ("scans", True),
    "clusters": ("clusters", True),
    "step": ("step", True),
    "samplers": ("samplers", True),
    "speculative": ("speculative", True),
    "gpu": ("gpu_page", True),
    "traffic": ("traffic", True),
    "startup": ("startup", True),
    "listing": ("listing", True),
    "throughput": ("throughput", True),
    "evaluation": ("evaluation", True),
    "faults": ("faults", True),
    "soak": ("soak", True),
    "million": ("million", True),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", type=Path, help="a folder of `python -m benchmarks gpu --out`, to take in first")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page; figures lie beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Writes every section of the page again from the figures that are kept."""
    figures = read(arguments.out)
    if arguments.gpu:
        for path in sorted(arguments.gpu.glob("*.json")):
            figures.setdefault("gpu", {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    for section, (module, own) in SECTIONS.items():
        if own and section not in figures:
            continue
        lines = importlib.import_module(f"benchmarks.{module}").section(figures[section] if own else figures)
        write(arguments.out, figures, section, lines)


def read(page: Path) -> dict[str, Any]:
    """All figures, from the JSON file beside the page."""
    store = page.with_suffix(".json")
    return json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}


def write(page: Path, figures: dict[str, Any], section: str, lines: list[str]) -> None:
    """Stores the figures, and puts lines between the markers of a section; the rest of the page stays."""
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    start, end = f"<!-- {section} -->", f"<!-- end of {section} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    if start not in text:
        text += f"\n{start}\n{end}\n"
    head, rest = text.split(start)
    body = "\n".join(lines).strip()
    page.write_text(f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def show(page: Path | None, section: str, figures: dict[str, Any], lines: list[str]) -> None:
    """Prints the lines of a section; with a page they are written to it, and the figures of the section kept."""
    print("\n".join(lines))
    if page is not None:
        write(page, {**read(page), section: figures}, section, lines)


def commit() -> str:
    """The short name of the commit that is measured."""
    return code() or ""


def machine(device: str, threads: int) -> str:
    """What was measured on, in a line."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = processor()
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{name} ({platform.machine()}, {bf16} AVX512-BF16), {count}, torch {torch.__version__}"
