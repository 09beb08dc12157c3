"""Published checkpoints as Lexel models: one rename table a family, strict in both directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexel import checkpoint
from lexel.convert import (
    cosmos,
    diffusers,
    files,
    fvq,
    ibq,
    llamagen,
    open_magvit2,
    simvq,
    transformers,
    vqgan,
    vqgan_lc,
)
from lexel.convert.family import Conversion, Family, Request
from lexel.errors import UsageError, unknown
from lexel.generators import Generator
from lexel.tokenizer import Tokenizer

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ibq.FAMILY,
        ibq.EMU3_5,
        vqgan.FAMILY,
        vqgan.GUMBEL,
        open_magvit2.FAMILY,
        llamagen.FAMILY,
        fvq.FAMILY,
        fvq.BAKED,
        simvq.FAMILY,
        vqgan_lc.FAMILY,
        cosmos.FAMILY,
        diffusers.FAMILY,
        *transformers.FAMILIES,
    )
}


def load(
    source: str | Path,
    family: str | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Tokenizer | Generator:
    """Any model: a Lexel folder, or a published checkpoint (see `convert`), in evaluation mode.

    Args:
        source: a folder, a checkpoint file, or a hub id (owner/name, or owner/name/FILE for one of several files).
        family: the layout of a published checkpoint; needed where tensor names fit several.
        weights: "averaged" or "live"; the averages where there are any if not given.
        overrides: options that a published file does not tell, such as {"autoencoder.groups": 16}.

    Raises:
        UsageError: nothing is there, the family is unknown or unclear, or the file is not whole or not safe.
    """
    if family is None and _is_ours(source):
        if weights is not None or overrides:
            raise UsageError(
                f"{source} is a Lexel folder, which has one set of weights and says all; leave options out"
            )
        return load_folder(source)
    return convert(source, family, weights, overrides).model


def load_folder(source: str | Path) -> Tokenizer | Generator:
    """A tokenizer or generator from a Lexel folder, by its `config.json`."""
    config, tensors = checkpoint.load_folder(source)
    if config.get("model") == "generator":
        return Generator.from_pretrained(source)
    return Tokenizer.from_folder(source, config, tensors)


def convert(
    source: str | Path,
    family: str | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Conversion:
    """A published checkpoint as a model of ours, with an account of every tensor; arguments as in `load`.

    The architecture follows from tensor names and shapes.
    """
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    published = files.read(source)
    chosen = FAMILIES[family] if family is not None else recognise(published)
    conversion = chosen.convert(Request(published, weights, overrides or {}))
    conversion.model.provenance = {
        "source": published.name,
        "family": conversion.family,
        "weights": conversion.weights,
        "left_out": _summary(conversion.left_out),
    }
    return conversion


def recognise(published: files.Published) -> Family:
    """The one family whose names a file has.

    Raises:
        UsageError: none or several fit.
    """
    fitting = [family for family in FAMILIES.values() if family.fits(published.tensors)]
    if not fitting and "encoder.levels.0.blocks.0.conv1.weight" in published.tensors:
        raise UsageError(
            f"{published.source} is a file of a Lexel folder; give the folder, with its {checkpoint.CONFIG}"
        )
    if not fitting:
        raise UsageError(
            f"{published.source} fits no known family (its first tensors are "
            f"{checkpoint.some(sorted(published.tensors))}); families are {', '.join(sorted(FAMILIES))}"
        )
    if len(fitting) > 1:
        names = ", ".join(sorted(family.name for family in fitting))
        raise UsageError(
            f"{published.source} fits several families, which share tensor names but not how they choose codes; "
            f"name one of {names}"
        )
    return fitting[0]


def _is_ours(source: str | Path) -> bool:
    """Whether a folder or hub repository is a Lexel model, or what is left of one."""
    path = Path(source)
    if path.is_dir():
        if (path / checkpoint.CONFIG).is_file():
            return "lexel" in checkpoint.read_json(path / checkpoint.CONFIG)
        weights = [file.name for file in path.iterdir() if file.name.endswith(files.WEIGHTS)]
        return weights in ([], [checkpoint.WEIGHTS])
    if isinstance(source, str) and not path.exists() and checkpoint.HUB_ID.fullmatch(source):
        config = checkpoint.find_folder(source, [checkpoint.CONFIG]) / checkpoint.CONFIG
        return config.is_file() and "lexel" in checkpoint.read_json(config)
    return False


def _summary(left_out: Mapping[str, str]) -> dict[str, int]:
    """How many tensors were left out for each reason."""
    counts: dict[str, int] = {}
    for reason in left_out.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts
