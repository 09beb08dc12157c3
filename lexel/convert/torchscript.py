"""Reads the tensors of a TorchScript archive without loading, compiling or running the code inside it."""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lexel.checkpoint import DAMAGE, reason
from lexel.errors import UsageError
from lexel.regular import check_regular

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with TorchScript code."""
    check_regular(path, path.stat())
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except DAMAGE:  # a damaged archive is told of by whatever reads it
        return False


def read(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a scripted module under their dotted names.

    Raises:
        UsageError: the archive is damaged, or holds objects that are neither modules nor tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl")
            content = _stored(archive, pickled)
            _check_memo(content)
            root = _Reader(io.BytesIO(content), archive, PurePosixPath(pickled).parent).load()
        tensors: dict[str, Tensor] = {}
        _collect(root, "", tensors)
    except (StopIteration, *DAMAGE) as error:
        raise UsageError(f"{path} cannot be read as a TorchScript archive: {reason(error)}") from None
    return tensors


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record of an archive. PyTorch stores records as they are: compressed ones could become any size."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"its record {name} is compressed")
    return archive.read(name)


def _check_memo(content: bytes) -> None:
    """Refuses numbers of remembered objects beyond what a pickle can hold: the unpickler would make room for them."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError("its pickle is damaged")


class _Object:
    """A scripted module or other object as the attributes it was saved with."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Knows how to rebuild tensors and turns every scripted class into `_Object`; all other names are refused."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: PurePosixPath) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Object
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch.jit._pickle" and name.startswith("build_"):  # typed lists
            return list
        if module == "torch.jit._pickle" and name == "restore_type_tag":  # a container and the name of its type
            return _untagged
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not plain data")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        data = bytearray(_stored(self.archive, str(self.folder / "data" / key)))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _untagged(value: Any, _: str) -> Any:
    return value


def _collect(value: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, _Object):
        for part, inner in value.attributes.items():
            _collect(inner, f"{name}.{part}" if name else part, tensors)
