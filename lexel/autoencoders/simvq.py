"""The autoencoder of SimVQ (https://arxiv.org/abs/2411.02038): Open-MAGVIT2's without the latents' statistics."""

from typing import Literal

from lexel.autoencoders.magvit2 import Magvit, PlainConfig


class SimVQConfig(PlainConfig):
    """The size of SimVQ's encoder and decoder."""

    kind: Literal["simvq"] = "simvq"


class SimVQAutoencoder(Magvit):
    """SimVQ's: Open-MAGVIT2's convolutions without the latents' statistics in the decoder.

    Images (B, C, H, W) to latents (B, z_channels, H / f, W / f) and back, f = 2^(levels - 1).

    Args:
        config: see `SimVQConfig`.
    """

    config_class = SimVQConfig
    statistics = False
