"""Token data sets: pictures turned into indices once, kept in shards that are mapped into memory.

A folder holds `tokens.json` (what the tokens are and whose) and, for every shard, `shard-00000.npy` (the indices) and
`shard-00000.json` (names, labels, checksum). A shard's .json is written after its .npy and `tokens.json` after all of
them, each of them whole or not at all, so a writer that was stopped goes on at the first shard that is missing.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexel.checkpoint import atomic_write
from lexel.data.arrays import to_images
from lexel.data.batches import Pictures, Positions, crop_choices, crop_generator, look_up, read_squares
from lexel.data.images import ImageSet, hold_out_order
from lexel.data.transforms import Transform
from lexel.errors import UsageError

INDEX = "tokens.json"
PLAN = "unfinished.json"  # what INDEX will say, while shards are still missing
FORMAT, VERSION = "lexel tokens", 1

Verify = Literal["lazily", "now", "never"]


class TokenBatch(NamedTuple):
    """The tokens of some images."""

    indices: Tensor  # (B, *grid) int64
    labels: Tensor | None  # (B,) int64; None for a set without labels
    numbers: Tensor  # (B,) int64: which images of the set these are


def index_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the indices below codebook_size."""
    return np.min_scalar_type(codebook_size - 1)


def write_tokens(
    folder: str | Path,
    images: ImageSet,
    transform: Transform,
    encode: Callable[[Tensor], Tensor],
    *,
    grid: Sequence[int],
    codebook_size: int,
    fingerprint: str,
    crops: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    shard_size: int = 4096,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "TokenSet | None":
    """Encodes a set of images into a folder; the same call again goes on where it was stopped.

    Several processes may write one folder, each its share of the shards; the last to finish completes it. What is
    written does not depend on their number, nor on interruptions.

    Args:
        folder: new, or begun by the same call before.
        images: the set; unreadable pictures are left out and their reasons kept in `TokenSet.unreadable`.
        transform: makes squares of pictures.
        encode: images (B, 3, H, W) in [-1, 1] to int64 indices (B, *grid).
        grid: shape of an image's indices: (h, w), or (Q, h, w) for residual and product codes.
        codebook_size: indices lie below it.
        fingerprint: of the tokenizer; readers can ask for it.
        crops: versions of each picture. The first is the centred one; the others are random, and a function of
            (seed, version, number of the picture).
        seed: of the random versions.
        batch_size: pictures encoded together.
        shard_size: pictures in a shard; what an interruption can cost.
        rank, processes: this process, of how many.
        workers: processes that read pictures; 0 reads them here.
        provenance: anything more to keep, as JSON.
        progress: called with (pictures done, pictures of this process).

    Returns:
        The set; None if other processes have not finished their shards.

    Raises:
        UsageError: the folder holds something else, or `encode` gave other shapes or indices than announced.
    """
    folder = Path(folder)
    for name, value in (("codebook_size", codebook_size), ("crops", crops), ("shard_size", shard_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < processes:
        raise UsageError(f"rank must lie in [0, {processes}) for {processes} processes, got {rank}")
    plan: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "grid": list(grid),
        "codebook_size": codebook_size,
        "dtype": index_dtype(codebook_size).name,
        "crops": crops,
        "seed": seed,
        "fingerprint": fingerprint,
        "transform": f"{type(transform).__name__} {transform.size}",
        "images": len(images),
        "names": _digest("\n".join(images.names).encode("utf-8", "surrogateescape")),
        "shard_size": shard_size,
        "classes": images.classes,
        "labelled": images.labels is not None,
        "attribution": images.attribution,
        "provenance": provenance,
    }
    plan = json.loads(json.dumps(plan))  # as it will be read back: a tuple has become a list
    _begin(folder, plan)
    shards = range(-(-len(images) // shard_size))
    mine = {
        shard: range(shard * shard_size, min((shard + 1) * shard_size, len(images)))
        for shard in shards[rank::processes]
    }
    done, total = 0, sum(len(numbers) for numbers in mine.values())

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for shard, numbers in mine.items():
        if _shard_path(folder, shard, ".json").is_file():  # written before an interruption
            read(len(numbers))
        else:
            versions = _Versions(images, transform, numbers, batch_size, crops, seed)
            _write_shard(folder, shard, versions, encode, plan, workers, read)
    if not all(_shard_path(folder, shard, ".json").is_file() for shard in shards):
        return None
    with atomic_write(folder / INDEX) as file:
        file.write(json.dumps({**plan, "shards": len(shards)}, indent=2).encode())
    (folder / PLAN).unlink(missing_ok=True)
    return TokenSet.open(folder, verify="never")  # we wrote it a moment ago


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Makes the folder ours, or checks that it is ours already."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give a folder for the tokens")
    for name in (INDEX, PLAN):
        if (folder / name).is_file():
            found = _read_json(folder / name)
            for key, value in plan.items():
                if found.get(key) != value:
                    raise UsageError(
                        f"{folder} holds tokens made in another way ({key}: {_short(found.get(key))} there, "
                        f"{_short(value)} here); give another folder or delete it"
                    )
            return
    # Another process may begin at this very moment: what it writes first is not foreign.
    ours = (".partial-", "shard-", PLAN, INDEX)
    if folder.is_dir() and any(not path.name.startswith(ours) for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no tokens; give a new folder")
    with atomic_write(folder / PLAN) as file:
        file.write(json.dumps(plan, indent=2).encode())


@dataclass
class _Versions:
    """The batches of a shard as a table: every version of some pictures."""

    images: ImageSet
    transform: Transform
    numbers: range
    batch_size: int
    crops: int
    seed: int

    def __getitem__(self, batch: int) -> Pictures:
        numbers = self.numbers[batch * self.batch_size : (batch + 1) * self.batch_size]
        return read_squares(self.images, numbers, self.transform, self._generators)

    def _generators(self, number: int) -> list[np.random.Generator | None]:
        return [None, *(crop_generator(self.seed, version, number) for version in range(1, self.crops))]


def _write_shard(
    folder: Path,
    shard: int,
    versions: _Versions,
    encode: Callable[[Tensor], Tensor],
    plan: dict[str, Any],
    workers: int,
    read: Callable[[int], None],
) -> None:
    images, batches = versions.images, -(-len(versions.numbers) // versions.batch_size)
    unreadable: dict[str, str] = {}
    readable: list[int] = []
    encoded = [np.empty((0, plan["crops"], *plan["grid"]), plan["dtype"])]
    for pictures in look_up(versions, range(batches), workers, prefetch=2):
        unreadable.update(pictures.unreadable)
        readable += pictures.numbers
        if pictures.numbers:
            encoded.append(_encode(pictures.arrays, len(pictures.numbers), encode, plan, versions.batch_size))
        read(len(pictures.numbers) + len(pictures.unreadable))
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(encoded))
    with atomic_write(_shard_path(folder, shard, ".npy")) as file:
        file.write(buffer.getbuffer())
    facts = {
        "names": [images.names[number] for number in readable],
        "labels": None if images.labels is None else [images.labels[number] for number in readable],
        "unreadable": unreadable,
        "sha256": _digest(buffer.getbuffer()),
        "bytes": buffer.getbuffer().nbytes,
    }
    with atomic_write(_shard_path(folder, shard, ".json")) as file:
        file.write(json.dumps(facts).encode())


def _encode(
    squares: np.ndarray, count: int, encode: Callable[[Tensor], Tensor], plan: dict[str, Any], batch_size: int
) -> np.ndarray:
    """Tokens (count, crops, *grid) of squares (count * crops, size, size, 3), never more than batch_size at once."""
    parts = []
    for first in range(0, len(squares), batch_size):
        images = to_images(squares[first : first + batch_size])
        indices = encode(images).cpu().numpy()
        if indices.shape != (len(images), *plan["grid"]):
            raise UsageError(f"the tokenizer gave indices {indices.shape} for a grid of {tuple(plan['grid'])}")
        if indices.min() < 0 or indices.max() >= plan["codebook_size"]:
            raise UsageError(
                f"the tokenizer gave indices from {indices.min()} to {indices.max()} for {plan['codebook_size']} codes"
            )
        parts.append(indices.astype(plan["dtype"]))
    return np.concatenate(parts).reshape(count, plan["crops"], *plan["grid"])


class TokenSet:
    """The tokens of a set of images, mapped into memory.

    Attributes:
        grid: shape of an image's indices.
        codebook_size: indices lie below it.
        crops: versions of each image; the first is the centred one.
        fingerprint: of the tokenizer that made them.
        names: one per image.
        labels: int64 (N,), or None.
        classes: the name of each class.
        attribution: what must be shown beside these images, or None.
        unreadable: the reasons of the images left out, by name.
        facts: all of `tokens.json`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], shards: list[dict[str, Any]], verify: Verify) -> None:
        self.folder = folder
        self.facts = facts
        self.grid: tuple[int, ...] = tuple(facts["grid"])
        self.codebook_size: int = facts["codebook_size"]
        self.crops: int = facts["crops"]
        self.fingerprint: str = facts["fingerprint"]
        self.classes: list[str] = facts["classes"]
        self.attribution: str | None = facts["attribution"]
        self.names: list[str] = [name for shard in shards for name in shard["names"]]
        labels = [label for shard in shards for label in shard["labels"]] if facts["labelled"] else None
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.unreadable: dict[str, str] = {name: why for shard in shards for name, why in shard["unreadable"].items()}
        self._rows = np.arange(len(self.names))  # where the images of this set, or part of it, lie in the shards
        self._ends = np.cumsum([len(shard["names"]) for shard in shards])
        self._digests = [shard["sha256"] for shard in shards]
        self._verify = verify
        self._shards: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: Verify = "lazily") -> "TokenSet":
        """The token set in a folder.

        Args:
            folder: as `write_tokens` left it.
            verify: when to compare the shards with their checksums: "lazily" when each is first used, "now", or
                "never". Sizes and types are always checked.

        Raises:
            UsageError: there is no token set, its writing was not finished, or a shard is missing or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"there is no folder {str(folder)!r}; give one that `lexel encode` wrote")
        if not (folder / INDEX).is_file():
            if (folder / PLAN).is_file():
                plan = _read_json(folder / PLAN)
                there = len(list(folder.glob("shard-*.json")))
                wanted = -(-int(plan["images"]) // int(plan["shard_size"]))
                raise UsageError(
                    f"{folder} is not finished: {there} of {wanted} shards are written; run the same command again"
                )
            raise UsageError(f"{folder} holds no tokens: it has no {INDEX}; give a folder that `lexel encode` wrote")
        facts = _read_json(folder / INDEX)
        if facts.get("format") != FORMAT:
            raise UsageError(f"{folder / INDEX} does not describe Lexel tokens")
        if facts.get("version") != VERSION:
            raise UsageError(f"{folder} has version {facts.get('version')} of the format; this Lexel reads {VERSION}")
        shards: list[dict[str, Any]] = []
        for number in range(facts["shards"]):
            for suffix in (".json", ".npy"):
                if not _shard_path(folder, number, suffix).is_file():
                    raise UsageError(f"{folder} is damaged: {_shard_path(folder, number, suffix).name} is missing")
            shard = _read_json(_shard_path(folder, number, ".json"))
            size = _shard_path(folder, number, ".npy").stat().st_size
            if size != shard["bytes"]:
                raise UsageError(
                    f"{folder} is damaged: {_shard_path(folder, number, '.npy').name} has {size:,} bytes "
                    f"instead of {shard['bytes']:,}"
                )
            shards.append(shard)
        tokens = cls(folder, facts, shards, verify)
        if verify == "now":
            for number in range(len(shards)):
                tokens._shard(number)
        return tokens

    def __len__(self) -> int:
        return len(self._rows)

    def require(self, fingerprint: str) -> None:
        """Refuses to be read by another tokenizer than the one that made these tokens.

        Raises:
            UsageError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"the tokens in {self.folder} were made by another tokenizer "
                f"({self.fingerprint[:12]} instead of {fingerprint[:12]}); encode the images again with this one"
            )

    def tokens(self, numbers: Sequence[int] | np.ndarray, crops: int | np.ndarray = 0) -> Tensor:
        """The indices of images by their numbers: int64 (len(numbers), *grid).

        Args:
            numbers: in [0, len(self)).
            crops: which version of each image, one for all or one each.
        """
        rows = self._rows[np.asarray(numbers, np.int64)]
        crops = np.broadcast_to(crops, rows.shape)
        result = np.empty((len(rows), *self.grid), np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shards):
            chosen = shards == shard
            first = self._ends[shard - 1] if shard > 0 else 0
            result[chosen] = self._shard(int(shard))[rows[chosen] - first, crops[chosen]]
        return torch.from_numpy(result)

    def subset(self, numbers: Sequence[int] | np.ndarray) -> "TokenSet":
        """The images with these numbers, in this order."""
        part = object.__new__(TokenSet)
        part.__dict__.update(self.__dict__)
        numbers = np.asarray(numbers, np.int64)
        part._rows = self._rows[numbers]
        part.names = [self.names[number] for number in numbers]
        part.labels = None if self.labels is None else self.labels[numbers]
        return part

    def hold_out(self, fraction: float) -> tuple["TokenSet", "TokenSet"]:
        """Two sets, the rest and the held-out part: at least one image, chosen by the hashes of the names."""
        order, count = hold_out_order(self.names, fraction)
        return self.subset(sorted(order[count:])), self.subset(sorted(order[:count]))

    def histogram(self) -> Tensor:
        """How often each code occurs, over all versions: int64 (codebook_size,)."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64)
        for crop in range(self.crops):
            for first in range(0, len(self), 4096):
                numbers = np.arange(first, min(first + 4096, len(self)))
                counts += torch.bincount(self.tokens(numbers, crop).flatten(), minlength=self.codebook_size)
        return counts

    def training_batches(
        self, batch_size: int, seed: int, first_step: int = 0, rank: int = 0, processes: int = 1
    ) -> Iterator[TokenBatch]:
        """An endless iterator over the batches of step first_step, first_step + 1, ...

        As for images: a batch, the versions of its images included, is a function of (seed, step) alone, batch_size
        counts all processes, and process r takes the r-th slice.
        """
        if batch_size < 1 or batch_size % processes:
            raise UsageError(f"{processes} processes cannot share a batch of {batch_size} images evenly")
        if not 0 <= rank < processes:
            raise UsageError(f"rank must lie in [0, {processes}) for {processes} processes, got {rank}")
        if len(self) == 0:
            raise UsageError(f"{self.folder} holds no images")
        return self._training_batches(batch_size, seed, first_step, rank, processes)

    def _training_batches(
        self, batch_size: int, seed: int, step: int, rank: int, processes: int
    ) -> Iterator[TokenBatch]:
        positions, share = Positions(len(self), seed), batch_size // processes
        choices = crop_choices(len(self), self.crops, seed)
        while True:
            first = step * batch_size + rank * share
            places = [positions[position] for position in range(first, first + share)]
            numbers = np.array([number for _, number in places])
            crops = np.array([choices(epoch, number) for epoch, number in places])
            yield self._batch(numbers, crops)
            step += 1

    def ordered_batches(
        self, batch_size: int, rank: int = 0, processes: int = 1, crop: int = 0
    ) -> Iterator[TokenBatch]:
        """Every image once, in one version; process r of P gets the images r, r + P, r + 2P, ..., un-padded."""
        numbers = np.arange(rank, len(self), processes)
        for first in range(0, len(numbers), batch_size):
            yield self._batch(numbers[first : first + batch_size], crop)

    def _batch(self, numbers: np.ndarray, crops: int | np.ndarray) -> TokenBatch:
        labels = None if self.labels is None else torch.from_numpy(self.labels[numbers])
        return TokenBatch(self.tokens(numbers, crops), labels, torch.from_numpy(numbers))

    def _shard(self, number: int) -> np.ndarray:
        """A shard's tokens (rows, crops, *grid), mapped into memory; checked when it is first used."""
        if number not in self._shards:
            path = _shard_path(self.folder, number, ".npy")
            if self._verify != "never":
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != self._digests[number]:
                    raise UsageError(f"{path} is damaged: its content does not match its checksum; encode it again")
            self._shards[number] = np.load(path, mmap_mode="r")
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:  # mapped files do not travel to other processes; they open them again
        return {**self.__dict__, "_shards": {}}


def export_parquet(tokens: TokenSet, folder: str | Path, rows: int = 65536) -> list[Path]:
    """Writes a token set as Parquet: one row for each version of each image.

    Columns: `name`, `label` (class number) and `class` where there are labels, `crop`, `indices` (a list of fixed
    length, the grid row by row). What `tokens.json` says is in the schema's metadata under `lexel`.

    Returns:
        The files, of at most `rows` rows each.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to Parquet needs pyarrow: pip install 'lexel[tokens]'") from None
    folder = _new_folder(folder)
    files = []
    for part, numbers in enumerate(_parts(len(tokens), max(1, rows // tokens.crops))):
        repeated = np.repeat(numbers, tokens.crops)
        crops = np.tile(np.arange(tokens.crops), len(numbers))
        indices = tokens.tokens(repeated, crops).numpy().astype(tokens.facts["dtype"]).reshape(len(repeated), -1)
        columns = {
            "name": pa.array([tokens.names[number] for number in repeated]),
            "crop": pa.array(crops.astype(np.int32)),
            "indices": pa.FixedSizeListArray.from_arrays(pa.array(indices.ravel()), indices.shape[1]),
        }
        if tokens.labels is not None:
            labels = tokens.labels[repeated]
            columns["label"] = pa.array(labels.astype(np.int32))
            columns["class"] = pa.array([tokens.classes[label] for label in labels])
        table = pa.table(columns).replace_schema_metadata({"lexel": json.dumps(tokens.facts)})
        path = folder / f"tokens-{part:05d}.parquet"
        with atomic_write(path) as file:
            pq.write_table(table, file)
        files.append(path)
    return files


def export_webdataset(tokens: TokenSet, folder: str | Path, rows: int = 10000) -> list[Path]:
    """Writes a token set as WebDataset tar files: one sample for each image.

    A sample holds `indices.npy` (crops, *grid), `cls` (the class number, where there are labels) and `json` (name,
    class and the tokenizer's fingerprint). Its key is the number of the image.

    Returns:
        The files, of at most `rows` samples each.
    """
    try:
        import webdataset  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to WebDataset needs webdataset: pip install 'lexel[tokens]'") from None
    folder = _new_folder(folder)
    files = []
    for part, numbers in enumerate(_parts(len(tokens), rows)):
        path = folder / f"tokens-{part:05d}.tar"
        with atomic_write(path) as file, webdataset.TarWriter(file, mtime=0) as writer:
            for number in numbers:
                indices = tokens.tokens([number] * tokens.crops, np.arange(tokens.crops)).numpy()
                sample: dict[str, Any] = {
                    "__key__": f"{number:09d}",
                    "indices.npy": indices.astype(tokens.facts["dtype"]),
                    "json": {"name": tokens.names[number], "fingerprint": tokens.fingerprint},
                }
                if tokens.labels is not None:
                    sample["cls"] = int(tokens.labels[number])
                    sample["json"]["class"] = tokens.classes[sample["cls"]]
                writer.write(sample)
        files.append(path)
    return files


def _parts(count: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; give a new folder")
    return folder


def _shard_path(folder: Path, shard: int, suffix: str) -> Path:
    return folder / f"shard-{shard:05d}{suffix}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path} does not describe Lexel tokens")
    return table


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."
