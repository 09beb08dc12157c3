"""Pictures beyond memory: encoded and decoded in overlapping tiles that are blended into one another.

How far a latent looks in its picture, and a pixel in its latents, is measured on the network itself. Where that is
bounded (convolutions without normalization over space and without attention) and the overlap covers it, tiles give what
the whole picture gives, to rounding. Where it is not, `Tiled.seam` measures what the seams cost.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer

LENGTHS = 32, 96, 256  # cells of the strips on which a reach is looked for, until one is longer than it

Read = Callable[
    [int, int, int, int], Tensor
]  # top, bottom, left, right in pixels to (B, C, bottom - top, right - left)


class Reach(NamedTuple):
    """How many cells around its own a result depends on, along an axis; a cell is the pixels of one latent."""

    before: int
    after: int


class Seam(NamedTuple):
    """What tiles change, beside the whole picture."""

    tokens: float  # share of the tokens that differ
    overlap: float  # root mean square difference of the reconstructions where tiles overlap, in levels of 255
    interior: float  # the same elsewhere

    @property
    def ratio(self) -> float:
        """The difference where tiles overlap over that elsewhere; 1 where there is none anywhere."""
        return self.overlap / self.interior if self.interior else (math.inf if self.overlap else 1.0)


class Tiled:
    """A tokenizer that takes pictures in overlapping tiles: any size, with the memory of one row of tiles.

        tiled = Tiled(tokenizer, tile=512)
        indices = tiled.encode(images)  # (B, 3, 8192, 8192)
        for strip in tiled.decode_rows(indices): ...  # (B, 3, rows, 8192), top to bottom

    Latents are blended before they are quantized, and images after they are decoded. Images no larger than a tile pass
    whole.

    Args:
        tokenizer: any whose tokens lie on a grid over the image and whose images may have any size.
        tile: pixels of a tile's side, a multiple of the tokenizer's factor.
        overlap: pixels that neighbours share, at least; a multiple of the factor and less than the tile. By default
            what makes tiles equal the whole where at most half a tile does that, else a quarter of the tile.

    Raises:
        UsageError: the tokenizer cannot take tiles, or the sizes do not fit.
    """

    def __init__(self, tokenizer: Tokenizer, tile: int, overlap: int | None = None) -> None:
        network = tokenizer.autoencoder
        factor, kind = network.downsampling, tokenizer.config.autoencoder.kind
        if factor is None or network.axes != 2:
            raise UsageError(f"the {kind} autoencoder takes no tiles: its tokens have no places in the image")
        if network.fixed_size is not None:
            raise UsageError(f"the {kind} autoencoder takes no tiles: its images need {network.sizes}")
        if tile < 2 * factor or tile % factor:
            raise UsageError(f"a tile must be a multiple of {factor} pixels, {2 * factor} at least, got {tile}")
        if overlap is not None and (overlap < 0 or overlap % factor or overlap >= tile):
            raise UsageError(
                f"the overlap must be a multiple of {factor} pixels and less than the tile's {tile}, got {overlap}"
            )
        self.tokenizer = tokenizer
        self.tile, self.factor = tile, factor
        self._given = overlap

    @cached_property
    def encoder_reach(self) -> Reach | None:
        """The cells around its own that a latent depends on; None if it depends on pixels however far away.

        Found with one cell of pixels that are no numbers (NaN): what depends on them is none either.
        """
        channels, factor = self.tokenizer.channels, self.factor
        return self._reach((1, channels, factor, factor), self.tokenizer.latents, 1)

    @cached_property
    def decoder_reach(self) -> Reach | None:
        """The cells around its own that a pixel depends on; None if it depends on codes however far away."""
        return self._reach((1, self.tokenizer.quantizer.codebook_dim, 1, 1), self.tokenizer.decode_codes, self.factor)

    @cached_property
    def needed(self) -> int | None:
        """Pixels that neighbours must share for tiles to equal the whole; None if no overlap does that."""
        if self.encoder_reach is None or self.decoder_reach is None:
            return None
        return self.factor * max(sum(self.encoder_reach), sum(self.decoder_reach))

    @property
    def overlap(self) -> int:
        """Pixels that neighbours share, at least."""
        if self._given is not None:
            return self._given
        if self.needed is not None and 2 * self.needed <= self.tile:
            return self.needed
        return self.tile // 4 // self.factor * self.factor

    @property
    def exact(self) -> bool:
        """Whether tiles give what the whole picture gives, to the rounding of arithmetic."""
        return self.needed is not None and self.needed <= self.overlap

    def told(self) -> str:
        """Tiles, overlap, and whether they give what the whole gives, in words."""
        tiles = f"tiles of {self.tile:,} pixels that overlap by {self.overlap:,}"
        if self.exact:
            return f"{tiles} equal the whole picture: the network reaches no further"
        if self.needed is None:
            return f"{tiles} differ from the whole picture: normalization or attention reaches over all of it"
        return f"{tiles} differ from the whole picture, which needs an overlap of {self.needed:,}"

    def encode(self, images: Tensor) -> Tensor:
        """The indices of images (B, C, H, W) in [-1, 1]: as `Tokenizer.encode`, tile by tile.

        Raises:
            UsageError: as `Tokenizer.encode`.
        """
        height, width = images.shape[-2:] if images.dim() == 4 else (0, 0)
        if max(height, width) <= self.tile:
            return self.tokenizer.encode(images)
        self.tokenizer.check_images(images)
        return self.encode_from(lambda top, bottom, left, right: images[:, :, top:bottom, left:right], height, width)

    def encode_from(self, read: Read, height: int, width: int) -> Tensor:
        """The indices of images that are read tile by tile.

        Args:
            read: gives images (B, C, bottom - top, right - left) in [-1, 1] for (top, bottom, left, right).
            height, width: of the whole images; a size that fits.
        """
        if self._local:  # the latents of a row of tiles are gone once they are tokens
            return torch.cat([self.tokens(z) for z in self.latent_rows(read, height, width)], -2)
        return self.tokens(torch.cat(list(self.latent_rows(read, height, width)), -2))

    @torch.no_grad()
    def tokens(self, z: Tensor) -> Tensor:
        """The indices of latents."""
        with self.tokenizer.evaluating():
            return self.tokenizer.tokens(z)

    def latent_rows(self, read: Read, height: int, width: int) -> Iterator[Tensor]:
        """Latents (B, D, rows, w), from top to bottom, of images that are read tile by tile."""
        rows, columns = self.tokenizer.grid(height, width)
        factor = self.factor

        def latents(top: int, bottom: int, left: int, right: int) -> Tensor:
            images = read(top * factor, bottom * factor, left * factor, right * factor)
            self.tokenizer.check_images(images)
            return self.tokenizer.latents(images)

        yield from self._blended(latents, rows, columns, self.encoder_reach, 1)

    def decode(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Images (B, C, H, W) clamped to [-1, 1] from indices: as `Tokenizer.decode`, tile by tile.

        Raises:
            UsageError: as `Tokenizer.decode`.
        """
        return torch.cat(list(self.decode_rows(indices, grid)), -2)

    def decode_rows(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Iterator[Tensor]:
        """Strips (B, C, rows, W) of the images of indices, from top to bottom: what memory need not hold whole.

        Raises:
            UsageError: as `Tokenizer.decode`.
        """
        if self._local and not self.tokenizer.continuous:
            rows, columns = self.tokenizer.grid_of(indices, grid)

            def codes(top: int, bottom: int, left: int, right: int) -> Tensor:
                return self.tokenizer.codes(indices[..., top:bottom, left:right].to(device))
        else:
            whole = self.tokenizer.codes(indices, grid)
            rows, columns = whole.shape[-2:]

            def codes(top: int, bottom: int, left: int, right: int) -> Tensor:
                return whole[..., top:bottom, left:right]

        device = next(self.tokenizer.parameters()).device
        yield from self._blended(
            lambda *place: self.tokenizer.decode_codes(codes(*place)).clamp(-1, 1),
            rows,
            columns,
            self.decoder_reach,
            self.factor,
        )

    def seam(self, images: Tensor) -> Seam:
        """What the tiles of images (B, C, H, W) change: tiles beside the whole, which must fit in memory.

        Raises:
            UsageError: the images are no larger than a tile, or as for `Tokenizer.encode`.
        """
        height, width = images.shape[-2:]
        if max(height, width) <= self.tile:
            raise UsageError(f"images of {width} x {height} pixels have no seam between tiles of {self.tile}")
        whole = self.tokenizer.encode(images)
        tokens = self.encode(images)
        difference = (self.decode(tokens) - self.tokenizer.decode(whole)).square().mean((0, 1))  # (H, W)
        overlapped = torch.zeros(height, width, dtype=torch.bool, device=difference.device)
        for axis, pixels in enumerate((height, width)):
            times = torch.zeros(pixels, dtype=torch.int64)
            for first, end in self.tiles(pixels // self.factor):
                times[first * self.factor : end * self.factor] += 1
            shared = (times > 1).to(overlapped.device)
            overlapped |= shared[:, None] if axis == 0 else shared
        rms = [
            127.5 * difference[where].double().mean().sqrt().item() if bool(where.any()) else 0.0
            for where in (overlapped, ~overlapped)
        ]
        return Seam((tokens != whole).double().mean().item(), *rms)

    @property
    def _local(self) -> bool:
        """Whether each latent is quantized by itself, so that its neighbours need not be there."""
        return self.tokenizer.quantizer.token_grids((2, 2)) == ((2, 2),)

    def tiles(self, cells: int) -> list[tuple[int, int]]:
        """First and end of the tiles along an axis of so many cells: of one size, overlapping as evenly as may be."""
        tile, overlap = self.tile // self.factor, self.overlap // self.factor
        if cells <= tile:
            return [(0, cells)]
        last = -(-(cells - tile) // (tile - overlap))  # the number of the last tile
        return [(number * (cells - tile) // last, number * (cells - tile) // last + tile) for number in range(last + 1)]

    def _weights(self, tiles: list[tuple[int, int]], reach: Reach | None, unit: int) -> list[Tensor]:
        """How much each tile counts at each of its places, `unit` of them a cell; at every place they sum to 1.

        Zero where the tile's edge is in reach, if the overlap covers that, and rising linearly from there.
        """
        overlap = self.overlap // self.factor
        cut = reach is not None and sum(reach) <= overlap
        before, after = (reach.before, reach.after) if cut and reach is not None else (0, 0)
        ramp = (overlap - before - after) * unit + 1
        end = tiles[-1][1] * unit
        raw = []
        for first, stop in tiles:
            places = torch.arange(first * unit, stop * unit, dtype=torch.float64)
            weight = torch.ones_like(places)
            if first > 0:
                weight = torch.minimum(weight, (places - (first + before) * unit + 1) / ramp)
            if stop * unit < end:
                weight = torch.minimum(weight, ((stop - after) * unit - places) / ramp)
            raw.append(weight.clamp_min(0))
        total = torch.zeros(end, dtype=torch.float64)
        for (first, stop), weight in zip(tiles, raw, strict=True):
            total[first * unit : stop * unit] += weight
        pairs = zip(tiles, raw, strict=True)
        return [weight / total[first * unit : stop * unit] for (first, stop), weight in pairs]

    @torch.no_grad()
    def _blended(
        self, make: Callable[..., Tensor], rows: int, columns: int, reach: Reach | None, unit: int
    ) -> Iterator[Tensor]:
        """Strips of what `make` gives for cells (top, bottom, left, right), tiles blended, from top to bottom."""
        down, across = self.tiles(rows), self.tiles(columns)
        if len(down) == len(across) == 1:
            with self.tokenizer.evaluating():
                yield make(0, rows, 0, columns)
            return
        weights = self._weights(down, reach, unit), self._weights(across, reach, unit)
        strip: Tensor | None = None  # sums for the places from `above` on, of the rows of tiles so far
        above = 0
        for number, ((top, bottom), vertical) in enumerate(zip(down, weights[0], strict=True)):
            for (left, right), horizontal in zip(across, weights[1], strict=True):
                with self.tokenizer.evaluating():
                    part = make(top, bottom, left, right)
                if strip is None:
                    strip = part.new_zeros(*part.shape[:2], (bottom - above) * unit, columns * unit)
                elif strip.shape[2] < (bottom - above) * unit:
                    more = (bottom - above) * unit - strip.shape[2]
                    strip = torch.cat([strip, strip.new_zeros(*strip.shape[:2], more, columns * unit)], 2)
                weight = (vertical[:, None] * horizontal).to(part)
                place = strip[:, :, (top - above) * unit : (bottom - above) * unit, left * unit : right * unit]
                place += part * weight
            assert strip is not None
            done = (down[number + 1][0] if number + 1 < len(down) else rows) - above
            if done:
                yield strip[:, :, : done * unit]
                strip, above = strip[:, :, done * unit :].clone(), above + done

    @torch.no_grad()
    def _reach(self, cell: tuple[int, ...], run: Callable[[Tensor], Tensor], unit: int) -> Reach | None:
        """How far results of a network reach, in cells: by which become NaN where the input has a cell of NaN.

        Args:
            cell: the shape of the network's input for one cell.
            run: the network.
            unit: places of the result a cell.
        """
        found = [self._reach_along(axis, cell, run, unit) for axis in (2, 3)]
        if found[0] is None or found[1] is None:
            return None
        return Reach(max(found[0].before, found[1].before), max(found[0].after, found[1].after))

    def _reach_along(
        self, axis: int, cell: tuple[int, ...], run: Callable[[Tensor], Tensor], unit: int
    ) -> Reach | None:
        example = next(self.tokenizer.parameters())
        for length in LENGTHS:
            shape = list(cell)
            shape[axis] *= length
            middle = length // 2
            x = torch.zeros(shape, device=example.device)
            x.narrow(axis, middle * cell[axis], cell[axis]).fill_(math.nan)
            with self.tokenizer.evaluating(), plain_convolutions():
                touched = run(x).isnan().any(1).any(0)
            cells = touched.any(3 - axis).unflatten(0, (length, unit)).any(1).nonzero().flatten().tolist()
            if cells[0] > 0 and cells[-1] < length - 1:
                return Reach(cells[-1] - middle, middle - cells[0])
        return None


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Outside autocast, and without those convolutions on GPUs that mix neighbours on their way (Winograd, FFT)."""
    with (
        torch.backends.cudnn.flags(enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        yield
