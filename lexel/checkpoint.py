"""Checkpoints: atomic writes, model folders, training states, strict loading."""

import functools
import hashlib
import json
import os
import pickle
import re
import secrets
import socket
import stat
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lexel.errors import UsageError, some
from lexel.regular import check_regular, expanded, open_regular

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".jit")  # of published files of weights
# What libraries raise when the bytes of a file are damaged. Unpicklers check nothing ahead.
OF_PICKLES = (pickle.UnpicklingError, struct.error, LookupError, TypeError, AttributeError, AssertionError, SystemError)
OF_ARCHIVES = (zipfile.BadZipFile, zlib.error, RuntimeError)  # the last for encrypted members, and by PyTorch for all
DAMAGE = (*OF_PICKLES, *OF_ARCHIVES, EOFError, OSError, ValueError, OverflowError, MemoryError)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
IN_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)+")  # a repository, or a file in one


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it there once it is whole.

    A reader sees the old file or the new one, never a part: the data is on the disk before the name changes. If
    the block raises, or the process dies in it, `path` is as it was. A full disk is an OSError, whatever wrote.
    Every writer has a temporary file of its own, so that several processes may write the same `path` at once. What
    killed writers left is removed by the next one, and by `discard_partials`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_partials(path.parent, _target(path))
    partial = _partial(path)
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)  # what the umask allows; some writers make files of mode 600
        try:
            yield partial
        except (RuntimeError, safetensors.SafetensorError):  # how torch and safetensors tell of a full disk, and more
            _write_more(partial)
            raise
        partial.chmod(mode)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes `path` when the block ends and vanishes when it raises."""
    with atomic(path) as partial, partial.open("wb") as file:
        yield file


def _partial(path: Path) -> Path:
    """A new temporary name for a file: `.partial-TARGET-MACHINE-PROCESS-NUMBER`, then the file's suffix.

    The suffix stays, since writers choose formats by it; the rest is short, since names have a limit of 255 bytes.
    """
    suffix = path.suffix if len(path.suffix) < 32 else ""
    name = f".partial-{_target(path)}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    return path.with_name(name)


def _target(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]


def discard_partials(folder: str | Path, target: str = "") -> None:
    """Removes the temporary files of `atomic` in a folder whose writers are gone.

    A writer is gone if its process on this machine has ended; those of other machines are taken for gone after a day.
    """
    for partial in Path(folder).glob(f".partial-{target}*"):
        machine, process = [*partial.name.split("-"), "", ""][2:4]
        try:
            gone = not _runs(process) if machine == _machine() else time.time() - partial.stat().st_mtime > 86400
            if gone:
                partial.unlink()
        except FileNotFoundError:
            continue  # its writer has finished, or another process removed it


@functools.cache
def _machine() -> str:
    """Eight hexadecimal digits of this machine and its space of process numbers."""
    parts = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        if path.exists():
            parts.append(str(path.stat().st_ino) if path.name == "pid" else path.read_text())
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def _runs(process: str) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    except ValueError:  # not a name that `atomic` gives
        return False
    return True


def save_folder(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a model folder: `config.json` and `model.safetensors`, the weights first.

    Raises:
        UsageError: `folder` is a file, or holds the model of another program.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder to save to")
    if _foreign(folder / CONFIG):
        raise UsageError(f"{folder} holds a model of another program, which would be overwritten; give another folder")
    # Copies are made only where a tensor is elsewhere than on the CPU, or not contiguous (channels-last weights).
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic(folder / WEIGHTS) as path:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    with atomic(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _foreign(path: Path) -> bool:
    """Whether a configuration is another program's. A damaged one is not: a killed writer may have left it."""
    try:
        return path.is_file() and "lexel" not in read_json(path)
    except UsageError:
        return False


def load_folder(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a model folder, or of a repository on the Hugging Face hub.

    Tensors are mapped from the file, not copied: memory is filled as they are used.

    Raises:
        UsageError: there is no such folder or repository, a file is missing, or one cannot be read.
    """
    folder = find_folder(source)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{source} is not a whole model folder: it has no {' and no '.join(missing)}")
    return read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)


def find_folder(source: str | Path, files: Iterable[str] = (CONFIG, WEIGHTS)) -> Path:
    """The local folder for a path or hub id; a repository's `files` (patterns) are fetched into the hub's cache."""
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{source} is a file; give a model folder (with {CONFIG} and {WEIGHTS}) or a hub id")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise UsageError(f"{source} does not exist; give a model folder (with {CONFIG} and {WEIGHTS}) or a hub id")

    from huggingface_hub import snapshot_download

    with from_hub(f"{source} is neither a folder here nor a repository the hub gives"):
        return Path(snapshot_download(source, allow_patterns=list(files)))


def check_there(source: str | Path) -> None:
    """Whether a published checkpoint may be had: cheap, and before what reads one is imported.

    Raises:
        UsageError: the source is neither a path here nor, by its form, a repository of the hub or a file in one.
    """
    path = expanded(source)
    if not (path.is_file() or path.is_dir()) and (isinstance(source, Path) or not IN_HUB.fullmatch(source)):
        raise UsageError(f"{source} does not exist; give a checkpoint file, a folder with one, or a hub id")


@contextmanager
def from_hub(message: str) -> Iterator[None]:
    """Turns what the hub's client raises (not found, not reachable and not cached, refused) into one line."""
    from huggingface_hub import errors

    # The last is of the HTTP library underneath, which differs between versions of the client.
    hub_errors = (errors.HfHubHTTPError, errors.HFValidationError, OSError, errors.HTTPError)  # type: ignore[attr-defined]
    try:
        yield
    except hub_errors as error:
        raise UsageError(f"{message}: {reason(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        with open_regular(path) as file:
            value = json.loads(file.read().decode())
    except ValueError as error:  # also of bytes that are no text, and of numbers with thousands of digits
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is not valid JSON: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}; an object was expected")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped rather than read."""
    check_regular(path, path.stat())
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, *DAMAGE) as error:
        raise UsageError(f"{path} cannot be read, it is truncated or no safetensors file: {reason(error)}") from None


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads tensors into a module: every tensor used, every parameter and buffer found, every shape and type right.

    A module on the meta device takes over the tensors themselves, so that nothing is held twice; where a file has
    them in several precisions, they are brought to the widest.

    Raises:
        UsageError: with the first names that differ, and how many more there are.
    """
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    differing = [
        f"{name} is {tuple(tensors[name].shape)} where {tuple(tensor.shape)} is needed"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name} is {_short(tensors[name].dtype)} where {_short(tensor.dtype)} is needed"
        for name, tensor in expected.items()
        if name in tensors and _number_class(tensors[name].dtype) != _number_class(tensor.dtype)
    ]
    faults = [
        f"{what} {some(names)}"
        for what, names in (
            ("lacks", missing),
            ("has unknown", unknown),
            ("differs in shape:", differing),
            ("differs in type:", mistyped),
        )
        if names
    ]
    if faults:
        raise UsageError(f"{source} does not fit the {type(module).__name__.lower()}: it {'; it '.join(faults)}")
    takes_over = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(_of_one_precision(tensors, expected) if takes_over else tensors, assign=takes_over)


def _of_one_precision(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with one type for each type that is expected: the widest of the file's."""
    widest: dict[torch.dtype, torch.dtype] = {}
    for name, tensor in expected.items():
        found = tensors[name].dtype
        if not found.is_floating_point:
            widest[tensor.dtype] = tensor.dtype  # integers as the module has them
        else:
            widest[tensor.dtype] = torch.promote_types(widest.get(tensor.dtype, found), found)
    return {name: tensors[name].to(widest[tensor.dtype]) for name, tensor in expected.items()}


def _number_class(dtype: torch.dtype) -> str:
    """The class of a type's numbers; those of one class can be converted into each other."""
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "floating point"
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:  # floats of 8 bits need scales to be read
        return str(dtype)
    return "integer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a training state: nested dicts, lists and tuples of tensors, numbers, strings and None. Atomic."""
    with atomic(path) as partial:
        torch.save(dict(state), partial)


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, onto the CPU; a file that would run code is refused.

    Raises:
        UsageError: the file is missing, truncated, has another byte than was written, or holds anything but plain data.
    """
    _check_bytes(Path(path))
    state = read_pickle(path)
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}; a training state was expected")
    return state


def _check_bytes(path: Path) -> None:
    """Compares every record of a training state with its checksum, which `torch.load` does not."""
    if not path.is_file():
        return  # `read_pickle` says what it is instead
    try:
        if not zipfile.is_zipfile(path):  # raises for archives on several disks
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except DAMAGE as error:
        raise UsageError(f"{path} is damaged: {reason(error)}") from None
    if damaged is not None:
        raise UsageError(f"{path} is damaged: {damaged} does not match its checksum")


def read_pickle(path: str | Path) -> Any:
    """Reads a file of `torch.save`, if it is tensors and plain data: nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        with open_regular(path) as file:
            mappable = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 are no zip and cannot be mapped
        with warnings.catch_warnings():  # PyTorch's are for who wrote the file; what is wrong with it an error tells
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        # A name without a dot is one of Python's own, such as eval.
        name = r"([\w.]+\.\w+|\w+(?= was not an allowed))"
        found = re.search(rf"(?:GLOBAL|global|class|function|Unsupported) {name}", str(error))
        what = f"it holds {found[1]}, which is not plain data" if found else "it is no checkpoint of plain data"
        raise UsageError(f"{path} is not read: {what}; files that could run code are refused") from None
    except DAMAGE as error:
        raise UsageError(f"{path} cannot be read, it is truncated or no PyTorch file: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The first line of an error, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a configuration and of every tensor's name, type, shape and bytes: 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_more(path: Path) -> None:
    """Raises the operating system's own error if no more can be written to a file."""
    with path.open("ab") as file:
        file.write(bytes(2**16))
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
