"""The `data` section of a recipe: which pictures to learn from, which to measure on, how to resize and crop them."""

from typing import Annotated, Any, Literal
from warnings import warn

from pydantic import Field, field_validator, model_validator

from lexel.config import Config
from lexel.data.batches import OnError
from lexel.data.files import PIXEL_LIMIT
from lexel.data.folder import SPLITS, NoSplit
from lexel.data.images import CachedImages, ImageSet
from lexel.data.sources import open_images
from lexel.data.torchcodec import nvjpeg_device
from lexel.data.transforms import TRANSFORMS, Transform
from lexel.runtime import ProgressCallback

HELD_OUT = 0.05  # of a folder that has no validation part of its own


class DataConfig(Config):
    """Images to learn from and to validate on."""

    source: str  # a path, an embedded set, or kind:location with a kind of SOURCES ("tar:shards/{0000..0099}.tar")
    # What to validate on: another source, a split of this one ("validation"; ./validation is a path), or the part of it
    # to hold out (0.05). Left out: the source's own validation split where it has one, else 5 % of it.
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    size: Annotated[int, Field(ge=1, le=2**16)]  # pixels a side
    transform: str = "published"  # a key of TRANSFORMS
    # 3: RGB, 1: grey, 4: RGB and alpha; others where the source has them
    channels: Annotated[int, Field(ge=1, le=2**16)] = 3
    depth: Literal[8, 16] = 8  # bits a channel
    # Processes that read pictures; 0 reads them in the training process.
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    # GiB of decoded pictures to keep; only without workers.
    memory: Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)] = 1.0
    # "stop" ends the run at an unreadable picture; "replace" puts another in its place.
    on_error: OnError = "replace"
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 1.0  # the part of the images that may be unreadable
    pixel_limit: Annotated[int, Field(ge=1)] = PIXEL_LIMIT  # pictures with more pixels are unreadable
    # JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where twice `size` is left: faster, not the same pixels.
    jpeg_scaling: bool = False
    # "nvjpeg" decodes JPEGs on the GPU (torchcodec): not the same pixels, and not with jpeg_scaling.
    jpeg_decoder: Literal["pillow", "nvjpeg"] = "pillow"

    @field_validator("transform")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TRANSFORMS:
            raise ValueError(f"choose from {', '.join(sorted(TRANSFORMS))}")
        return name

    @model_validator(mode="after")
    def _scalable(self) -> "DataConfig":
        if self.jpeg_scaling and not TRANSFORMS[self.transform].shrinks:
            names = ", ".join(sorted(name for name, transform in TRANSFORMS.items() if transform.shrinks))
            raise ValueError(f"jpeg_scaling does not go with the transform {self.transform!r}; it goes with {names}")
        if self.jpeg_scaling and self.jpeg_decoder != "pillow":
            raise ValueError(f"jpeg_scaling is Pillow's and does not go with jpeg_decoder {self.jpeg_decoder!r}")
        return self

    def make_transform(self) -> Transform:
        """The transform that this section names, at its size."""
        return TRANSFORMS[self.transform](self.size)

    @property
    def loading(self) -> dict[str, Any]:
        """The options of this section that `training_batches` takes."""
        return {name: getattr(self, name) for name in ("workers", "on_error", "max_unreadable")}


def open_data(config: DataConfig, progress: ProgressCallback | None = None) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those to validate on.

    A source with a single image is used for both, with a warning.

    Args:
        config: the recipe's section.
        progress: called with (done, total) while drawings are rendered for the first time.

    Raises:
        UsageError: see `open_images` and `nvjpeg_device`.
    """

    decoding: dict[str, Any] = {}
    if config.jpeg_scaling:
        decoding["shorter_side"] = 2 * config.size
    if config.jpeg_decoder == "nvjpeg":
        decoding["jpeg_device"] = nvjpeg_device()

    def opened(source: str, split: str | None = None) -> ImageSet:
        images = open_images(
            source,
            split,
            config.size,
            channels=config.channels,
            depth=config.depth,
            progress=progress,
            pixel_limit=config.pixel_limit,
            max_unreadable=config.max_unreadable,
        )
        return images.decoded_with(**decoding) if decoding else images

    def training_part() -> ImageSet:
        try:
            return opened(config.source, "train")
        except NoSplit:
            return opened(config.source)

    def both_parts() -> tuple[ImageSet, ImageSet]:
        validation = config.validation
        if validation is None:
            try:
                measuring = opened(config.source, "validation")
                return opened(config.source, "train"), measuring
            except NoSplit:
                validation = HELD_OUT
        if isinstance(validation, str):
            if validation in SPLITS:
                return opened(config.source, "train"), opened(config.source, validation)
            return training_part(), opened(validation)
        everything = training_part()
        if len(everything) == 1:
            warn(f"{config.source} has a single image; it is used for training and for validation", stacklevel=3)
            return everything, everything
        return everything.hold_out(validation)

    training, measuring = both_parts()
    if config.workers == 0 and config.memory > 0:  # read in this process, which keeps what it has decoded
        limit = int(config.memory * 2**30)
        return CachedImages(training, limit), CachedImages(measuring, limit)
    return training, measuring
