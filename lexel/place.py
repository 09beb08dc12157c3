"""Names of version 0.1; devices and precisions are in `lexel.runtime`."""

from lexel.runtime import PRECISIONS
from lexel.runtime import Runtime as Place
from lexel.runtime import runtime as place

__all__ = ["PRECISIONS", "Place", "place"]
