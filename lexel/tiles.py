"""Tiles for pictures that a network cannot hold at once: overlapping squares, blended where they meet."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError

PROBED = 32  # cells to either side within which it is looked for how far a network sees


class Tiles(NamedTuple):
    """Overlapping squares in which a picture goes through a network; what it holds at a time no longer grows with it.

    Each tile is computed with `overlap` pixels more on every side that is not the picture's border. Where the network
    sees no further than that, the result is the whole picture's to rounding. Where it does (attention, or group
    normalization, whose statistics are then those of the tile), neighbours differ and are blended linearly.

    Attributes:
        size: pixels of a side of what the network sees at a time; a multiple of the downsampling factor.
        overlap: pixels beyond the part that a tile is for, a multiple of the factor, at most a quarter of `size`; by
            default how far the network sees if that is so little, else an eighth of `size`.
    """

    size: int
    overlap: int | None = None

    def latents(self, encode: Callable[[Tensor], Tensor], images: Tensor, factor: int) -> Tensor:
        """Latents (B, D, h, w) of images (B, C, H, W), tile by tile.

        Args:
            encode: images (B, C, H', W') to latents (B, D, H' / factor, W' / factor).
            images: on any device; `encode` gets one tile at a time.
            factor: pixels of a side for one latent.

        Raises:
            UsageError: size or overlap do not fit the factor.
        """
        return self._through(encode, images, factor, factor, 1)

    def images(self, decode: Callable[[Tensor], Tensor], z: Tensor, factor: int) -> Tensor:
        """Images (B, C, H, W) of latents (B, D, h, w), tile by tile; see `latents`."""
        return self._through(decode, z, factor, 1, factor)

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the largest tile of a picture."""
        return min(height, self.size), min(width, self.size)

    def _through(self, network: Callable[[Tensor], Tensor], x: Tensor, factor: int, taken: int, given: int) -> Tensor:
        """A network over x, of which a cell is `taken` units of a side and becomes `given`."""
        limit = self._check(factor)
        cells = [side // taken for side in x.shape[-2:]]
        if max(cells) * factor <= self.size:
            return network(x)
        reach = reach_of(network, x, taken, given)
        if self.overlap is not None:
            overlap = self.overlap // factor
        else:
            overlap = reach if reach is not None and reach <= limit else max(1, self.size // factor // 8)
        # What a border of a tile has changed is left out, half of the overlap at least; the rest is the ramp.
        wrong = overlap / 2 if reach is None or reach > overlap else max(reach, overlap / 2)
        rows, columns = (spans(length, self.size // factor, overlap) for length in cells)
        result: Tensor | None = None
        for row in rows:
            weights_of_row = row.weights(given, overlap - wrong, x.device)
            for column in columns:
                part = network(x[..., row.slice(taken), column.slice(taken)])
                if result is None:
                    result = part.new_zeros(*part.shape[:-2], *(length * given for length in cells))
                weights = weights_of_row[:, None] * column.weights(given, overlap - wrong, x.device)
                result[..., row.slice(given), column.slice(given)] += part * weights.to(part)
        assert result is not None
        return result

    def _check(self, factor: int) -> int:
        """The largest overlap, in cells."""
        if self.size % factor or self.size < 4 * factor:
            raise UsageError(
                f"tiles need a side that is a multiple of {factor} pixels and at least {4 * factor}, got {self.size}"
            )
        limit = self.size // factor // 4
        if self.overlap is not None and (self.overlap % factor or not 0 <= self.overlap <= limit * factor):
            raise UsageError(
                f"tiles of {self.size} pixels overlap by a multiple of {factor} from 0 to {limit * factor}, "
                f"got {self.overlap}"
            )
        return limit


class Span(NamedTuple):
    """One axis of a tile in cells: [first, last) is the part that it is for, [start, stop) what the network gets."""

    first: int
    last: int
    start: int
    stop: int
    length: int  # of the picture

    def slice(self, unit: int) -> slice:
        """What the network gets, in units of which a cell has so many."""
        return slice(self.start * unit, self.stop * unit)

    def weights(self, unit: int, ramp: float, device: torch.device) -> Tensor:
        """How much each unit counts: 1 inside, falling over the `ramp` cells at both sides of where tiles meet."""
        places = (
            self.start
            + (torch.arange((self.stop - self.start) * unit, device=device, dtype=torch.float64) + 0.5) / unit
        )
        weights = torch.ones_like(places)
        for border, distance in ((self.first, places - self.first), (self.last, self.last - places)):
            if 0 < border < self.length:
                weights *= (distance / (2 * ramp) + 0.5).clamp(0, 1) if ramp else (distance > 0).double()
        return weights


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """The tiles of an axis of `length` cells, none longer than `size`; the parts that they are for differ by a cell."""
    count = 1 if length <= size else -(-length // (size - 2 * overlap))
    borders = [number * length // count for number in range(count + 1)]
    return [
        Span(first, last, max(0, first - overlap), min(length, last + overlap), length)
        for first, last in itertools.pairwise(borders)
    ]


def reach_of(network: Callable[[Tensor], Tensor], x: Tensor, taken: int, given: int) -> int | None:
    """How many cells to a side a result of the network depends on; None where it is more than can be seen here.

    A strip of cells with NaN in the middle goes through the network: what depends on it becomes NaN. A library whose
    convolutions mix more than they need (Winograd's) can only make it look further.

    Args:
        network: from cells of `taken` units of a side to cells of `given`.
        x: (B, C, H, W), for its channels, type and device.
        taken, given: units of a cell's side, before and after.
    """
    middle = slice(PROBED * taken, (PROBED + 1) * taken)
    strip = x.new_zeros(1, x.shape[1], taken, (2 * PROBED + 1) * taken)
    strip[..., middle] = torch.nan
    reached = network(strip).isnan().flatten(0, -2).any(0).nonzero().flatten() // given
    if not len(reached):
        return 0
    far = max(PROBED - int(reached[0]), int(reached[-1]) - PROBED)
    return far if far < PROBED else None
