"""A text reader: the PP-OCR networks of the package `rapidocr`, which carries their weights (Apache-2.0)."""

import functools
import hashlib
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lexel.errors import UsageError

MISSING = "the metric of text needs RapidOCR: pip install 'lexel[ocr]'"


class Line(NamedTuple):
    """A line of text in a picture."""

    text: str
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class Reader:
    """Finds and reads the lines of text in pictures.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self) -> None:
        if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
            raise UsageError(MISSING)
        self._engine: Any = import_module("rapidocr").RapidOCR(params={"Global.log_level": "critical"})

    def read(self, picture: np.ndarray) -> list[Line]:
        """The lines in a picture, uint8 (H, W, 3), as the network orders them."""
        found = self._engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes BGR
        if found.txts is None or found.boxes is None:
            return []
        lines = []
        for text, corners in zip(found.txts, np.asarray(found.boxes, np.float64), strict=True):
            (left, top), (right, bottom) = corners.min(0), corners.max(0)
            lines.append(Line(str(text), (float(left), float(top), float(right), float(bottom))))
        return lines

    def about(self) -> dict[str, str]:
        """The package's version and the fingerprint of its weights."""
        return {"rapidocr": metadata.version("rapidocr"), "weights": _weights()}


@functools.cache
def _weights() -> str:
    found = find_spec("rapidocr")
    digest = hashlib.sha256()
    if found is not None and found.origin is not None:
        for path in sorted((Path(found.origin).parent / "models").glob("*.onnx")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
