"""A fixture of a published implementation, and what was compared with it."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lexel.convert import convert
from lexel.errors import UsageError

PRECISIONS = ("f64", "f32")  # the sections of results
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest number of the published tensor
# Families with convolutions, whose float32 the published numbers themselves keep to 1e-3 only (families.md).
CONVOLUTIONS = re.compile(
    "MaskGIT-VQGAN|TiTok legacy, stage 2|TiTok stage-2|VAR tokenizer|RQ-VAE$|VQ-VAE-2|Emu3.5|VQGAN-LC|DQ-VAE|MAGE"
)
# What a file says about its results, in no need of a comparison.
SAID = {"settings", "note", "min_gap", "min_relative_probability_gap"}
# What is given and not found, by its name in a file; under `f64` and `f32` everything is found.
GIVEN = {"inputs", "state_dict", "config", "arch", "quantizer_state_dict", "vae_quantizer_state_dict", "embedding"}
GIVEN |= {"z", "x", "t", "logits", "noise", "draws", "random_draws", "clean", "cond", "uncond", "gumbel_uniform"}
GIVEN |= {"gumbel_exponential", "gate2", "gate3", "grain", "codes"}


@dataclass
class Worst:
    """The largest error of a precision, and where it was."""

    error: float = 0.0
    where: str = "-"


@dataclass
class Fixture:
    """One file: the published configuration, weights, inputs and results; and the comparisons made with it."""

    path: Path
    content: dict[str, Any]
    compared: dict[str, None] = field(default_factory=dict)  # names in the order they were first compared
    worst: dict[torch.dtype, Worst] = field(default_factory=dict)
    tokens: bool | None = None  # whether all tokens were equal; None where a file has none
    faults: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # results that nothing is compared with: why
    seen: set[int] = field(default_factory=set)  # storages of the published results that were compared
    exact: dict[int, Tensor] = field(default_factory=dict)  # the float64 result of each float32 one, by its storage

    def __post_init__(self) -> None:
        for part in (self.content, *(self.content[name] for name in self.parts())):
            self.exact |= counterparts(part.get("f32"), part.get("f64"))

    @classmethod
    def open(cls, path: str | Path) -> "Fixture":
        """Reads a file.

        Raises:
            UsageError: it is no fixture, or not whole.
        """
        content = torch.load(path, weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("family"), str):
            raise UsageError("a fixture is a dictionary whose `family` says what it is of")
        return cls(Path(path), in_tensors(content))

    @property
    def family(self) -> str:
        return str(self.content["family"])

    def left(self) -> list[str]:
        """Published results that were compared with nothing, by their places in the file."""
        return [
            place for place, tensor in results(self.content) if tensor.untyped_storage().data_ptr() not in self.seen
        ]

    def parts(self) -> list[str]:
        """The sections of the file that have configuration, numbers and results of their own."""
        return [name for name, part in self.content.items() if isinstance(part, dict) and "f64" in part]

    def runs(self, part: str | None = None) -> Iterator["Run"]:
        """The file, or a part of it with results of its own, in float64 and in float32."""
        content = self.content if part is None else {**self.content, **self.content[part]}
        prefix = "" if part is None else f"{part} "
        for dtype in TOLERANCES:
            yield Run(self, content, dtype, prefix)

    def __str__(self) -> str:
        """The line that the command prints."""
        errors = ", ".join(f"{str(dtype)[6:]} {worst.error:.1e} ({worst.where})" for dtype, worst in self.worst.items())
        tokens = {None: "no tokens", True: "tokens equal", False: "TOKENS DIFFER"}[self.tokens]
        verdict = "FAILED: " + "; ".join(self.faults[:3]) if self.faults else "ok"
        skipped = "".join(f"; not compared: {place} ({why})" for place, why in self.skipped.items())
        compared = f"{', '.join(self.compared)}: {errors or 'nothing compared'}"
        return f"{self.path.name}: {compared}; {tokens}{skipped}; {verdict}"


class Absent:
    """Stands for a result that a file lacks, and for all that would be inside it: nothing is compared with it."""

    def __getitem__(self, name: Any) -> "Absent":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def keys(self) -> Collection[Any]:
        return {}.keys()

    def items(self) -> Collection[Any]:
        return {}.items()


class Results(dict[str, Any]):
    """Published results by name; a name that the file lacks is `Absent`."""

    def __missing__(self, name: str) -> Absent:
        return Absent()


def in_tensors(content: Any, found: bool = False) -> Any:
    """A file with every number and list of numbers among its results as a tensor, and no two results in one memory."""
    if isinstance(content, Mapping):
        inner = {
            name: part if name in SAID else in_tensors(part, found or name in PRECISIONS)
            for name, part in content.items()
        }
        return Results(inner) if found else inner
    if isinstance(content, Tensor):
        return content.clone()
    if found and is_numbers(content):
        return torch.tensor(content, dtype=torch.int64 if isinstance(flat(content)[0], int) else torch.float64)
    return [in_tensors(part, found) for part in content] if isinstance(content, list) else content


def flat(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def is_numbers(content: Any) -> bool:
    """Whether this is a number or a list of numbers, all whole or none."""
    kinds = {type(part) for part in flat(content)}
    return kinds in ({int}, {float})


def results(content: Any, place: str = "", found: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every published result in a file, with its place: `f64/train/loss`."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, Mapping):
        for name, part in content.items():
            if name not in SAID and (found or name not in GIVEN):
                yield from results(part, f"{place}/{name}".lstrip("/"), found or name in PRECISIONS)
    elif isinstance(content, list):
        for number, part in enumerate(content):
            yield from results(part, f"{place}/{number}", found)


def counterparts(rounded: Any, exact: Any) -> dict[int, Tensor]:
    """The tensors of `exact` at the places of those of `rounded`, by the storages of these."""
    if isinstance(rounded, Tensor) and isinstance(exact, Tensor) and rounded.shape == exact.shape:
        return {rounded.untyped_storage().data_ptr(): exact}
    found: dict[int, Tensor] = {}
    if isinstance(rounded, Mapping) and isinstance(exact, Mapping):
        for name in rounded.keys() & exact.keys():
            found |= counterparts(rounded[name], exact[name])
    elif isinstance(rounded, list) and isinstance(exact, list):
        for one, other in zip(rounded, exact, strict=False):
            found |= counterparts(one, other)
    return found


def distance(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """The largest difference as a share of the largest published number, or of `least` where that is larger."""
    if not theirs.numel():
        return 0.0
    difference = (ours.detach().double().reshape(theirs.shape) - theirs.double()).abs().max().item()
    largest = max(theirs.abs().max().item(), least)
    return difference / largest if largest else difference


@dataclass
class Run:
    """A fixture at one precision."""

    fixture: Fixture
    content: Mapping[str, Any]
    dtype: torch.dtype
    prefix: str = ""
    origins: dict[str, str] = field(default_factory=dict)  # of the model loaded last: our tensors' published names
    left_out: Mapping[str, str] = field(default_factory=dict)  # and the published tensors that it does not use: why

    @property
    def expected(self) -> Mapping[str, Any]:
        """The published results of this precision; float32 ones are float64's where a file has no others."""
        exact, rounded = (self.content.get(name, {}) for name in PRECISIONS)
        return Results({**exact, **rounded} if self.dtype == torch.float32 else exact)

    def __getitem__(self, name: str) -> Tensor:
        """An input, in this precision."""
        return self.cast(self.content["inputs"][name])

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def load(self, family: str, overrides: Mapping[str, Any] | None = None, **parts: Any) -> Any:
        """The model that the public importer makes of the file, in this precision.

        Args:
            family: a name in `lexel.convert.FAMILIES`.
            overrides: options that the published layout does not tell.
            parts: `state_dict` or `config` in place of the fixture's own.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / self.fixture.path.name
            state = parts.get("state_dict", self.content.get("state_dict"))
            torch.save({"state_dict": state, "config": parts.get("config", self.content.get("config", {}))}, path)
            conversion = convert(path, family, overrides=dict(overrides or {}))
        self.origins, self.left_out = conversion.origins, conversion.left_out
        return conversion.model.to(self.dtype)

    def parameters(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """Our parameters by the published names that the importer took them from: one, or the parts of a joint one."""
        named, found = dict(model.named_parameters()), dict[str, list[Tensor]]()
        for ours, theirs in self.origins.items():
            if ours in named:
                found.setdefault(theirs, []).append(named[ours])
        return found

    def close(
        self,
        name: str,
        ours: Tensor,
        theirs: Tensor | Sequence[Tensor] | Absent | None = None,
        tolerance: float | None = None,
        least: float = 0.0,
    ) -> None:
        """Compares numbers; in float32 with the published float32, and where that is far off, with float64.

        Ours then may be as far from float64 as the published float32 is, up to 1 %.
        Numbers all below `least` are compared as if the largest were that.
        """
        theirs = self.published(name, theirs)
        if isinstance(theirs, Absent):
            return
        self.fixture.compared[self.prefix + name] = None
        if ours.numel() != theirs.numel():
            self.fixture.faults.append(f"{name} is {tuple(ours.shape)}, published {tuple(theirs.shape)}")
            return
        allowed = TOLERANCES[self.dtype]
        if self.dtype == torch.float32:
            allowed = tolerance or (1e-3 if CONVOLUTIONS.match(self.fixture.family) else allowed)
        error = distance(ours, theirs, least)
        exact = self.fixture.exact.get(theirs.untyped_storage().data_ptr())
        if self.dtype == torch.float32 and exact is not None and not error <= allowed:
            error = min(error, distance(ours, exact, least))  # the published float32 may be the one that is far off
            allowed = max(
                allowed, min(1e-2, distance(theirs, exact, least))
            )  # what rounds so is no reason to be nearer
        worst = self.fixture.worst.setdefault(self.dtype, Worst())
        if not error <= worst.error:  # NaN included
            worst.error, worst.where = error, self.prefix + name
        if not error <= allowed:
            self.fixture.faults.append(f"{self.prefix}{name} differs by {error:.1e} in {str(self.dtype)[6:]}")

    def published(self, name: str, theirs: Tensor | Sequence[Tensor] | Absent | None) -> Any:
        """The published side of a comparison; several tensors are those of a batch's samples, one after the other."""
        theirs = self.expected[name] if theirs is None else theirs
        if isinstance(theirs, Absent):
            return theirs
        parts = [theirs] if isinstance(theirs, Tensor) else theirs
        self.fixture.seen |= {part.untyped_storage().data_ptr() for part in parts}
        return parts[0] if len(parts) == 1 else torch.cat([part.double().flatten() for part in parts])

    def same(self, name: str, ours: Tensor, theirs: Tensor | Sequence[Tensor] | Absent | None = None) -> None:
        """Compares integers, which must be equal; in float32 to the published float32's or to float64's."""
        theirs = self.published(name, theirs)
        if isinstance(theirs, Absent):
            return
        self.fixture.compared[self.prefix + name] = None
        exact = self.fixture.exact.get(theirs.untyped_storage().data_ptr())
        published = [theirs] if exact is None or self.dtype == torch.float64 else [theirs, exact]
        equal = ours.numel() == theirs.numel() and any(
            torch.equal(ours.reshape(theirs.shape).long(), each.long()) for each in published
        )
        self.fixture.tokens = equal and self.fixture.tokens is not False
        if not equal:
            self.fixture.faults.append(f"{self.prefix}{name} differ in {str(self.dtype)[6:]}")

    def gradients(self, total: Tensor, ours: Mapping[str, Tensor | list[Tensor]], name: str = "grads") -> None:
        """Compares the gradients of a scalar; `ours` are parameters and inputs by their published names.

        All of `ours` are differentiated, whatever a file has of them: PyTorch crashes on some single ones.
        """
        leaves = {key: leaf if isinstance(leaf, list) else [leaf] for key, leaf in ours.items()}
        leaves = {key: parts for key, parts in leaves.items() if all(part.requires_grad for part in parts)}
        flat = [leaf for parts in leaves.values() for leaf in parts]
        rest = iter(torch.autograd.grad(total, flat, retain_graph=True, materialize_grads=True, allow_unused=True))
        found = {key: [next(rest) for _ in parts] for key, parts in leaves.items()}
        self.close_gradients(
            {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in found.items()}, name
        )

    def close_gradients(self, found: Mapping[str, Tensor], name: str = "grads", label: str | None = None) -> None:
        """Compares gradients by their published names. Those of tensors that the importer leaves out are zero."""
        theirs = self.expected[name] if label is None else self.expected[label][name]
        # A gradient that is zero but for rounding, as of a bias before a softmax, is no measure of itself.
        share = 1e-4 if self.dtype == torch.float64 else 1e-3
        least = share * max((gradient.abs().max().item() for _, gradient in theirs.items()), default=0.0)
        for key, published in theirs.items():
            if key in found:
                ours = found[key]
            elif key in self.left_out:
                ours = torch.zeros_like(published)
            else:
                self.fixture.faults.append(f"no parameter for the published gradient of {key}")
                continue
            place = f"{name}:{key}" if label is None else f"{label}: {name}:{key}"
            self.close(place, ours, published, least=least)
