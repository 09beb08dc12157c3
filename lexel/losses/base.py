"""The contract of losses: what a term of a training loss is computed from, and what it may learn."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class LossInputs(NamedTuple):
    """Inputs of a loss in one step."""

    images: Tensor  # (B, C, H, W) in [-1, 1]
    reconstructions: Tensor  # (B, C, H, W), with gradients, not clamped
    features: Mapping[str, Tensor]  # those that `Loss.features` names, (B, C, h, w) or (B, C, N), with gradients


class Loss(nn.Module):
    """A term of a tokenizer's training loss: a scalar, unweighted; `train.weights` of the recipe weighs it.

    Options are the constructor's arguments, checked against its annotations. A loss may learn: its parameters are
    trained with the tokenizer's and saved with the run, not with the model. What it does not want saved (frozen
    networks) it keeps in buffers that are not persistent, as `lexel.networks.frozen.freeze` does. A mean over the
    images of a batch, of each by itself, makes it independent of how a batch is shared by processes.

    Made inside `lexel.runtime.without_weights` it has shapes only and reads no file: recipes are checked so.
    """

    colour: ClassVar[bool] = False  # whether images must have three channels
    of_images: ClassVar[bool] = True  # part of the reconstruction loss, against which adversarial weights are balanced
    features: tuple[str, ...] = ()  # wanted: "latents", "codes", or the path of a part of the tokenizer
    adaptive: bool = False  # multiplies the weight so that it pulls at the encoder as hard as the reconstruction loss

    def __init__(self) -> None:
        super().__init__()

    def connect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Makes what depends on the features' shapes, such as projectors; called once, before training.

        Args:
            shapes: without the batch, of each wanted feature: (C, h, w) or (C, N).

        Raises:
            UsageError: features of this shape cannot be used.
        """

    def forward(self, inputs: LossInputs) -> Tensor:
        """The term: a scalar, at least float32."""
        raise NotImplementedError
