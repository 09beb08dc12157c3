"""Training states in shards: each process writes what it holds, in the background (torch.distributed.checkpoint).

Only tensors lie in shards; plain data lies in the checkpoint beside them, which names every file with its checksum and
is written last. Nothing in a file is executed when it is read.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lexel.checkpoint import DAMAGE
from lexel.distributed import processes, rank
from lexel.errors import UsageError
from lexel.regular import open_regular, sha256_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # with it comes much else

METADATA = ".metadata"
# What the description of the shards may name: classes that describe tensors, and types. None of them acts.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"PosixPath", "WindowsPath"},
}
SHARD = re.compile(r"__[0-9]{1,6}_[0-9]{1,6}\.distcp")


class Writing:
    """Shards that are being written while training goes on."""

    def __init__(self, folder: Path, future: "Future[Any]") -> None:
        self.folder, self._future = folder, future

    @property
    def done(self) -> bool:
        """Whether this process's are."""
        return self._future.done()

    def finish(self) -> dict[str, str]:
        """Waits for them; the SHA-256 of each file that this process wrote, by name.

        Raises:
            UsageError: they could not be written.
        """
        error = self._future.exception()
        if error is not None:
            raise UsageError(f"the shards in {self.folder} could not be written: {_reason(error)}") from None
        own = [f"__{rank()}_*.distcp", *([METADATA] if rank() == 0 else [])]
        return {path.name: sha256_of(path) for pattern in own for path in sorted(self.folder.glob(pattern))}


def begin(folder: Path, state: dict[str, Any], group: "dist.ProcessGroup") -> Writing:
    """Copies the tensors that this process holds to the CPU and begins to write them; all processes call it.

    Args:
        folder: new; the same for all.
        state: nested dicts of tensors, sharded (DTensor) or the same in every process.
        group: of the CPU and of nobody else: it is used in the background.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    folder.mkdir(parents=True, exist_ok=True)
    future = async_save(state, storage_writer=FileSystemWriter(folder), process_group=group)
    assert isinstance(future, Future)
    return Writing(folder, future)


def check(folder: Path, digests: Mapping[str, str]) -> None:
    """Compares shards with their checksums.

    Raises:
        UsageError: one is missing or damaged.
    """
    for name, wanted in digests.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UsageError(f"{folder} is no whole checkpoint: it has no {name}")
        if sha256_of(path) != wanted:
            raise UsageError(f"{path} is damaged: its content does not match its checksum")


def read(folder: Path, part: str) -> dict[str, Tensor]:
    """The whole tensors of a part of a state, in this process alone, such as "model".

    Raises:
        UsageError: they cannot be read.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        listed = _reader(folder).read_metadata().state_dict_metadata
    except DAMAGE as error:
        raise UsageError(f"{folder} cannot be read: {_reason(error)}") from None
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in listed.items()
        if name.startswith(f"{part}.") and isinstance(about, TensorStorageMetadata)
    }
    load(folder, tensors, alone=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def load(folder: Path, state: dict[str, Any], alone: bool = False) -> None:
    """Fills the tensors of a state from shards that any number of processes wrote.

    Args:
        folder: of the shards.
        state: nested dicts of tensors.
        alone: whether this process calls without the others; else all of them call together.

    Raises:
        UsageError: the shards lack a tensor, or cannot be read.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is meant
            state_dict_loader.load(state, storage_reader=_reader(folder), no_dist=alone or processes() == 1)
    except (CheckpointException, *DAMAGE) as error:
        raise UsageError(f"{folder} cannot be read: {_reason(error)}") from None


class _Plain(pickle.Unpickler):
    """Reads the description of shards: plain data and the classes that describe tensors, nothing that acts."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, set()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not plain data")
        return super().find_class(module, name)


def _reader(folder: Path) -> "FileSystemReader":
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open_regular(folder / METADATA) as file:
                found = _Plain(file).load()
            # What is no tensor would be read as a pickle without limits.
            if not isinstance(found, Metadata) or not all(
                isinstance(about, TensorStorageMetadata) for about in found.state_dict_metadata.values()
            ):
                raise pickle.UnpicklingError(f"{METADATA} describes more than tensors")
            if not all(SHARD.fullmatch(place.relative_path) for place in found.storage_data.values()):
                raise pickle.UnpicklingError(f"{METADATA} names other files than shards")
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


def _reason(error: BaseException) -> str:
    """The last line of an error, where PyTorch says what it was."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
