"""Every quantizer under one contract. A new one is one file and one line here."""

import inspect
from collections.abc import Mapping
from typing import Any

from lexel.errors import UsageError, unknown
from lexel.quantizers.base import Quantized, Quantizer
from lexel.quantizers.ibq import IBQ
from lexel.quantizers.vq import VQ

QUANTIZERS: dict[str, type[Quantizer]] = {"vq": VQ, "ibq": IBQ}


def build(kind: str, options: Mapping[str, Any]) -> Quantizer:
    """A quantizer from its name in QUANTIZERS and the arguments of that constructor.

    Raises:
        UsageError: the kind or an option is unknown, or a required option is missing.
    """
    if kind not in QUANTIZERS:
        raise unknown("quantizer", kind, QUANTIZERS)
    parameters = dict(inspect.signature(QUANTIZERS[kind]).parameters)
    for name in options:
        if name not in parameters:
            raise UsageError(f"quantizer {kind!r} has no option {name!r}; its options are {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"quantizer {kind!r} needs the option {name!r}")
    return QUANTIZERS[kind](**options)


__all__ = ["IBQ", "QUANTIZERS", "VQ", "Quantized", "Quantizer", "build"]
