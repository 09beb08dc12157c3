"""The figures of benchmarks: a JSON file that keeps every number, and a Markdown page with a section for each."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from lexel.machine import commit as code
from lexel.machine import processor

PAGE = Path(__file__).parent / "RESULTS.md"


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
