"""The tokenizer: images to indices and back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from lexel import autoencoders, checkpoint, quantizers
from lexel.autoencoders import Autoencoder, AutoencoderConfig, VQGANConfig
from lexel.config import Config, check
from lexel.errors import UsageError
from lexel.losses.perturbation import Codes
from lexel.model_folder import TOKENIZER, Pretrained
from lexel.quantizers import Continuous, Levels, Quantized
from lexel.quantizers.base import straight_through
from lexel.quantizers.levels import build_levels
from lexel.quantizers.living import Recoded
from lexel.runtime import at_least_float32
from lexel.token_spec import TokenSpec


class TokenizerConfig(Config):
    """An autoencoder and the quantizer in its middle."""

    # A table is read by its `kind`; `design` is accepted for it.
    autoencoder: Annotated[SerializeAsAny[AutoencoderConfig], BeforeValidator(autoencoders.parse)] = VQGANConfig()
    quantizer: dict[str, Any] = {"kind": "ibq", "codebook_size": 16384, "codebook_dim": 256}  # kind and its options
    projections: bool = True  # layers between autoencoder and codes; without them the widths must agree


class Reconstruction(NamedTuple):
    """Images through a tokenizer and back, with gradients."""

    images: Tensor  # (B, C, H, W), not clamped
    quantized: Quantized


class Passed(NamedTuple):
    """Images through a tokenizer in evaluation mode, with what lies between."""

    images: Tensor  # (B, C, H, W) in [-1, 1]
    tokens: Tensor  # int64 (B, *grid), or (B, Q, *grid) for Q books; latents (B, D, *grid) where there are no codes
    latents: Tensor  # (B, D, *grid), before quantization
    quantized: Tensor  # (B, D, *grid), what was decoded


class Tokenizer(Pretrained):
    """Images (B, C, H, W) in [-1, 1] to indices (B, *grid), and back; `grid` says which sizes fit.

    Args:
        config: the autoencoder and the quantizer.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    KIND = TOKENIZER
    config: TokenizerConfig
    LARGEST = 10.0  # values beyond this are no images in [-1, 1], however sharply resized

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__(config or TokenizerConfig())
        if "kind" not in self.config.quantizer:
            raise UsageError(f"the quantizer needs a kind; choose from {', '.join(quantizers.names())}")
        # The network first: a seed then gives it the same start under every quantizer.
        network = autoencoders.build(self.config.autoencoder)
        self.encoder, self.decoder = network.encoder, network.decoder
        self.__dict__["autoencoder"] = network  # no submodule: its weights already have names, encoder and decoder
        self.quantizer = build_levels(self.config.quantizer, network.shares)
        if network.shares is not None and self.config.projections:
            raise UsageError(
                f"the {network.config.kind} autoencoder has projections of its own; set projections = false"
            )
        before, after = self.quantizer.latent_dim, self.quantizer.codebook_dim
        self.to_codes: nn.Module = nn.Identity()
        self.from_codes: nn.Module = nn.Identity()
        if self.config.projections:
            self.to_codes, self.from_codes = network.projections(before, after)
        elif (network.z_channels, network.decoder_channels) != (before, after):
            given = network.z_channels if network.z_channels != before else network.decoder_channels
            raise UsageError(f"without projections z_channels must be the codes' dimension {after}, got {given}")

    autoencoder: Autoencoder

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def loss_weights(self) -> dict[str, float]:
        """The published weight of every loss term that `forward` returns: the quantizer's and the autoencoder's."""
        return {**self.autoencoder.LOSS_WEIGHTS, **self.quantizer.LOSS_WEIGHTS}

    @property
    def continuous(self) -> bool:
        """Whether there is no codebook: tokens are then the latents (B, D, *grid)."""
        return isinstance(self.quantizer, Continuous)

    @property
    def channels(self) -> int:
        """Channels of its images: 3 for RGB, 1 for grey."""
        return self.config.autoencoder.channels

    @property
    def downsampling(self) -> int | None:
        """Pixels of a side for one index; None where indices have no place in the image."""
        return self.autoencoder.downsampling

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight of the adversarial loss is taken."""
        return self.autoencoder.last_layer

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        """The grid of indices of an image of height x width pixels: (h, w), or (N,) for 1-D tokens.

        Raises:
            UsageError: images of this size do not fit; says which do.
        """
        return self.autoencoder.grid(height, width)

    def image_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Height and width in pixels of the image of a grid of indices.

        Raises:
            UsageError: no image has this grid.
        """
        return self.autoencoder.image_size(grid)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest size, at least height x width, that fits: what pictures are padded to.

        Raises:
            UsageError: pictures of this size cannot be padded to one that fits.
        """
        return self.autoencoder.fitting_size(height, width)

    def pad(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) made larger to `fitting_size` by repeating the last row and column."""
        height, width = images.shape[-2:]
        fitting = self.fitting_size(height, width)
        return F.pad(images, (0, fitting[1] - width, 0, fitting[0] - height), mode="replicate")

    def token_spec(self, height: int, width: int) -> TokenSpec:
        """The layout of the tokens of an image of height x width pixels.

        Raises:
            UsageError: images of this size do not fit.
        """
        grids = self.autoencoder.grids(height, width)
        if len(grids) == 1:  # a quantizer over scales has several on one grid of latents
            grids = self.quantizer.token_grids(grids[0])
        return TokenSpec(grids, self.codebook_size, self.quantizer.books)

    def latents(self, images: Tensor) -> Tensor:
        """The encoder's result before quantization: (B, D, *grid), at least float32."""
        images = images.to(self._dtype)
        z = self.encoder(images) if self.autoencoder.shares is None else self.encoder(images, self._codes_of_level)
        return self._projected(z)

    def _projected(self, z: Tensor) -> Tensor:
        # Neighbouring codes differ by little: autocast must not round what decides between them.
        with torch.autocast(z.device.type, enabled=False):
            z = self.to_codes(z.to(self._dtype))
        return at_least_float32(z)

    def _codes_of_level(self, level: int, z: Tensor) -> Tensor:
        """The codes of one level's latents (B, D, *grid), for the finer levels; nothing is learned of them here."""
        assert isinstance(self.quantizer, Levels)
        part = self.quantizer.part(level)
        return straight_through(z, part.indices_to_codes(part.assign(z)))

    def decode_codes(self, z_q: Tensor, text: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), not clamped, from quantized latents (B, D, *grid); differentiable.

        Args:
            z_q: quantized latents.
            text: features of a text (B, L, C) where the decoder is guided by one.
        """
        return self._decoded(self.from_codes(z_q.to(self._dtype)), text)

    def _decoded(self, z: Tensor, text: Tensor | None) -> Tensor:
        images = self.decoder(z) if text is None else self.decoder(z, text.to(self._dtype))
        return at_least_float32(images)

    def forward(
        self, images: Tensor, text: Tensor | None = None, perturb: Callable[[Codes], Tensor] | None = None
    ) -> Reconstruction:
        """Images (B, C, H, W) in [-1, 1] through the vocabulary and back, with gradients and loss terms.

        Args:
            images: (B, C, H, W) in [-1, 1].
            text: features of a text (B, L, C) where the decoder is guided by one.
            perturb: codes for the decoder instead of those that were chosen; loss terms are those of the chosen ones.
        """
        self._check_shape(images)
        if self.autoencoder.routes:
            features, gates = self.autoencoder.routed(images.to(self._dtype))
            latents = self._projected(features)
            quantized = self.quantizer(latents)
            routing = self.autoencoder.routing_losses(gates, latents, quantized.z_q, quantized.losses)
        else:
            latents, routing = self.latents(images), {}
            quantized = self.quantizer(latents)
        if perturb is not None:
            codes = Codes(latents, quantized.z_q, self.quantizer.codebook, self.quantizer.similarity)
            quantized = quantized._replace(z_q=perturb(codes))
        z = self.from_codes(quantized.z_q.to(self._dtype))
        losses = quantized.losses | routing | self.autoencoder.losses(images, z)
        return Reconstruction(self._decoded(z, text), quantized._replace(losses=losses))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The index of every latent: int64 (B, *grid), or (B, Q, *grid) for quantizers with Q books.

        A continuous tokenizer gives the latents (B, D, *grid) that `decode` takes.

        Raises:
            UsageError: images are not float (B, C, H, W) of a size that `grid` takes, or clearly not in [-1, 1].
        """
        self.check_images(images)
        with self.evaluating():
            return self.tokens(self.latents(images))

    def tokens(self, z: Tensor) -> Tensor:
        """The indices of latents (B, D, *grid); for a continuous tokenizer the latents that its decoder takes."""
        quantizer = self.quantizer
        return quantizer.latents_to_decode(z) if isinstance(quantizer, Continuous) else quantizer.assign(z)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Passed:
        """Images (B, C, H, W) in [-1, 1] to tokens and back, as `decode(encode(images))`, with the latents of both.

        Raises:
            UsageError: as `encode`.
        """
        self.check_images(images)
        with self.evaluating():
            z = self.latents(images)
            tokens = self.tokens(z)
            z_q = tokens if self.continuous else self.quantizer.indices_to_codes(tokens, tuple(z.shape[2:]))
            return Passed(self.decode_codes(z_q).clamp(-1, 1), tokens, z, z_q)

    @torch.no_grad()
    def decode(self, indices: Tensor, text: Tensor | None = None, grid: tuple[int, ...] | None = None) -> Tensor:
        """Images (B, C, H, W) clamped to [-1, 1] from indices (B, *grid), or (B, Q, *grid) for Q books.

        Args:
            indices: of the codes; latents (B, D, *grid) for a continuous tokenizer.
            text: features of a text (B, L, C) where the decoder is guided by one.
            grid: of the latents, where tokens of several scales (B, T) are not those of a square image.

        Raises:
            UsageError: indices are not integers of such a shape in [0, codebook_size).
        """
        codes = self.codes(indices, grid)
        with self.evaluating():
            return self.decode_codes(codes, text).clamp(-1, 1)

    @torch.no_grad()
    def codes(self, indices: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """What the decoder gets for indices as `decode` takes them: the codes (B, D, *grid) that they name.

        Raises:
            UsageError: as `decode`.
        """
        if self.continuous:
            return self._latents_to_decode(indices)
        if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
            raise UsageError(f"indices must be integers, got {indices.dtype}")
        grid = self.grid_of(indices, grid)
        indices = indices.long()
        if indices.numel():
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= self.codebook_size:
                wrong = low if low < 0 else high
                raise UsageError(f"indices must be in [0, {self.codebook_size}), got {wrong}")
        with self.evaluating():
            return self.quantizer.indices_to_codes(indices, grid)

    def _latents_to_decode(self, latents: Tensor) -> Tensor:
        axes, dim = self.autoencoder.axes, self.quantizer.codebook_dim
        if not latents.dtype.is_floating_point or latents.dim() != 2 + axes or latents.shape[1] != dim:
            grid = "h, w" if axes == 2 else "N"
            raise UsageError(
                f"a continuous tokenizer decodes latents, float (B, {dim}, {grid}), "
                f"got {latents.dtype} {tuple(latents.shape)}"
            )
        self.autoencoder.image_size(tuple(latents.shape[2:]))
        return latents

    def save_pretrained(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`.

        Args:
            folder: made if it does not exist.
            provenance: where the weights come from (recipe, step, source file), kept in `config.json`; this
                tokenizer's own if not given.
        """
        self.save_folder(folder, provenance)

    @classmethod
    def read_config(cls, options: Mapping[str, Any], source: str) -> TokenizerConfig:
        return check(dict(options), TokenizerConfig, source)

    def compute_buffers(self) -> None:
        if any(buffer.is_meta for buffer in self.buffers()):
            computed = build_levels(self.config.quantizer, self.autoencoder.shares)
            for name, module in computed.named_modules():
                for buffer in module._non_persistent_buffers_set:
                    setattr(self.quantizer.get_submodule(name), buffer, getattr(module, buffer))

    def recoded(self, recoded: Recoded) -> Self:
        """The same tokenizer around its quantizer with fewer or more codes, as `prune` and `grow` of that give it."""
        rest = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("quantizer.")}
        state = rest | {f"quantizer.{name}": tensor for name, tensor in recoded.state.items()}
        config = self.config.model_copy(update={"quantizer": recoded.table})
        return self.with_weights(config, state, "the tokenizer with other codes")

    def fingerprint(self) -> str:
        """Names these weights in token sets and result files: the same for equal weights, whatever their history."""
        table = self.config.model_dump(mode="json") | {"autoencoder": self.config.autoencoder.identity()}
        return checkpoint.fingerprint(table, self.state_dict())

    @property
    def prefixes(self) -> int | None:
        """How many ordered tokens, or levels of residual codes, an image has, where every prefix of them decodes."""
        if self.autoencoder.prefixes is not None:
            return self.autoencoder.prefixes
        return self.quantizer.books if self.quantizer.prefixes else None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def check_images(self, images: Tensor) -> None:
        """Refuses what `encode` does."""
        self._check_shape(images)
        largest = images.abs().max().item() if images.numel() else 0.0
        if not largest <= self.LARGEST:  # NaN included
            raise UsageError(f"images must be in [-1, 1], got values up to {largest:g}; bytes become x / 127.5 - 1")

    def _check_shape(self, images: Tensor) -> None:
        channels = self.channels
        if images.dim() != 4 or images.shape[1] != channels or not images.shape[2] or not images.shape[3]:
            raise UsageError(f"images must be (B, {channels}, H, W), got {tuple(images.shape)}")
        try:
            self.autoencoder.grid(images.shape[2], images.shape[3])
        except UsageError:
            sizes = self.autoencoder.sizes
            raise UsageError(f"images must be (B, {channels}, H, W) with {sizes}, got {tuple(images.shape)}") from None
        if not images.dtype.is_floating_point:
            raise UsageError(
                f"images must be floating-point in [-1, 1], got {images.dtype}; bytes become x / 127.5 - 1"
            )

    def grid_of(self, indices: Tensor, grid: tuple[int, ...] | None) -> tuple[int, ...]:
        """The grid of latents that indices belong to; refuses indices whose shape no image has."""
        axes, books = self.autoencoder.axes, self.quantizer.books
        example = self.quantizer.index_shape((2,) * axes)
        if indices.dim() != 1 + len(example):
            places = "T" if len(example) < axes else "h, w" if axes == 2 else "N"
            shape = f"(B, {places})" if books is None else f"(B, {books}, {places})"
            raise UsageError(f"indices must be {shape}, got {tuple(indices.shape)}")
        given = tuple(indices.shape[1:])
        if grid is None:
            grid = self.quantizer.latent_grid(given)
        elif given != self.quantizer.index_shape(grid):
            raise UsageError(
                f"indices of the grid {grid} must be (B, *{self.quantizer.index_shape(grid)}), got {given}"
            )
        self.autoencoder.image_size(grid)
        return grid

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while, whatever mode each part was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
