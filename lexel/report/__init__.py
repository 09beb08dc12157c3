"""Pages that people look at: one self-contained HTML file a run, no network, readable on a phone.

`write_report(run)` reads a run folder and nothing else. Its figures (`line_chart`, `picture_rows`, `code_map`,
`latent_map`, ...) and `write_page` serve the demo's and the comparison's pages too.
"""

from lexel.report.figures import (
    Figure,
    code_histogram,
    code_map,
    labelled_rows,
    latent_map,
    line_chart,
    picture_rows,
    series,
)
from lexel.report.page import Section, write_page
from lexel.report.reference import ReferenceCurves, curves_of, read_curves, reference_for, write_curves
from lexel.report.run_page import generator_figures, write_report

__all__ = [
    "Figure",
    "ReferenceCurves",
    "Section",
    "code_histogram",
    "code_map",
    "curves_of",
    "generator_figures",
    "labelled_rows",
    "latent_map",
    "line_chart",
    "picture_rows",
    "read_curves",
    "reference_for",
    "series",
    "write_curves",
    "write_page",
    "write_report",
]
