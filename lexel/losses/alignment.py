"""Feature alignment: a tokenizer's features pulled to those of a frozen network, its teacher, through a projector."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.losses.base import Loss, LossInputs
from lexel.networks.backbones import Backbone, backbone, check_size
from lexel.runtime import at_least_float32, without_autocast

Projector = Literal["identity", "linear", "mlp", "convolutions"]


class Alignment(Loss):
    """Pulls features to a teacher's, place by place: 1 - cosine, beyond a margin.

    The mean over images and places of relu(1 - margin - cos(projected feature, teacher's feature)), and, weighted by
    `distances`, of relu(|cos(f_i, f_j) - cos(t_i, t_j)| - distance_margin) over the pairs of places of each image, f
    projected features and t the teacher's. Features and teacher need not have the same grid: the teacher's map is
    resized (bilinear, antialiased).

    Args:
        teacher: vgg16, efficientnet_lite0, efficientnet_lite2; or a vision transformer of transformers (DINOv2,
            DINOv3, SigLIP, CLIP) by the path of its folder or a hub id in the local cache.
        at: the tokenizer's features: "latents" before quantization, "codes" after it, or the path of a part, such as
            "encoder.middle" or "decoder.levels.1".
        level: which of the teacher's maps, from 0 (shallow) or from -1 (the deepest).
        size: pixels a side of the images that the teacher sees; by default what the images have, and for a vision
            transformer one patch for each place of the features.
        projector: "linear" (a 1x1 convolution), "mlp" (three of them with SiLU between), "convolutions" (3x3 instead),
            or "identity" (none).
        hidden: channels inside an "mlp" or "convolutions".
        margin: how far a cosine may stay below 1 at no cost.
        distances: weight of the second term; 0 switches it off.
        distance_margin: how far a cosine of two places may be off at no cost.
        adaptive: whether the weight is balanced against the reconstruction loss at the encoder's last weight.

    Raises:
        UsageError: the teacher is not here, or a level, a margin or the features' shape cannot be used.
    """

    colour = True
    of_images = False

    def __init__(
        self,
        teacher: str,
        at: str = "latents",
        level: int = -1,
        size: int | None = None,
        projector: Projector = "linear",
        hidden: int = 2048,
        margin: float = 0.0,
        distances: float = 0.0,
        distance_margin: float = 0.0,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.teacher: Backbone = backbone(teacher)
        depth = len(self.teacher.widths)
        if not -depth <= level < depth:
            raise UsageError(f"level = {level}: the network {teacher} has maps 0 to {depth - 1}, or -{depth} to -1")
        check_size(size)
        if hidden < 1 or distances < 0 or not 0 <= margin < 2 or not 0 <= distance_margin < 2:
            raise UsageError(
                "an alignment needs hidden >= 1, distances >= 0 and margins in [0, 2), got "
                f"hidden = {hidden}, distances = {distances}, margin = {margin}, distance_margin = {distance_margin}"
            )
        self.at, self.level, self.size, self.kind, self.hidden = at, level, size, projector, hidden
        self.margin, self.distances, self.distance_margin = margin, distances, distance_margin
        self.adaptive = adaptive
        self.features = (at,)
        self.projector: nn.Module = nn.Identity()

    def connect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        shape, width = shapes[self.at], self.teacher.widths[self.level]
        if len(shape) != 3:
            raise UsageError(
                f"features at {self.at!r} are {shape}, no map (C, h, w) that a teacher's could stand beside"
            )
        if self.kind == "identity" and shape[0] != width:
            raise UsageError(f"without a projector features at {self.at!r} need {width} channels, got {shape[0]}")
        self.projector = PROJECTORS[self.kind](shape[0], self.hidden, width)

    def forward(self, inputs: LossInputs) -> Tensor:
        features = inputs.features[self.at]  # (B, C, h, w)
        with torch.no_grad():
            wanted = self.teacher.at(inputs.images, self.size, tuple(features.shape[2:]))[self.level]
            wanted = at_least_float32(wanted)
            if wanted.shape[2:] != features.shape[2:]:
                wanted = F.interpolate(
                    wanted, size=features.shape[2:], mode="bilinear", align_corners=False, antialias=True
                )
        projected = at_least_float32(self.projector(features))
        with without_autocast(projected.device):
            a, b = directions(projected), directions(wanted)  # (B, C, places)
            loss = F.relu(1 - self.margin - (a * b).sum(1)).mean()
            if self.distances:
                off = (a.transpose(1, 2) @ a - b.transpose(1, 2) @ b).abs()  # (B, places, places)
                loss = loss + self.distances * F.relu(off - self.distance_margin).mean()
        return loss


def directions(features: Tensor) -> Tensor:
    """Features (B, C, h, w) of length 1 at each place: (B, C, h w)."""
    return F.normalize(features.flatten(2), dim=1, eps=1e-6)


def mlp(channels: int, hidden: int, width: int, kernel: int = 1) -> nn.Module:
    """Three convolutions with SiLU between them."""
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel, padding=padding),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, kernel, padding=padding),
        nn.SiLU(),
        nn.Conv2d(hidden, width, 1),
    )


PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "identity": lambda channels, hidden, width: nn.Identity(),
    "linear": lambda channels, hidden, width: nn.Conv2d(channels, width, 1, bias=False),
    "mlp": mlp,
    "convolutions": lambda channels, hidden, width: mlp(channels, hidden, width, kernel=3),
}


class REPA(Alignment):
    """REPA's alignment: cosine at every patch, through an MLP of three layers (https://arxiv.org/abs/2410.06940).

    Published for the hidden states of diffusion transformers; here for the features of a tokenizer. Its weight there
    is 0.5. See `Alignment` for the arguments.
    """

    def __init__(
        self, teacher: str, at: str = "latents", level: int = -1, size: int | None = None, hidden: int = 2048
    ) -> None:
        super().__init__(teacher, at, level, size, projector="mlp", hidden=hidden)


class VAVAE(Alignment):
    """VA-VAE's alignment of latents: cosine and distance matrix with margins, balanced (https://arxiv.org/abs/2501.01423).

    A linear projector, margins of 0.5 and 0.25, and a weight that is balanced against the reconstruction loss at the
    encoder's last weight; the published weight on top is 0.1. See `Alignment` for the arguments.
    """

    def __init__(
        self,
        teacher: str,
        at: str = "latents",
        level: int = -1,
        size: int | None = None,
        margin: float = 0.5,
        distance_margin: float = 0.25,
        adaptive: bool = True,
    ) -> None:
        super().__init__(
            teacher, at, level, size, margin=margin, distances=1.0, distance_margin=distance_margin, adaptive=adaptive
        )


class FeatureReconstruction(Alignment):
    """VFMTok's objective: the codes alone must give the teacher's features back (https://arxiv.org/abs/2507.08441).

    The published decoder of features is a transformer over tokens of regions; here it is three convolutions over the
    grid of codes. See `Alignment` for the arguments.
    """

    def __init__(
        self, teacher: str, at: str = "codes", level: int = -1, size: int | None = None, hidden: int = 512
    ) -> None:
        super().__init__(teacher, at, level, size, projector="convolutions", hidden=hidden)


class DecoderDistillation(Alignment):
    """Distills a teacher into features of the decoder, as Emu3.5 does with SigLIP (https://arxiv.org/abs/2510.26583).

    Its training is not public: where, through what and how strongly is ours. `at` is a part of the decoder, such as
    "decoder.middle". See `Alignment` for the arguments.
    """

    def __init__(
        self, teacher: str, at: str = "decoder.middle", level: int = -1, size: int | None = None, hidden: int = 2048
    ) -> None:
        super().__init__(teacher, at, level, size, projector="mlp", hidden=hidden)
