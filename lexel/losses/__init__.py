"""Losses of tokenizers: reconstruction, perceptual, alignment with a teacher, adversarial."""

from lexel.losses.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from lexel.losses.alignment import REPA, VAVAE, Alignment, DecoderDistillation, FeatureReconstruction
from lexel.losses.base import Loss, LossInputs
from lexel.losses.discriminator import DISCRIMINATORS, BlurDiscriminator, FeatureDiscriminator, PatchDiscriminator
from lexel.losses.gram import GramLoss
from lexel.losses.lecam import LeCAM
from lexel.losses.perceptual import LPIPS
from lexel.losses.perturbation import PERTURBATIONS, NearCodes
from lexel.losses.reconstruction import DISTSLoss, L1Loss, L2Loss, LPIPSLoss, l1, l2
from lexel.losses.table import LOSSES

__all__ = [
    "DISCRIMINATORS",
    "DISCRIMINATOR_LOSSES",
    "GENERATOR_LOSSES",
    "LOSSES",
    "LPIPS",
    "PERTURBATIONS",
    "REPA",
    "VAVAE",
    "Alignment",
    "BlurDiscriminator",
    "DISTSLoss",
    "DecoderDistillation",
    "FeatureDiscriminator",
    "FeatureReconstruction",
    "GramLoss",
    "L1Loss",
    "L2Loss",
    "LPIPSLoss",
    "LeCAM",
    "Loss",
    "LossInputs",
    "NearCodes",
    "PatchDiscriminator",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "l1",
    "l2",
]
