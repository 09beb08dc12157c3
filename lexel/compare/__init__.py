"""Quantizers on equal terms: one recipe, and only the quantizer changes.

`compare` trains the recipe once for every quantizer, codebook size, code dimension and seed: the same pictures in the
same order, the same start of encoder and decoder for a seed, the same losses and the same number of steps. Each
training is a run folder of its own that `lexel train` could have made, so anyone can rerun a row. A finished run is not
trained again, and a stopped one goes on.
"""

from lexel.compare.halving import Dropped, Halving, halving
from lexel.compare.plan import PlannedRun, Variant, expand, read_variants
from lexel.compare.run import METRICS, ComparisonResult, compare
from lexel.compare.summary import summarise, table

__all__ = [
    "METRICS",
    "ComparisonResult",
    "Dropped",
    "Halving",
    "PlannedRun",
    "Variant",
    "compare",
    "expand",
    "halving",
    "read_variants",
    "summarise",
    "table",
]
