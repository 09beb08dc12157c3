"""The `data` section of a recipe: which pictures to learn from, which to measure on, how to make squares of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal
from warnings import warn

from pydantic import Field, field_validator

from lexel.config import Config
from lexel.data.embedded import EMBEDDED, WITH_SPLITS
from lexel.data.images import SPLITS, ImageSet, Remembered, open_images, split_folder
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
    on_error: Literal["stop"] | None = (
        None  # "stop" ends the run at an unreadable picture; else another takes its place
    )

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

    def opened(source: str, split: str | None) -> ImageSet:
        return open_images(source, split, config.size, progress=progress)

    source, validation = config.source, config.validation
    if validation is None and _has_split(source, "train") and _has_split(source, "validation"):
        validation = "validation"
    if isinstance(validation, str):
        if validation in SPLITS:
            training, measuring = opened(source, "train"), opened(source, validation)
        else:
            training, measuring = (
                opened(source, "train" if _has_split(source, "train") else None),
                opened(validation, None),
            )
    else:
        everything = opened(source, "train" if _has_split(source, "train") else None)
        if len(everything) == 1:
            warn(f"{source} holds a single image: it is learned from and measured on", stacklevel=2)
            training = measuring = everything
        else:
            training, measuring = everything.hold_out(HELD_OUT if validation is None else validation)
    if config.workers == 0 and config.memory > 0:
        limit = int(config.memory * 2**30)
        training, measuring = Remembered(training, limit), Remembered(measuring, limit)
    return training, measuring


def _has_split(source: str, split: str) -> bool:
    if source in EMBEDDED:
        return source in WITH_SPLITS and split != "test"
    folder = Path(source).expanduser()
    return folder.is_dir() and split_folder(folder, split) is not None
