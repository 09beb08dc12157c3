"""Two granularities chosen by a router: the autoencoder of DQ-VAE, https://arxiv.org/abs/2305.11718.

Facts of sizes, names and conventions are those of CrossmodalGroup/DynamicVectorQuantization.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders import vqgan
from lexel.autoencoders.base import AutoencoderConfig, FixedSize
from lexel.autoencoders.convolutional import (
    Convolutional,
    ConvolutionalConfig,
    Downsample,
    Level,
    Middle,
    conv3x3,
    norm,
)
from lexel.autoencoders.entropy import patch_entropy
from lexel.errors import UsageError, unknown
from lexel.runtime import without_autocast


class DynamicConfig(FixedSize, ConvolutionalConfig):
    """The size of DQ-VAE's encoder and decoder, and the share of regions that are to be fine."""

    LATER = {"routing": "learned", "entropy_threshold": None, "router_groups": None, "router_hidden": True}

    kind: Literal["dynamic"] = "dynamic"
    residual_blocks: int = Field(default=2, ge=1)  # in each level of the encoder
    attention_levels: list[int] = [3, 4]  # of the encoder, with attention after every block
    decoder_attention_levels: list[int] = [3]  # likewise of the decoder, which has one level less
    positions: list[Literal["fourier", "learned"]] = ["fourier", "learned"]  # what the decoder is told of places
    share: float = Field(default=0.5, ge=0, le=1)  # of the regions that are to be fine: the budget
    # Who chooses: a router that learns within the budget, or the entropy of a region's grey values (`patch_entropy`):
    # above so many nats it is fine.
    routing: Literal["learned", "entropy"] = "learned"
    entropy_threshold: float | None = Field(default=None, ge=0)
    router_groups: int | None = Field(default=None, ge=0)  # of the router's norms: 0 has none, None the network's
    router_hidden: bool = True  # whether the router has a hidden layer

    @model_validator(mode="after")
    def _consistent(self) -> "DynamicConfig":
        levels = len(self.multipliers)
        if (self.routing == "entropy") != (self.entropy_threshold is not None):
            raise ValueError("routing = 'entropy' and entropy_threshold go together: give both or neither")
        if levels < 2:
            raise ValueError(f"two granularities need at least two levels, got multipliers = {self.multipliers}")
        for name, given, count in (
            ("attention_levels", self.attention_levels, levels),
            ("decoder_attention_levels", self.decoder_attention_levels, levels - 1),
        ):
            if not set(given) <= set(range(count)):
                raise ValueError(f"{name} must be among {list(range(count))}, got {given}")
        if self.z_channels % self.groups:
            raise ValueError(f"{self.groups} groups do not divide z_channels {self.z_channels}")
        if self.router_groups and self.z_channels % self.router_groups:
            raise ValueError(f"router_groups = {self.router_groups} does not divide z_channels {self.z_channels}")
        if min(self.sides) < 1 or any(side % (2 * self.downsampling) for side in self.sides):
            raise ValueError(f"size must be a multiple of {2 * self.downsampling}, got {self.size}")
        return self

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one fine latent; coarse ones have twice as many."""
        return 2 ** (len(self.multipliers) - 2)

    identity = AutoencoderConfig.identity


class Dynamic(Convolutional):
    """DQ-VAE's convolutions with a router, which keeps four tokens or one of each region.

    Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) and back; regions of 2x2 are fine or coarse.

    A router looks at every region of 2x2 latents and keeps either its four fine latents or one coarse latent, which
    then stands in all four places. Tokens are thus a map (B, H / f, W / f) in which a coarse region repeats one code,
    and decoding needs nothing else. How many different tokens an image has depends on the image: `granularity` says
    which regions are fine, `pack` gives each token once, `unpack` makes the map again. A map alone does not tell, for
    a fine region may happen to have four equal codes.

    In training the router draws (Gumbel softmax), and the term `budget` pulls the share of fine regions to
    `config.share`; regions routed by their entropy have neither. The commitment of a coarse region's codes counts once,
    not four times.

    Args:
        config: see `DynamicConfig`.
    """

    config_class = DynamicConfig
    routes = True
    # The published code has gamma = 10 and adds the term once for each of the two granularities.
    LOSS_WEIGHTS: ClassVar[Mapping[str, float]] = {"budget": 20.0}
    config: DynamicConfig
    encoder: "Encoder"

    def __init__(self, config: DynamicConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.z_channels

    @property
    def fixed_size(self) -> tuple[int, int]:
        return self.config.sides

    def image_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        if tuple(grid) != self.grid(*self.fixed_size):
            raise UsageError(f"images with {self.sizes} have the grid {self.grid(*self.fixed_size)}, got {tuple(grid)}")
        return self.fixed_size

    @torch.no_grad()
    def granularity(self, images: Tensor) -> Tensor:
        """Which regions of images are fine, as evaluation chooses: bool (B, H / 2f, W / 2f)."""
        return self.encoder.features(images.to(self.last_layer.dtype))[2].argmax(1).bool()

    def routed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.routed(images)

    def routing_losses(self, gates: Tensor, z: Tensor, z_q: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = {"budget": budget(gates, self.config.share)} if self.config.routing == "learned" else {}
        if "commitment" in losses:
            weights = places(torch.where(gates.argmax(1, keepdim=True) == 1, 1.0, 0.25).to(z.dtype))
            terms["commitment"] = (weights * (z - z_q.detach()).square()).mean()
        return terms


def budget(gates: Tensor, share: float) -> Tensor:
    """The squared distance of the share of fine regions, over a batch of gates (B, 2, h, w), from the one wanted.

    Gates are 0 or 1 with gradients. Counting latents, (coarse + 4 fine - fewest) / (most - fewest), says the same.
    """
    cells = gates[:, 0] + 4 * gates[:, 1]  # latents of a region
    return ((cells.mean() - 1) / 3 - share).square()


class Packed(NamedTuple):
    """Every token once, as a generator of sequences wants them; rows end in -1 where images have fewer."""

    coarse: Tensor  # (B, S), region by region
    coarse_places: Tensor  # (B, S), numbers of the regions, row by row
    fine: Tensor  # (B, T)
    fine_places: Tensor  # (B, T), numbers of the places, row by row


def pack(indices: Tensor, granularity: Tensor, order: Literal["regions", "rows"] = "regions") -> Packed:
    """The different tokens of a map in which coarse regions repeat theirs.

        packed = pack(tokenizer.encode(images), tokenizer.autoencoder.granularity(images))

    Args:
        indices: (B, 2 h, 2 w), as the tokenizer encodes.
        granularity: bool (B, h, w), true where a region is fine.
        order: of the fine tokens: the four of a region side by side, or row by row of the image.

    Raises:
        UsageError: shapes do not belong together, or the order is unknown.
    """
    if order not in ("regions", "rows"):
        raise unknown("order", order, ("regions", "rows"))
    if indices.dim() != 3 or granularity.shape != (len(indices), *(side // 2 for side in indices.shape[1:])):
        raise UsageError(
            f"a map of tokens (B, 2 h, 2 w) goes with a granularity (B, h, w), "
            f"got {tuple(indices.shape)} and {tuple(granularity.shape)}"
        )
    rows, columns = granularity.shape[1:]
    is_fine = places(granularity[:, None].bool())[:, 0]
    numbers = torch.arange(4 * rows * columns, device=indices.device).view(2 * rows, 2 * columns)
    if order == "regions":
        numbers = numbers.view(rows, 2, columns, 2).transpose(1, 2)
    regions = torch.arange(rows * columns, device=indices.device)
    coarse = _chosen(indices[:, ::2, ::2].flatten(1), regions, ~granularity.bool().flatten(1))
    return Packed(*coarse, *_chosen(indices.flatten(1), numbers.flatten(), is_fine.flatten(1)))


def _chosen(tokens: Tensor, order: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens (B, N) that are chosen, in an order of their numbers, and these numbers; both end in -1."""
    tokens, chosen = tokens[:, order], chosen[:, order]
    first = (~chosen).int().argsort(dim=1, stable=True)[:, : int(chosen.sum(1).max())]
    kept = chosen.gather(1, first)
    return tokens.gather(1, first).where(kept, -1), order[first].where(kept, -1)


def unpack(packed: Packed, grid: tuple[int, int]) -> Tensor:
    """The map of tokens (B, *grid) that decodes; `pack` the other way round.

    Raises:
        UsageError: a place of the grid has no token, or several; or no map has this grid.
    """
    rows, columns = grid
    if rows % 2 or columns % 2:
        raise UsageError(f"the grid of a map must be even, got {grid}")
    batch, cells = len(packed.coarse), rows * columns
    place = torch.arange(cells, device=packed.coarse.device).view(rows // 2, 2, columns // 2, 2)
    corners = place.transpose(1, 2).reshape(-1, 4)  # of each region
    regions = packed.coarse_places.clamp_min(0)
    if regions.numel() and int(regions.max()) >= len(corners):
        raise UsageError(f"the grid {grid} has {len(corners)} regions, got the region {int(regions.max())}")
    sources = [packed.coarse.repeat_interleave(4, 1), packed.fine]
    targets = [corners[regions].flatten(1), packed.fine_places]
    given = [packed.coarse_places.repeat_interleave(4, 1) >= 0, packed.fine_places >= 0]
    tokens, target, real = (torch.cat(part, 1) for part in (sources, targets, given))
    target = target.where(real, cells)  # what is no token falls behind the grid
    if target.numel() and int(target.max()) > cells:
        raise UsageError(f"the grid {grid} has {cells} places, got the place {int(target.max())}")
    counts = torch.zeros(batch, cells + 1, dtype=torch.int64, device=tokens.device)
    counts.scatter_add_(1, target, torch.ones_like(target))
    if (counts[:, :cells] != 1).any():
        raise UsageError(f"every place of the grid {grid} needs one token; some have none, or several")
    return torch.zeros_like(counts).scatter_(1, target, tokens)[:, :cells].view(batch, rows, columns)


def places(regions: Tensor) -> Tensor:
    """Values of regions (B, C, h, w) in each of their places: (B, C, 2 h, 2 w)."""
    return regions.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Encoder(nn.Module):
    """Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) of two granularities."""

    def __init__(self, config: DynamicConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = conv3x3(config.channels, config.width)
        self.levels = nn.ModuleList(
            Level(before, after, config.residual_blocks, groups, attention=number in config.attention_levels)
            for number, (before, after) in enumerate(pairwise(widths))
        )
        self.downsamples = nn.ModuleList(Downsample(width) for width in widths[1:-1])
        self.coarse = Head(widths[-1], config)
        self.fine = Head(widths[-2], config)
        self.region, self.threshold = 2 * config.downsampling, config.entropy_threshold
        self.router = Router(config) if config.routing == "learned" else None

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coarse latents (B, D, h, w), fine ones (B, D, 2 h, 2 w), and logits (B, 2, h, w) of the two."""
        x = self.conv_in(images)
        kept = x
        for number, level in enumerate(self.levels):
            x = level(x)
            if number < len(self.downsamples):
                kept, x = x, self.downsamples[number](x)
        coarse, fine = self.coarse(x), self.fine(kept)
        if self.router is not None:
            return coarse, fine, self.router(coarse, fine)
        assert self.threshold is not None
        above = patch_entropy(images, self.region) - self.threshold
        return coarse, fine, torch.stack([-above, above], 1)

    def routed(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents, and gates (B, 2, h, w), 1 at the granularity chosen of each region (coarse, fine) and 0 elsewhere.

        Args:
            images: (B, C, H, W).
            noise: exponential numbers (B, 2, h, w) that the training's choice is drawn by; drawn if not given.
        """
        coarse, fine, logits = self.features(images)
        if self.training and self.router is not None:
            drawn = torch.empty_like(logits).exponential_() if noise is None else noise
            soft = (logits - drawn.log()).softmax(1)
            hard = F.one_hot(soft.argmax(1), 2).movedim(-1, 1).to(soft)
            gates = hard + (soft - soft.detach())  # 0 or 1 in value, soft in gradient
        else:
            gates = F.one_hot(logits.argmax(1), 2).movedim(-1, 1).to(coarse)
        is_fine = places(gates[:, 1:].detach() > 0.5)
        # Multiplied by the gate of what was chosen, which is 1, so that it learns.
        return torch.where(is_fine, fine, places(coarse)) * places(gates.amax(1, keepdim=True)).to(fine.dtype), gates

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images)[0]


class Head(nn.Module):
    """The layers after the levels, for one granularity."""

    def __init__(self, width: int, config: DynamicConfig) -> None:
        super().__init__()
        self.middle = Middle(width, config.groups, attention=True)
        self.norm_out = norm(width, config.groups)
        self.conv_out = conv3x3(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Router(nn.Module):
    """Logits (B, 2, h, w) of coarse and fine, from coarse latents (B, D, h, w) and fine ones (B, D, 2 h, 2 w)."""

    def __init__(self, config: DynamicConfig) -> None:
        super().__init__()
        channels = config.z_channels
        groups = config.groups if config.router_groups is None else config.router_groups
        self.norm_coarse: nn.Module = norm(channels, groups) if groups else nn.Identity()
        self.norm_fine: nn.Module = norm(channels, groups) if groups else nn.Identity()
        self.hidden = nn.Linear(2 * channels, 2 * channels) if config.router_hidden else None
        self.logits = nn.Linear(2 * channels, 2)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        dtype = self.logits.weight.dtype
        with without_autocast(coarse.device):  # rounding must not choose
            coarse, fine = self.norm_coarse(coarse.to(dtype)), F.avg_pool2d(self.norm_fine(fine.to(dtype)), 2)
            x = torch.cat([coarse, fine], 1).movedim(1, -1)  # (B, h, w, 2 D)
            return self.logits(x if self.hidden is None else F.silu(self.hidden(x))).movedim(-1, 1)


class Decoder(vqgan.Decoder):
    """Latents (B, z_channels, H / f, W / f), told where they lie, to images (B, C, H, W), not clamped."""

    def __init__(self, config: DynamicConfig) -> None:
        super().__init__(
            vqgan.VQGANConfig(
                channels=config.channels,
                width=config.width,
                multipliers=config.multipliers[:-1],
                residual_blocks=config.residual_blocks,
                z_channels=config.z_channels,
                groups=config.groups,
                attention_levels=config.decoder_attention_levels,
            )
        )
        rows, columns = (side // config.downsampling for side in config.sides)
        self.positions = nn.ModuleDict()
        if "fourier" in config.positions:
            self.positions["fourier"] = Fourier(config.z_channels)
        if "learned" in config.positions:
            self.positions["learned"] = Learned(rows, columns, config.z_channels)

    def forward(self, z: Tensor) -> Tensor:
        for positions in self.positions.values():
            z = z + positions(z)
        return super().forward(z)


class Fourier(nn.Module):
    """The sine of a learned linear map of the coordinates (column, row), each in [-1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequencies = nn.Conv2d(2, channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, side, dtype=z.dtype, device=z.device) for side in z.shape[2:])
        grid = torch.meshgrid(rows, columns, indexing="ij")
        return self.frequencies(torch.stack(grid[::-1])[None]).sin()  # (1, C, h, w)


class Learned(nn.Module):
    """A vector for every row plus one for every column."""

    def __init__(self, rows: int, columns: int, channels: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(rows, channels))
        self.columns = nn.Parameter(torch.rand(columns, channels))

    def forward(self, z: Tensor) -> Tensor:
        return (self.rows[:, None] + self.columns).movedim(-1, 0)[None]  # (1, C, h, w)
