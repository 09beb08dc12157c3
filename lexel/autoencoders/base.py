"""The contract every autoencoder keeps: images to latents on a grid, and back."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError


class AutoencoderConfig(Config):
    """The options of one kind of autoencoder; every kind has a subclass of its own, discriminated by `kind`."""

    LARGEST: ClassVar[int] = 2**24
    LATER: ClassVar[Mapping[str, Any]] = {"channels": 3}  # options that came later, with what was meant before

    kind: str
    channels: int = Field(default=3, ge=1)  # of the images

    def identity(self) -> dict[str, Any]:
        """The table that fingerprints are taken of: options that came later count where they change something."""
        table = self.model_dump(mode="json")
        return {name: value for name, value in table.items() if name not in self.LATER or value != self.LATER[name]}


class FixedSize(AutoencoderConfig):
    """The options of a kind that takes images of one size."""

    size: int | list[int] = 256  # of the images: of both sides, or [height, width]

    @model_validator(mode="after")
    def _size_is_of_two_sides(self) -> Self:
        if not isinstance(self.size, int) and len(self.size) != 2:
            raise ValueError(f"size must be one number or [height, width], got {self.size}")
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])


class Autoencoder(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] to latents (B, z_channels, *grid), and back.

    A kind sets `encoder`, `decoder` and `z_channels` and says how a grid follows from a size. Its weights all lie in
    the encoder and the decoder: a `Tokenizer` takes the two over under these names.

    Args:
        config: an instance of `config_class`.
    """

    config_class: ClassVar[type[AutoencoderConfig]]
    LAST: ClassVar[str] = "conv_out.weight"  # the decoder's last weight; `last_layer` may say it otherwise
    axes: ClassVar[int] = 2  # of the grid: 2 for maps, 1 for sequences
    # Cells of each level, as a ratio, where latents lie on several grids; the encoder then is called with the images
    # and with a function (level, latents (B, D, *grid)) to the level's codes, and has no projections.
    shares: ClassVar[tuple[int, ...] | None] = None
    # Whether the encoder chooses how finely each region is described: `routed` then says how it chose, and
    # `routing_losses` what follows for training.
    routes: ClassVar[bool] = False
    LOSS_WEIGHTS: ClassVar[Mapping[str, float]] = {}  # every term that `losses` may return, with its published weight

    encoder: nn.Module  # images (B, channels, H, W) to (B, z_channels, *grid)
    decoder: nn.Module  # (B, z_channels, *grid) to images (B, channels, H, W), not clamped
    z_channels: int

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def decoder_channels(self) -> int:
        """Channels that the decoder takes."""
        return self.z_channels

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the only images that fit; None where every multiple of `downsampling` does."""
        return None

    @property
    def downsampling(self) -> int | None:
        """Pixels of a side for one latent; None where latents have no place in the image."""
        raise NotImplementedError

    @property
    def prefixes(self) -> int | None:
        """How many ordered tokens an image has of which the first ones decode alone; None where all are needed."""
        return None

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight of the adversarial loss is taken."""
        return self.decoder.get_parameter(self.LAST)

    @property
    def sizes(self) -> str:
        """The sizes that fit, in words, for errors."""
        if self.fixed_size is not None:
            return f"H = {self.fixed_size[0]} and W = {self.fixed_size[1]}"
        return f"H and W multiples of {self.downsampling}"

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        """The grid of latents of an image of height x width pixels.

        Raises:
            UsageError: images of this size do not fit.
        """
        factor = self._factor
        fits = min(height, width) > 0 and not height % factor and not width % factor
        if not fits or (height, width) != (self.fixed_size or (height, width)):
            raise UsageError(f"images need {self.sizes}, got {height} x {width}")
        return height // factor, width // factor

    def grids(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """The grids of all levels, coarse to fine; one for most kinds.

        Raises:
            UsageError: images of this size do not fit.
        """
        return (self.grid(height, width),)

    def image_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Height and width in pixels of the image of a grid of latents; the inverse of `grid`.

        Raises:
            UsageError: no image has this grid.
        """
        factor = self._factor
        if len(grid) != 2 or min(grid) < 1:
            raise UsageError(f"the grid of a {self.config.kind} autoencoder is (h, w), got {tuple(grid)}")
        return grid[0] * factor, grid[1] * factor

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest size, at least height x width, that the autoencoder takes: pictures are padded to it.

        Raises:
            UsageError: pictures of this size cannot be padded to one that fits.
        """
        if self.fixed_size is not None:
            if height > self.fixed_size[0] or width > self.fixed_size[1]:
                raise UsageError(f"images need {self.sizes}, got {height} x {width}, which padding cannot make fit")
            return self.fixed_size
        factor = self._factor
        return -(-height // factor) * factor, -(-width // factor) * factor

    @property
    def _factor(self) -> int:
        factor = self.downsampling
        if factor is None:
            raise NotImplementedError(f"{type(self).__name__} has no downsampling and must say what its grid is")
        return factor

    def losses(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Terms of the training loss that the autoencoder adds, unweighted; mostly none.

        Args:
            images: (B, channels, H, W), to learn from.
            z: what the decoder takes of them, (B, decoder_channels, *grid).
        """
        return {}

    def routed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, z_channels, *grid), and gates (B, G, h, w): 1 at the granularity chosen of each region."""
        raise NotImplementedError

    def routing_losses(self, gates: Tensor, z: Tensor, z_q: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of the training loss, unweighted, of an encoder that chooses; they replace terms of the same name.

        Args:
            gates: (B, G, h, w), 1 at the granularity chosen of each region, with gradients.
            z: latents (B, D, *grid) that were quantized.
            z_q: their codes.
            losses: the quantizer's terms.
        """
        return {}

    def projections(self, before: int, after: int) -> tuple[nn.Module, nn.Module]:
        """The layers from the encoder to latents of `before` numbers, and from codes of `after` numbers to the decoder.

        Raises:
            UsageError: latents cannot have so many numbers.
        """
        return self.projection(self.z_channels, before), self.projection(after, self.decoder_channels)

    def projection(self, channels_in: int, channels_out: int) -> nn.Module:
        """The layer between latents and codes, (B, channels_in, *grid) to (B, channels_out, *grid)."""
        layer = nn.Conv2d if self.axes == 2 else nn.Conv1d
        return layer(channels_in, channels_out, 1)
