"""Families that model latents instead of indices: those of a continuous tokenizer, or the vectors of codes."""

import math

import torch
from pydantic import Field
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator
from lexel.generators.batch import SampleBatch
from lexel.generators.config import NetworkConfig

CONTINUOUS = 1  # `codebook_size` of tokenizers without a codebook


class LatentConfig(NetworkConfig):
    """The options of families that model latents.

    `channels` is the length of a latent or code vector. `codebook_size = 1` stands for a continuous tokenizer: tokens
    are then its latents, float (B, channels, rows, columns). `scale` multiplies latents, so that they have a variance
    of about 1, as the noise has.
    """

    codebook_size: int = Field(default=CONTINUOUS, ge=1)
    channels: int = Field(default=16, ge=1)
    scale: float = Field(default=1.0, gt=0)

    @property
    def continuous(self) -> bool:
        """Whether tokens are latents themselves, not indices of codes."""
        return self.codebook_size == CONTINUOUS


class LatentGenerator(Generator):
    """A generator of latents (B, channels, rows, columns). With a codebook, what is sampled is the nearest codes."""

    has_likelihood = False
    settings: LatentConfig

    def nothing(self, count: int) -> Tensor:
        tokens = super().nothing(count)
        return tokens.float() if self.settings.continuous else tokens

    @property
    def sampled_shape(self) -> tuple[int, ...]:
        """The shape of one sampled image: `grid` for codes, (channels, *grid) for latents."""
        config = self.settings
        return (config.channels, *self.grid) if config.continuous else self.grid

    @property
    def needs_tokenizer(self) -> bool:
        return not self.settings.continuous

    def latents(self, tokens: Tensor) -> Tensor:
        """The network's input: scaled latents (B, channels, *grid) of tokens.

        Raises:
            UsageError: the shape does not fit, or indices came and the generator has no tokenizer.
        """
        config = self.settings
        if config.continuous:
            if tokens.shape[1:] != self.sampled_shape or not tokens.dtype.is_floating_point:
                wanted = ", ".join(["B", *map(str, self.sampled_shape)])
                raise UsageError(f"tokens must be latents ({wanted}), got {tokens.dtype} {tuple(tokens.shape)}")
            return tokens.to(self.dtype) * config.scale
        indices = self.flat(tokens).view(len(tokens), *self.grid)
        vectors = self.quantizer().indices_to_codes(indices).detach()
        if vectors.shape[1] != config.channels:
            raise UsageError(
                f"generator.channels = {config.channels} does not fit codes of length {vectors.shape[1]}; "
                f"set generator.channels = {vectors.shape[1]}"
            )
        return vectors.to(self.dtype) * config.scale

    def tokens(self, latents: Tensor) -> Tensor:
        """The tokens that sampled latents (B, channels, *grid) stand for: latents again, or int64 nearest codes."""
        config = self.settings
        plain = latents.float() / config.scale
        return plain if config.continuous else self.quantizer().assign(plain)

    def known(self, batch: SampleBatch) -> tuple[Tensor, Tensor] | None:
        """Latents of given tokens (B, channels, *grid) and where they lie, bool (B, *grid); None without any."""
        if self.settings.continuous:
            return None
        tokens = batch.tokens.view(-1, *self.grid)
        places = tokens != FREE
        if not bool(places.any()):
            return None
        return self.latents(tokens.clamp_min(0)), places

    def sampled(self, batch: SampleBatch, latents: Tensor) -> Tensor:
        """The tokens of sampled latents, where none are given: (B, T), or latents (B, channels, *grid)."""
        tokens = self.tokens(latents)
        if self.settings.continuous:
            return tokens
        return torch.where(batch.tokens == FREE, tokens.flatten(1), batch.tokens)

    def refuse_filters(self, batch: SampleBatch) -> None:
        """Refuses filters of logits: latents are not drawn from a list."""
        for name, idle in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if batch.filters[0][name] != idle:
                raise UsageError(f"{name} reaches nothing in a {self.settings.kind} generator; leave it out")

    def noise(self, batch: SampleBatch, block: int) -> Tensor:
        """Standard normal numbers like the latents, from each image's own stream: (B, channels, *grid)."""
        shape = (self.settings.channels, *self.grid)
        return normal(batch.uniforms(block, math.prod(shape))).view(-1, *shape).to(self.dtype)


def normal(uniforms: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones in [0, 1), one for one."""
    return torch.special.ndtri(uniforms.clamp(2.0**-54, 1 - 2.0**-53))
