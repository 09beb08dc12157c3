"""Samples in parts: each a file of its own with a description beside it, merged to the bytes of a single command."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from lexel import samples
from lexel.arrays import NpzWriter, read_array
from lexel.checkpoint import atomic, read_json
from lexel.config import Config, check
from lexel.data.images import digest
from lexel.errors import UsageError
from lexel.generators import Generator
from lexel.parts import Part
from lexel.regular import sha256_of
from lexel.runtime import Runtime

FORMAT = "lexel samples"
ENDINGS = (".npz", ".npy")


def write_part(
    generator: Generator,
    condition: samples.Condition,
    out: str | Path,
    runtime: Runtime,
    part: Part,
    *,
    first_number: int = 0,
    given: torch.Tensor | None = None,
    candidates: int = 1,
    **options: Any,
) -> Path | None:
    """Samples a part of what `lexel.samples.write_samples` would, into `NAME.part-I-of-N.npz` (or .npy) beside `out`.

    Parts are cut where that function cuts batches, so that all of them together hold the bytes of one. A part that is
    there is not made again.

    Args:
        generator, condition, runtime, first_number, given, candidates, options: as of `write_samples`, the same in all
            parts.
        out: the file that all parts will make.
        part: which.

    Returns:
        The file; None for a part without images, where there are more parts than batches.

    Raises:
        UsageError: `out` is no .npz or .npy, or as `write_samples` raises.
    """
    out = Path(out)
    if out.suffix.lower() not in ENDINGS:
        raise UsageError(f"{out} cannot be made in parts; give --out a name with {' or '.join(ENDINGS)}")
    count = samples.how_many(condition)
    known = given if given is None or len(given) == 1 else given.expand(count, *given.shape[1:])
    numbers = part.blocks(count, samples.images_at_once(candidates, options.get("batch_size")))
    if not numbers:
        return None
    path = out.with_name(f"{out.stem}.part-{part.number}-of-{part.parts}{out.suffix}")
    identity = {
        "generator": generator.fingerprint(),
        "condition": condition if isinstance(condition, int) else digest(torch.as_tensor(condition).tolist()),
        "given": None if given is None else digest(given.tolist()),
        "runtime": [runtime.device.type, str(runtime.half)],
        "options": {name: _named(value) for name, value in options.items() if name != "progress"},
        "first_number": first_number,
        "candidates": candidates,
    }
    about = {
        "format": FORMAT,
        "part": part.number,
        "parts": part.parts,
        "images": [numbers.start, numbers.stop],
        "of": count,
        "identity": digest(identity),
    }
    description = _description(path)
    if description.is_file():
        found = read_json(description)
        if {**found, "sha256": None} == {**about, "sha256": None} and found.get("sha256") == _checksum(path):
            return path
    samples.write_samples(
        generator,
        samples.cut(condition, numbers.start, numbers.stop),
        path,
        runtime,
        first_number=first_number + numbers.start,
        given=known if known is None or len(known) == 1 else known[numbers.start : numbers.stop],
        candidates=candidates,
        **options,
    )
    with atomic(description) as file:
        file.write_text(json.dumps({**about, "sha256": _checksum(path)}), encoding="utf-8")
    return path


def merge_samples(out: str | Path, parts: Sequence[str | Path]) -> int:
    """Puts parts of samples together in the order of their numbers; returns how many images there are.

    Raises:
        UsageError: a part is missing, damaged, given twice, or of other samples.
    """
    out, found = Path(out), sorted((_read(Path(part)) for part in parts), key=lambda pair: pair[1]["images"])
    if not found:
        raise UsageError("there is nothing to merge: give the files of the parts")
    first, about = found[0]
    for path, other in found:
        for key in ("identity", "parts", "of"):
            if other[key] != about[key]:
                raise UsageError(f"{path} and {first} are parts of different samples ({key})")
    done = 0
    for path, other in found:
        begin, end = other["images"]
        if begin < done:
            raise UsageError(f"{path} holds images that another part holds too; give every part once")
        if begin > done:
            break
        done = end
    if done != about["of"]:
        raise UsageError(
            f"image {done} of {about['of']} is in none of the parts (counted from 0); give all {about['parts']} parts, "
            "and run those again that were stopped"
        )
    if out.suffix.lower() != first.suffix.lower():
        raise UsageError(f"--out {out} must end in {first.suffix}, as the parts do")

    def arrays() -> Iterator[np.ndarray]:
        for path, _ in found:
            yield read_array(path, mapped=True)

    if out.suffix.lower() == ".npz":
        shape = next(arrays()).shape[1:]
        with NpzWriter(out, (about["of"], *shape)) as writer:
            for array in arrays():
                writer.add(array)
    else:
        with atomic(out) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(list(arrays())))
    return about["of"]


class Description(Config):
    """The record beside a part."""

    format: Literal["lexel samples"]  # FORMAT
    part: int = Field(ge=1)
    parts: int = Field(ge=1)
    images: list[Annotated[int, Field(ge=0)]] = Field(min_length=2, max_length=2)  # from the first to before the last
    of: int = Field(ge=1)
    identity: str
    sha256: str | None


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """A part's file and its description, its bytes compared."""
    description = _description(path)
    if not description.is_file():
        raise UsageError(f"{path} is no finished part: {description.name} is not beside it; run that part again")
    about = read_json(description)
    check(about, Description, f"{description} does not describe a part of samples")
    if _checksum(path) != about["sha256"]:
        raise UsageError(f"{path} is damaged: it does not match its checksum; delete it and run that part again")
    return path, about


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _checksum(path: Path) -> str | None:
    """Of a part's file; None where it holds no images and is not there."""
    return sha256_of(path) if path.exists() else None


def _named(value: Any) -> Any:
    """A value of an option, or whose it is."""
    return value.fingerprint() if hasattr(value, "fingerprint") else getattr(value, "name", value)
