"""Several sources as one, by weight: `mixture:0.7*folder:photos + 0.3*tar:drawings.tar`."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lexel.data.images import ImageSet, digest
from lexel.errors import UsageError


class Weighted(NamedTuple):
    """A source and its share."""

    weight: float
    source: str


def parse_mixture(location: str) -> list[Weighted]:
    """The parts of `0.7*folder:photos + 0.3*openmoji`; a part without a weight has 1.

    Raises:
        UsageError: a weight is no positive number, or there are fewer than two parts.
    """
    parts = []
    for text in location.split(" + "):
        weight, star, source = text.strip().partition("*")
        if not star or not re.fullmatch(r"[0-9.eE+-]+", weight.strip()):
            weight, source = "1", text.strip()
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf) or not source.strip():
            raise UsageError(f"{text.strip()!r} is no part of a mixture; write WEIGHT*SOURCE + WEIGHT*SOURCE")
        parts.append(Weighted(value, source.strip()))
    if len(parts) < 2:
        raise UsageError(f"a mixture needs two sources or more: WEIGHT*SOURCE + WEIGHT*SOURCE, got {location!r}")
    return parts


class Mixture(ImageSet):
    """Several sets as one, each with its share of the pictures of an epoch.

    An epoch shows every picture of the set that is largest for its weight once, and those of the others as often as
    their weights ask, some once more than others. Classes are united by their names; labels and captions are there
    if all sets have them.

    Args:
        sets: the sets.
        weights: their shares; None shows every picture of every set once.
    """

    def __init__(self, sets: Sequence[ImageSet], weights: Sequence[float] | None = None) -> None:
        if any(images.window is not None for images in sets):
            raise UsageError("a stream is read forwards and cannot be mixed with others; write it to tar shards first")
        self.sets, self.weights = list(sets), None if weights is None else list(weights)
        sizes = [len(images) for images in sets]
        if weights is None:
            shares = sizes
        else:
            scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
            shares = [max(1, round(weight * scale)) for weight in weights]
        self._ends = np.cumsum(shares)
        names: list[str] = []
        labels: list[int] | None = [] if all(images.labels is not None for images in sets) else None
        classes = sorted({name for images in sets for name in images.classes}) if labels is not None else []
        captions: list[str] | None = [] if all(images.captions is not None for images in sets) else None
        for number, (images, share) in enumerate(zip(sets, shares, strict=True)):
            own = images if labels is None else images.with_classes(classes)
            for slot in range(share):
                again, place = divmod(slot, len(images))
                names.append(f"{number}:{images.names[place]}" + (f"#{again}" if again else ""))
                if labels is not None and own.labels is not None:
                    labels.append(own.labels[place])
                if captions is not None and images.captions is not None:
                    captions.append(images.captions[place])
        attribution = "; ".join(dict.fromkeys(images.attribution for images in sets if images.attribution))
        super().__init__(names, labels, classes, attribution or None)
        self.captions = captions
        kinds = {(images.channels, images.depth) for images in sets}
        if len(kinds) > 1:
            raise UsageError(f"the sources of a mixture differ in channels and bits: {sorted(kinds)}")
        self.channels, self.depth = kinds.pop()
        self.left_out = {name: why for images in sets for name, why in images.left_out.items()}

    def _place(self, number: int) -> tuple[ImageSet, int]:
        part = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        return self.sets[part], (number - first) % len(self.sets[part])

    def read(self, number: int) -> np.ndarray:
        images, place = self._place(number)
        return images.read(place)

    def fingerprint(self) -> str:
        return digest(["mixture", self.weights, [images.fingerprint() for images in self.sets]])

    def decoded_with(self, **options: Any) -> ImageSet:
        return Mixture([images.decoded_with(**options) for images in self.sets], self.weights)

    @property
    def decoded_on_gpu(self) -> bool:
        return any(images.decoded_on_gpu for images in self.sets)

    def hold_out(self, fraction: float) -> tuple[ImageSet, ImageSet]:
        """A part of every set, so that no picture shown twice is on both sides; the held-out ones are shown once."""
        parts = [images.hold_out(fraction) for images in self.sets]
        return Mixture([rest for rest, _ in parts], self.weights), Mixture([held for _, held in parts])
