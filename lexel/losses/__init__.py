"""What a tokenizer learns from: reconstruction, perception, and a discriminator's opinion."""

from lexel.losses.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from lexel.losses.discriminator import DISCRIMINATORS, BlurDiscriminator, PatchDiscriminator
from lexel.losses.lecam import LeCAM
from lexel.losses.perceptual import LPIPS
from lexel.losses.reconstruction import l1, l2

__all__ = [
    "DISCRIMINATORS",
    "DISCRIMINATOR_LOSSES",
    "GENERATOR_LOSSES",
    "LPIPS",
    "BlurDiscriminator",
    "LeCAM",
    "PatchDiscriminator",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "l1",
    "l2",
]
