"""The format of a token set: file names, the models of its JSON files, checksums."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lexel import checkpoint
from lexel.errors import UsageError
from lexel.token_spec import TokenSpec

INDEX = "tokens.json"
MANIFEST_PARTIAL = "unfinished.json"  # what INDEX will say, while shards are still missing
FORMAT, VERSION = "lexel tokens", 1
OWN_GRIDS = 2  # the version of sets whose images have grids of their own, which Lexel before 0.2 cannot read
CHECKSUM = "checksum"  # the key that holds the digest of all the others; absent in sets of Lexel before 0.2

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Description(BaseModel):
    """Base of the models of files: strict about types, lenient about keys of later versions."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", defer_build=True)


class CaptionLayout(Description):
    """The features of captions beside the tokens: float16 (images, length, channels), padded with rows of zeros."""

    length: Positive
    channels: Positive
    fingerprint: str  # of what they were made from


class StoredFile(Description):
    """A file and what must be in it."""

    sha256: Digest
    bytes: Count


class Manifest(Description):
    """The contents of `tokens.json`, and of `unfinished.json` but for the number of shards."""

    format: str
    version: int
    grid: Annotated[list[Positive], Field(min_length=1, max_length=8)] | None  # None: each image has its own
    codebook_size: Positive
    dtype: str
    crops: Positive
    seed: int
    fingerprint: str
    transform: str
    images: Count
    names: Digest  # of all names, one a line
    shard_size: Positive
    classes: list[str]
    labelled: bool
    attribution: str | None
    provenance: dict[str, Any] | None
    books: Positive | None = None
    grids: Annotated[list[list[Positive]], Field(min_length=2)] | None = None
    caption_features: CaptionLayout | None = None
    shards: Count | None = None
    with_checksum: bool = False  # no key of the file: whether it has a checksum; its shards then have one too

    @property
    def token_spec(self) -> TokenSpec:
        """The layout of an image's tokens, where all have one grid."""
        assert self.grid is not None
        if self.grids is not None:
            return TokenSpec(tuple(tuple(grid) for grid in self.grids), self.codebook_size, self.books)
        return TokenSpec((tuple(self.grid[self.books is not None :]),), self.codebook_size, self.books)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted = index_dtype(self.codebook_size).name
        if self.dtype != wanted:
            raise ValueError(f"dtype is {self.dtype!r} where {self.codebook_size} codes need {wanted}")
        if (self.grid is None) != (self.version == OWN_GRIDS):
            raise ValueError(f"version {self.version} has {'no' if self.grid is None else 'one'} grid for all images")
        if self.grid is None and (self.grids is not None or self.crops != 1):
            raise ValueError("images with grids of their own have one version each, and no grids in common")
        if self.grid is not None and list(self.token_spec.shape) != self.grid:
            raise ValueError(f"grid is {self.grid} where books and grids give {list(self.token_spec.shape)}")
        if self.shards not in (None, -(-self.images // self.shard_size)):
            raise ValueError(f"{self.shards} shards do not hold {self.images} images of {self.shard_size} a shard")
        return self


class ShardDescription(Description):
    """The contents of a shard's .json."""

    names: list[str]
    labels: list[Count] | None
    unreadable: dict[str, str]
    sha256: Digest
    bytes: Count
    captions: list[str] | None = None
    caption_features: StoredFile | None = None
    layouts: list[Annotated[list[list[Positive]], Field(min_length=1)]] | None = None  # grids that images here have
    layout: list[Count] | None = None  # which of them each image has
    sizes: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]] | None = None  # (h, w) before padding

    @property
    def cells(self) -> int:
        """Cells of all images with grids of their own, whatever their number."""
        cells = [sum(math.prod(grid) for grid in grids) for grids in self.layouts or ()]
        return sum(cells[number] * count for number, count in Counter(self.layout or ()).items())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = (self.layouts, self.layout, self.sizes)
        if len({part is None for part in own}) > 1:
            raise ValueError("layouts, layout and sizes go together")
        if self.layouts is not None and self.layout is not None and self.sizes is not None:
            if not len(self.layout) == len(self.sizes) == len(self.names):
                raise ValueError(
                    f"there are {len(self.layout)} layouts, {len(self.sizes)} sizes, {len(self.names)} names"
                )
            if max(self.layout, default=-1) >= len(self.layouts):
                raise ValueError(f"there is the layout {max(self.layout)} of {len(self.layouts)}")
        for what, given in (("labels", self.labels), ("captions", self.captions)):
            if given is not None and len(given) != len(self.names):
                raise ValueError(f"there are {len(given)} {what} for {len(self.names)} names")
        return self


Model = TypeVar("Model", bound=BaseModel)


def index_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the indices below codebook_size."""
    return np.min_scalar_type(codebook_size - 1)


def find_manifest(folder: Path) -> Path | None:
    """What a folder says of its tokens, be their writing finished or not; None for a folder of something else."""
    return next((folder / name for name in (INDEX, MANIFEST_PARTIAL) if (folder / name).is_file()), None)


def plan_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The plan of an encoding, of all that its `tokens.json` says."""
    return {name: value for name, value in facts.items() if name not in (CHECKSUM, "shards")}


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Reads a `tokens.json` or `unfinished.json`, checked, and all its keys.

    Raises:
        UsageError: the file is damaged, of another version, or does not describe tokens.
    """
    table = checkpoint.read_json(path)
    with_checksum = CHECKSUM in table
    if table.get("format") != FORMAT:
        raise UsageError(f"{path} does not describe Lexel tokens")
    if table.get("version") not in (VERSION, OWN_GRIDS):
        found = short(table.get("version"))
        raise UsageError(f"{path.parent} has version {found} of the format; this Lexel reads {VERSION} and {OWN_GRIDS}")
    manifest = checked(path, table, Manifest)
    return manifest.model_copy(update={"with_checksum": with_checksum}), table


def read_shard_description(path: Path, manifest: Manifest) -> ShardDescription:
    """Reads a shard's .json, checked by itself and against the set's.

    Raises:
        UsageError: the file is damaged.
    """
    table = checkpoint.read_json(path)
    if (CHECKSUM in table) != manifest.with_checksum:
        raise UsageError(f"{path} is damaged: {INDEX} or it has lost its checksum; encode the images again")
    shard = checked(path, table, ShardDescription)
    if (shard.labels is not None) != manifest.labelled:
        raise UsageError(f"{path} is damaged: {INDEX} says labelled = {manifest.labelled}, and it has other labels")
    if (shard.layouts is None) != (manifest.grid is not None):
        raise UsageError(f"{path} is damaged: {INDEX} and it differ in whether images have grids of their own")
    if (tokens := shard.cells * (manifest.books or 1)) > shard.bytes:
        raise UsageError(f"{path} is damaged: grids of {tokens:,} tokens are not in {shard.bytes:,} bytes")
    if (shard.caption_features is None) != (manifest.caption_features is None):
        raise UsageError(f"{path} is damaged: {INDEX} and it differ in whether there are features of captions")
    most = max(shard.labels, default=-1) if shard.labels is not None else -1
    if most >= len(manifest.classes) and manifest.classes:
        raise UsageError(f"{path} is damaged: it has the label {most} for {len(manifest.classes)} classes")
    return shard


def sealed(table: dict[str, Any], indent: int | None = None) -> bytes:
    """A table as JSON with a checksum of itself."""
    return json.dumps({**table, CHECKSUM: _checksum(table)}, indent=indent).encode()


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    return folder / f"shard-{shard:05d}{suffix}"


def features_path(folder: Path, shard: int) -> Path:
    """The file of a shard's caption features."""
    return shard_path(folder, shard, "-captions.npy")


def digest(data: bytes | memoryview) -> str:
    """SHA-256 in 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of_names(names: Any) -> str:
    """SHA-256 of names, one a line."""
    return digest("\n".join(names).encode("utf-8", "surrogateescape"))


def short(value: Any) -> str:
    """A value for an error message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 20 else text[:12] + "..."


def checked(path: Path, table: dict[str, Any], model: type[Model]) -> Model:
    """The model of what a file says, its checksum compared if it has one.

    Raises:
        UsageError: the file is damaged.
    """
    if CHECKSUM in table:
        given = table.pop(CHECKSUM)
        if given != _checksum(table):
            raise UsageError(f"{path} is damaged: its content does not match its checksum; encode the images again")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = " ".join(".".join(map(str, first["loc"])).split())[:60]
        message = " ".join(first["msg"].removeprefix("Value error, ").split())[:200]
        raise UsageError(f"{path} is damaged: {where + ': ' if where else ''}{message}") from None


def _checksum(table: dict[str, Any]) -> str:
    return digest(json.dumps(table, sort_keys=True).encode())
