"""The contract of feature networks: images in; pooled features, class logits and a spatial map out."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel import checkpoint
from lexel.errors import UsageError
from lexel.networks import weights as pretrained
from lexel.networks.frozen import Constant, frozen_with
from lexel.networks.resize import RESIZE, resize
from lexel.registry import lookup
from lexel.runtime import exact_float32


class Features(NamedTuple):
    """The features of a batch of images."""

    pooled: Tensor  # (B, dims), for Fréchet distances, precision and recall, kernel distances
    logits: Tensor | None = None  # (B, classes), for inception scores; None where the network has no classes
    spatial: Tensor | None = None  # (B, spatial_dims), a map flattened as (h, w, c); None where nothing is published


class FeatureNetwork(Constant):
    """A frozen network whose features metrics are taken of. Every number made with it carries its `name`.

    It is without parameters or gradients, in full precision, saved nowhere. A subclass sets the constants below and
    implements `_network`, `_normalise` and, unless its weights are in `lexel.networks.weights`, `load`. Class scores
    and a spatial map are optional: a network without them (`classifier = None`, `spatial_dims = None`) serves every
    metric that needs pooled features alone.

    Args:
        tensors: the weights, by the names of `_network`.
        resize: how images reach `side`, a key of RESIZE; None for the network's own.
        logit_bias: whether logits include the classifier's bias; None for what the metric is published with.
    """

    name: ClassVar[str]
    side: ClassVar[int]  # pixels, of the images that the layers see
    dims: ClassVar[int]  # of the pooled features
    classes: ClassVar[int] = 0  # of the logits
    spatial_dims: ClassVar[int | None] = None
    classifier: ClassVar[str | None] = None  # the linear layer that turns pooled features into logits
    resize_rule: str = "clean"
    logit_bias: bool = True

    def __init__(
        self, tensors: Mapping[str, Tensor], resize: str | None = None, logit_bias: bool | None = None
    ) -> None:
        super().__init__()
        if resize is not None:
            lookup(RESIZE, resize, "resize rule")  # raises where there is no such rule
            self.resize_rule = resize
        if logit_bias is not None:
            self.logit_bias = logit_bias
        self.fingerprint = checkpoint.fingerprint({"network": self.name}, tensors)  # of the weights alone
        self.network = frozen_with(self._network, tensors)

    @classmethod
    def load(cls, weights: str | Path | None = None) -> Mapping[str, Tensor]:
        """The published tensors; see `lexel.networks.weights.load`."""
        return pretrained.load(cls.name, weights)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of images (B, 3, H, W) in [-1, 1], of any size; values between the 256 levels are not rounded.

        Raises:
            UsageError: the images have another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(f"{self.name} needs images (B, 3, H, W), got {tuple(images.shape)}")
        dtype = next(self.network.buffers()).dtype
        with exact_float32(images.device.type):
            images = resize(images.to(dtype), self.side, self.resize_rule)
            pooled, spatial = self.network(self._normalise(images))
            if self.classifier is None:
                return Features(pooled, None, spatial)
            classifier = self.network.get_submodule(self.classifier)
            assert isinstance(classifier, nn.Linear)
            bias = classifier.bias if self.logit_bias else None
            return Features(pooled, F.linear(pooled, classifier.weight, bias), spatial)

    @classmethod
    def _network(cls) -> nn.Module:
        """The layers under the published tensor names: normalised images to pooled features and the map, if any."""
        raise NotImplementedError

    def _normalise(self, images: Tensor) -> Tensor:
        """Resized images in [-1, 1] in the range that the layers were trained on."""
        raise NotImplementedError
