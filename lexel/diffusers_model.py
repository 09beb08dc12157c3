"""A tokenizer in the shape of diffusers' VQModel, for its pipelines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer


class Latents(NamedTuple):
    """The result of `encode`: unlike a tokenizer of ours, latents before quantization."""

    latents: Tensor  # (B, D, h, w)


class Sample(NamedTuple):
    """The result of `decode`."""

    sample: Tensor  # (B, 3, H, W)
    commit_loss: Tensor


@dataclass(frozen=True)
class VQModelConfig:
    """The options that pipelines read from `vqvae.config`."""

    latent_channels: int
    num_vq_embeddings: int
    vq_embed_dim: int
    block_out_channels: tuple[int, ...]  # as many as resolutions: pipelines derive the downsampling from their number
    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    lookup_from_codebook: bool = True
    norm_type: str = "group"
    force_upcast: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class DiffusersVQModel(nn.Module):
    """A tokenizer in the shape of diffusers' VQModel, for pipelines that take one as `vqvae`.

        pipeline = LDMPipeline(vqvae=DiffusersVQModel(tokenizer), unet=unet, scheduler=scheduler)

    `encode` gives latents before quantization. `decode` quantizes them first, unless `force_not_quantize` says that
    it is given codes, or with `shape` (batch, rows, columns, channels) indices.

    Args:
        tokenizer: any with one index a position.
        scaling_factor: what a pipeline multiplies latents with; 1 leaves them as they are.
        unit_range: whether images are in [0, 1], as pipelines over tokens (aMUSEd) have them, instead of [-1, 1].
    """

    def __init__(self, tokenizer: Tokenizer, scaling_factor: float = 1.0, unit_range: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.unit_range = unit_range
        quantizer = tokenizer.quantizer
        if tokenizer.downsampling is None:
            raise UsageError("diffusers' pipelines need tokens on a map; this tokenizer's tokens are 1-D")
        self.config = VQModelConfig(
            latent_channels=quantizer.codebook_dim,
            num_vq_embeddings=quantizer.codebook_size,
            vq_embed_dim=quantizer.codebook_dim,
            block_out_channels=(tokenizer.autoencoder.z_channels,) * tokenizer.downsampling.bit_length(),
            scaling_factor=scaling_factor,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tokenizer.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.encoder.parameters()).device

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Codes (B, D, h, w), a loss of 0, and at the end of the last the indices, flat."""
        indices = self.tokenizer.quantizer.assign(latents)
        codes = self.tokenizer.quantizer.indices_to_codes(indices)
        return codes, latents.new_zeros(()), (None, None, indices.flatten())

    def encode(self, x: Tensor, return_dict: bool = True) -> Latents | tuple[Tensor]:
        latents = self.tokenizer.latents(2 * x - 1 if self.unit_range else x)
        return Latents(latents) if return_dict else (latents,)

    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape: Sequence[int] | None = None
    ) -> Sample | tuple[Tensor, Tensor]:
        if not force_not_quantize:
            codes = self.quantize(h)[0]
        elif shape is not None:
            codes = self.tokenizer.quantizer.indices_to_codes(h.long().reshape(tuple(shape)[:3]))
        else:
            codes = h
        images = self.tokenizer.decode_codes(codes)
        images = (images + 1) / 2 if self.unit_range else images
        loss = images.new_zeros(len(images))
        return Sample(images, loss) if return_dict else (images, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Sample | tuple[Tensor, Tensor]:
        return self.decode(self.tokenizer.latents(sample), return_dict=return_dict)
