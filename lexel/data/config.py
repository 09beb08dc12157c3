"""The `data` section of a recipe: which pictures to learn from, which to measure on, how to make squares of them."""

from collections.abc import Callable
from typing import Annotated, Literal
from warnings import warn

from pydantic import Field, field_validator

from lexel.config import Config
from lexel.data.files import PIXEL_LIMIT
from lexel.data.folder import SPLITS, NoSplit
from lexel.data.images import CachedImages, ImageSet
from lexel.data.sources import open_images
from lexel.data.transforms import TRANSFORMS, Transform

HELD_OUT = 0.05  # of a folder that has no validation part of its own


class DataConfig(Config):
    """Where images come from."""

    source: str  # a folder, or an embedded set: openmoji, openmoji-subcategories, photos, photo-crops
    # What to measure on: a path, a split of the source ("validation"; ./validation is a path), or the part of it to
    # hold out (0.05).
    # Left out: the source's own validation split where it has one, else 5 % of it.
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    size: Annotated[int, Field(ge=1)]  # pixels a side
    transform: str = "published"  # a key of TRANSFORMS
    workers: Annotated[int, Field(ge=0)] = 0  # processes that read pictures; 0 reads them in the training process
    memory: Annotated[float, Field(ge=0)] = 1.0  # GiB of decoded pictures to keep; only without workers
    # "stop" ends the run at an unreadable picture; else another takes its place.
    on_error: Literal["stop"] | None = None
    pixel_limit: Annotated[int, Field(ge=1)] = PIXEL_LIMIT  # pictures with more pixels are unreadable

    @field_validator("transform")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TRANSFORMS:
            raise ValueError(f"choose from {', '.join(sorted(TRANSFORMS))}")
        return name

    def make_transform(self) -> Transform:
        """The transform that this section names, at its size."""
        return TRANSFORMS[self.transform](self.size)


def open_data(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> tuple[ImageSet, ImageSet]:
    """The pictures to learn from and those to measure on.

    A source with a single picture is learned from and measured on, with a warning.

    Args:
        config: the recipe's section.
        progress: called with (done, total) while drawings are rendered for the first time.

    Raises:
        UsageError: see `open_images`.
    """

    def opened(source: str, split: str | None = None) -> ImageSet:
        return open_images(source, split, config.size, progress=progress, pixel_limit=config.pixel_limit)

    def training_part() -> ImageSet:
        try:
            return opened(config.source, "train")
        except NoSplit:
            return opened(config.source)

    validation = config.validation
    if validation is None:
        try:
            measuring = opened(config.source, "validation")
            training = opened(config.source, "train")
            return _cached(config, training, measuring)
        except NoSplit:
            validation = HELD_OUT
    if isinstance(validation, str):
        if validation in SPLITS:
            return _cached(config, opened(config.source, "train"), opened(config.source, validation))
        return _cached(config, training_part(), opened(validation))
    everything = training_part()
    if len(everything) == 1:
        warn(f"{config.source} holds a single image: it is learned from and measured on", stacklevel=2)
        return _cached(config, everything, everything)
    return _cached(config, *everything.hold_out(validation))


def _cached(config: DataConfig, training: ImageSet, measuring: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Both sets, each with its decoded pictures in memory where they are read in this process."""
    if config.workers == 0 and config.memory > 0:
        limit = int(config.memory * 2**30)
        return CachedImages(training, limit), CachedImages(measuring, limit)
    return training, measuring
