"""Every quantizer under one contract. A new one is one file and one line here."""

import inspect
from collections.abc import Mapping
from typing import Any

from lexel.errors import UsageError, unknown
from lexel.quantizers.affine import Affine
from lexel.quantizers.base import Quantized, Quantizer
from lexel.quantizers.bsq import BSQ
from lexel.quantizers.continuous import Continuous
from lexel.quantizers.cosine import Cosine
from lexel.quantizers.ema import EMA
from lexel.quantizers.fsq import FSQ
from lexel.quantizers.fvq import FVQ
from lexel.quantizers.gumbel import Gumbel
from lexel.quantizers.ibq import IBQ
from lexel.quantizers.lfq import LFQ
from lexel.quantizers.product import Product
from lexel.quantizers.residual import Residual
from lexel.quantizers.simvq import SimVQ
from lexel.quantizers.soft import Soft
from lexel.quantizers.table import Table
from lexel.quantizers.vq import VQ
from lexel.quantizers.vqgan_lc import VQGANLC, build_bank, load_bank, save_bank

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VQ,
    "ema": EMA,
    "cosine": Cosine,
    "gumbel": Gumbel,
    "soft": Soft,
    "ibq": IBQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": FSQ,
    "vqgan_lc": VQGANLC,
    "simvq": SimVQ,
    "fvq": FVQ,
    "affine": Affine,
    "residual": Residual,
    "product": Product,
}

# What `build` knows besides the methods: a baked table, and no quantization at all.
_OTHERS: dict[str, type[Quantizer]] = {"table": Table, "none": Continuous}


def build(kind: str, options: Mapping[str, Any]) -> Quantizer:
    """A quantizer from its name in QUANTIZERS (or "table" or "none") and the arguments of that constructor.

    Raises:
        UsageError: the kind or an option is unknown, or a required option is missing.
    """
    known = QUANTIZERS | _OTHERS
    if kind not in known:
        raise unknown("quantizer", kind, known)
    parameters = dict(inspect.signature(known[kind]).parameters)
    for name in options:
        if name not in parameters:
            raise UsageError(f"quantizer {kind!r} has no option {name!r}; its options are {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"quantizer {kind!r} needs the option {name!r}")
    return known[kind](**options)


__all__ = [
    "BSQ",
    "EMA",
    "FSQ",
    "FVQ",
    "IBQ",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "VQGANLC",
    "Affine",
    "Continuous",
    "Cosine",
    "Gumbel",
    "Product",
    "Quantized",
    "Quantizer",
    "Residual",
    "SimVQ",
    "Soft",
    "Table",
    "build",
    "build_bank",
    "load_bank",
    "save_bank",
]
