"""A tiny untrained feature network, for tests of metrics: it costs nothing and needs no file."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.networks.backbones import Backbone
from lexel.networks.features import FeatureNetwork
from lexel.networks.frozen import freeze
from lexel.runtime import without_weights


class Random(FeatureNetwork):
    """Two random convolutions, always the same ones: 16 features, 10 logits, a map of 8 x 8 x 1 values."""

    name = "random"
    side = 32
    dims = 16
    classes = 10
    spatial_dims = 64
    classifier = "fc"

    @classmethod
    def load(cls, weights: str | Path | None = None) -> Mapping[str, Tensor]:
        if weights is not None:
            raise UsageError(f"the feature network 'random' takes no weights, got {weights}")
        generator = torch.Generator().manual_seed(0)
        with without_weights():
            shapes = {name: tensor.shape for name, tensor in cls._network().state_dict().items()}
        scales = {name: 1 / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}
        return {name: torch.randn(shape, generator=generator) * scales[name] for name, shape in shapes.items()}

    @classmethod
    def _network(cls) -> nn.Module:
        return _Layers(cls.dims, cls.classes)

    def _normalise(self, images: Tensor) -> Tensor:
        return images


class _Layers(nn.Module):
    def __init__(self, dims: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.second = nn.Conv2d(8, dims, 4, stride=2, padding=1)
        self.fc = nn.Linear(dims, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = F.relu(self.second(F.relu(self.first(images))))  # (B, 16, 8, 8)
        return images.mean((2, 3)), images[:, 0].flatten(1)


class RandomBackbone(Backbone):
    """Two smooth maps of the network above: 8 channels at stride 2, 16 at stride 4."""

    widths = (8, 16)

    def __init__(self) -> None:
        super().__init__()
        self.network = freeze(Random._network())
        if not next(self.network.buffers()).is_meta:
            for name, tensor in Random.load().items():
                self.network.get_buffer(name).copy_(tensor)

    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = torch.tanh(self.network.first(images.to(self.network.first.weight.dtype)))
        return [shallow, torch.tanh(self.network.second(shallow))]
