"""Reads published checkpoints: files, folders and hub ids, into named tensors. Nothing in a file is ever executed."""

import argparse
import collections
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexel import checkpoint
from lexel.convert import torchscript
from lexel.errors import UsageError, some
from lexel.provenance import public_name
from lexel.regular import expanded

# What PyTorch's wrappers put into the names of weights: at the beginning of all of them, or wherever a part is wrapped.
LEADING = "module."  # DataParallel, DistributedDataParallel, AveragedModel
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, checkpointing
INDEX = ".index.json"  # lists the shards of a split checkpoint
NESTED = ("state_dict", "ema", "model")  # under which name training code puts the tensors; the first present counts


class Placeholder:
    """Stands for a class of a training framework that checkpoints name; it takes anything and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# What training checkpoints hold beside their tensors: plain data, and names of classes that we never look at. Calls in
# a pickle can reach only these.
_scalar = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *(dict, list, tuple, int, float, bool, str),  # types of options
    (Any, "typing.Any"),
    collections.defaultdict,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (dict, f"{module}.AttributeDict")  # hyper-parameters
        for module in (
            "pytorch_lightning.utilities.parsing",
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
        )
    ),
    *(
        (Placeholder, name)
        for name in (
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
            "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
            "main.SetupCallback",
            "main.ImageLogger",
            "main.CUDACallback",
            # Configurations of experiments as hyper-parameters.
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            *(
                f"omegaconf.nodes.{kind}Node"
                for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum")
            ),
            "jsonargparse.namespace.Namespace",
            "jsonargparse._namespace.Namespace",
            # Paths of another system or Python cannot be made here.
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "pathlib._local.PosixPath",
            "pathlib._local.WindowsPath",
        )
    ),
]


@dataclass(frozen=True)
class Published:
    """The contents of a source: tensors under their published names, and a configuration where there is one."""

    source: str
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]  # config.json beside the weights, or a table in the file; mostly empty
    wrappers: tuple[str, ...] = ()  # what was taken off the names

    @property
    def name(self) -> str:
        """The source's name for publication: a hub id, or the name of a local file without its folders."""
        return public_name(self.source)


def read(source: str | Path) -> Published:
    """The tensors of a file, of a folder with one checkpoint, or of a hub id (owner/name or owner/name/FILE).

    Raises:
        UsageError: nothing is there, several checkpoints are, or a file is truncated, foreign or would run code.
    """
    path = _find(source)
    tensors, config = _read(path)
    beside = path.parent / checkpoint.CONFIG
    tensors, wrappers = _unwrapped(tensors, path)
    config = config or (checkpoint.read_json(beside) if beside.is_file() else {})
    return Published(str(source), tensors, config, wrappers)


def _find(source: str | Path) -> Path:
    """The file to read: itself, the one checkpoint of a folder, or the hub's."""
    path = expanded(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.is_file())
        return path / _choose(found, str(source), f"{source}/")
    checkpoint.check_there(source)
    return _download(str(source))


def _download(source: str) -> Path:
    """A file of a hub repository, and what belongs to it, in the hub's cache."""
    from huggingface_hub import HfApi

    owner, name, *inside = source.split("/", 2)
    repository = f"{owner}/{name}"
    if inside:
        wanted = inside[0]
    else:
        with checkpoint.from_hub(f"{source} is neither here nor a repository the hub gives"):
            found = HfApi().model_info(repository, timeout=10).siblings or []
        wanted = _choose([file.rfilename for file in found], source, f"{repository}/")
    beside = [str(Path(wanted).with_name(checkpoint.CONFIG))]
    if wanted.endswith(INDEX):
        beside.append(str(Path(wanted).with_name("*.safetensors")))
    path = checkpoint.find_folder(repository, [wanted, *beside]) / wanted
    if not path.is_file():
        raise UsageError(f"{source} is neither here nor on the hub: {repository} has no file {wanted}")
    return path


def _choose(names: list[str], source: str, prefix: str) -> str:
    """The one checkpoint among file names; a split one counts as its index."""
    indices = [name for name in names if name.endswith(INDEX)]
    weights = [name for name in names if name.endswith(checkpoint.ENDINGS)]
    if indices:
        weights = [name for name in weights if not re.search(r"-\d{5}-of-\d{5}\.", name)] + indices
    if not weights:
        raise UsageError(f"{source} holds no checkpoint; one ends in {', '.join(checkpoint.ENDINGS)}")
    if len(weights) > 1:
        raise UsageError(f"{source} holds several checkpoints; choose from {', '.join(prefix + n for n in weights)}")
    return weights[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a file, and its own table `config` if it has one."""
    if path.name.endswith(INDEX):
        return _read_shards(path), {}
    if path.suffix == ".safetensors":
        return checkpoint.read_safetensors(path), {}
    if torchscript.is_torchscript(path):
        return torchscript.read(path), {}
    with torch.serialization.safe_globals(HARMLESS):
        content = checkpoint.read_pickle(path)
    config = _first_mapping(content, ("config", "hyper_parameters"))
    content = _first_mapping(content, NESTED) or content
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if _named(content) else {}
    if not tensors:
        raise UsageError(f"{path} holds no named tensors, nor any under {', '.join(NESTED)}")
    return tensors, config or {}


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors under the names that they have without wrappers, and the wrappers that they had."""
    names, wrappers = {name: name for name in tensors}, []
    while True:
        shared = {f"{name.split('.', 1)[0]}." for name in names.values()}
        found = next((part for part in ANYWHERE if any(part in name for name in names.values())), None)
        if found is not None:
            names = {original: name.replace(found, "") for original, name in names.items()}
        elif shared == {LEADING}:
            found = LEADING
            names = {original: name.removeprefix(LEADING) for original, name in names.items()}
        else:
            break
        wrappers.append(found)
    if len(set(names.values())) < len(names):
        raise UsageError(f"{path} has tensors twice, inside and outside of {', '.join(wrappers)}")
    return {names[original]: tensor for original, tensor in tensors.items()}, tuple(wrappers)


def _first_mapping(content: Any, names: Sequence[str]) -> Mapping[str, Any] | None:
    """The first of the named entries that is a table."""
    found = (content.get(name) for name in names) if isinstance(content, Mapping) else ()
    return next((value for value in found if isinstance(value, Mapping)), None)


def _named(content: object) -> bool:
    return isinstance(content, Mapping) and all(isinstance(name, str) for name in content)


def _read_shards(index: Path) -> dict[str, Tensor]:
    table = checkpoint.read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise UsageError(f"{index} has no weight_map; it is no index of a split checkpoint")
    outside = [name for name in table.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise UsageError(f"{index} names the shard {outside[0]!r}, which is not beside it")
    shards = sorted(set(table.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise UsageError(f"{index} lacks {some(missing)}; the checkpoint is half-downloaded")
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors.update(checkpoint.read_safetensors(index.parent / name))
    if tensors.keys() != table.keys():
        raise UsageError(f"{index} does not match its shards: {some(sorted(tensors.keys() ^ table.keys()))}")
    return tensors
