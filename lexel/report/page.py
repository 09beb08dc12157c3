"""One self-contained HTML page out of sections: no network, no scripts but for sorting, readable on a phone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lexel
from lexel.checkpoint import atomic
from lexel.metrics.health import Finding
from lexel.report.figures import Figure


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


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    tiles: Sequence[tuple[str, str]] = (),
    footer: str = "",
    sortable: bool = False,
) -> Path:
    """Writes one self-contained page; with `sortable`, tables sort by the heads of their columns."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lexel.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    footer = footer or f"Made by Lexel {lexel.__version__}."
    html = environment.get_template("page.html.j2").render(
        title=title, lead=lead, tiles=tiles, sections=sections, footer=footer, sortable=sortable
    )
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path
