"""Adversarial losses of discriminator and generator, from logits.

Logits are of any shape (B, ...), high for images taken for real.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lexel.distributed import all_sum, processes
from lexel.registry import lookup
from lexel.runtime import at_least_float32


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on real and on generated images: a scalar.

    The mean of the two, but for "non_saturating_image", which is their sum.

    Args:
        kind: a key of DISCRIMINATOR_LOSSES.
        real: logits of real images.
        fake: logits of generated images, which were detached from their generator.
    """
    loss = lookup(DISCRIMINATOR_LOSSES, kind, "discriminator loss")
    return loss(at_least_float32(real), at_least_float32(fake))


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """The generator's adversarial loss: a scalar, lower when the discriminator is fooled.

    Args:
        kind: a key of GENERATOR_LOSSES.
        fake: logits of generated images.
    """
    return lookup(GENERATOR_LOSSES, kind, "generator loss")(at_least_float32(fake))


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, over: Literal["global", "process"] = "process"
) -> Tensor:
    """The weight that makes both terms pull equally hard at the generator's last layer (VQGAN, arXiv 2012.09841).

    |d reconstruction / d last_layer| / (|d adversarial / d last_layer| + 1e-4), at most 1e4, detached: a scalar to
    multiply the adversarial term (and its weight in the recipe) with. Both graphs are kept for the backward pass.

    Args:
        reconstruction: the scalar reconstruction and perceptual terms, weighted and summed.
        adversarial: the scalar adversarial term, unweighted.
        last_layer: the weight of the decoder's last convolution.
        over: "process": each process weighs by its own images, as published. "global": by the gradients' means over all
            processes, those of a loss over the images of all of them; every process must call.
    """
    (pull,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    pull, push = at_least_float32(pull), at_least_float32(push)
    if over == "global" and processes() > 1:
        pull, push = all_sum(torch.stack([pull, push])) / processes()
    return (pull.norm() / (push.norm() + 1e-4)).clamp(max=1e4).detach()


def _of_images(logits: Tensor) -> Tensor:
    """The mean logit of each image: (B,)."""
    return logits.flatten(1).mean(1)


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": _hinge,  # IBQ, VQGAN
    "vanilla": _cross_entropy,
    "non_saturating": _cross_entropy,  # the same discriminator: only the generators differ
    # The released code (SEED-Voken) sums the two halves here, where its hinge loss has their mean.
    "non_saturating_image": lambda real, fake: 2 * _cross_entropy(_of_images(real), _of_images(fake)),
}

GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda fake: -fake.mean(),  # VQGAN
    "vanilla": lambda fake: -F.softplus(fake).mean(),  # log(1 - D), the original game; flat where the generator fails
    "non_saturating": lambda fake: F.softplus(-fake).mean(),  # -log D of each patch
    "non_saturating_image": lambda fake: F.softplus(-_of_images(fake)).mean(),  # IBQ: of each image's mean logit
}
