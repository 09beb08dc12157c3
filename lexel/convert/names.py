"""Rename tables that account for every published tensor, and options inferred from shapes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lexel.errors import UsageError, some, unknown

Rule = tuple[str, str | Callable[[re.Match[str]], str]]  # a whole published name, and ours (a template or a function)
AVERAGED = "model_ema."  # the prefix of averaged weights, whose names have lost their dots
LIVE, AVERAGES = "live", "averaged"


class Entry(NamedTuple):
    """A tensor and the published name it stands under."""

    published: str
    tensor: Tensor


@dataclass(frozen=True)
class Renamed:
    """Tensors under our names, where each came from, and what was left out: together all of a file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)  # our name: the published one
    left_out: dict[str, str] = field(default_factory=dict)  # the published name: the reason


def rename(
    entries: Mapping[str, Entry], rules: Sequence[Rule], left_out: Mapping[str, str], source: str, family: str
) -> Renamed:
    """Gives every tensor our name by the first rule that matches its whole name, or the reason why it is left out.

    Half-precision tensors become float32: indices are decided in float32, so weights must not be shorter.

    Args:
        entries: tensors by the name that the rules know.
        rules: patterns of whole names, and our names.
        left_out: patterns of whole names, and reasons; they come before the rules.
        source: for errors.
        family: for errors.

    Raises:
        UsageError: no rule knows a tensor, or two tensors get the same name.
    """
    renamed, unknown = Renamed(), []
    for name, (published, tensor) in entries.items():
        reason = next((reason for pattern, reason in left_out.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            renamed.left_out[published] = reason
            continue
        ours = _apply(rules, name)
        if ours is None:
            unknown.append(published)
            continue
        if ours in renamed.origins:
            raise UsageError(f"{source} has two tensors for {ours}: {renamed.origins[ours]} and {published}")
        renamed.tensors[ours] = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
        renamed.origins[ours] = published
    if unknown:
        raise UsageError(f"{source} has tensors that the family {family!r} does not know: {some(sorted(unknown))}")
    return renamed


def _apply(rules: Sequence[Rule], name: str) -> str | None:
    for pattern, template in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(template) if isinstance(template, str) else template(match)
    return None


def as_entries(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Entry]:
    """The tensors whose names begin with `prefix`, by the rest of the name."""
    return {
        name.removeprefix(prefix): Entry(name, tensor) for name, tensor in tensors.items() if name.startswith(prefix)
    }


class Picked(NamedTuple):
    """Live or averaged weights under their live names."""

    entries: dict[str, Entry]
    left_out: dict[str, str]
    weights: str  # "live" or "averaged"


def pick_weights(tensors: Mapping[str, Tensor], weights: str | None, untrained: Iterable[str], source: str) -> Picked:
    """Chooses between live weights and the averages beside them.

    Averages stand under the live names with the dots removed, and are found by removing the dots from the live names,
    never by guessing where dots were. Without `weights` they are used where there are any, as the published
    evaluations do.

    Args:
        tensors: by published names.
        weights: "live", "average" (or "averaged") or None.
        untrained: patterns of live names that have no average: buffers, and what is not trained.
        source: for errors.

    Raises:
        UsageError: the averages are asked for and absent, or do not fit the live names one to one.
    """
    if weights == "average":  # as of a run
        weights = AVERAGES
    if weights not in (None, LIVE, AVERAGES):
        raise unknown("weights", weights, ("average", LIVE))
    live = {name: Entry(name, tensor) for name, tensor in tensors.items() if not name.startswith(AVERAGED)}
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith(AVERAGED)}
    if not averages:
        if weights == AVERAGES:
            raise UsageError(f"{source} holds no averaged weights; use the live ones")
        return Picked(live, {}, LIVE)
    if weights == LIVE:
        return Picked(live, dict.fromkeys(averages, "an averaged weight; the live ones were asked for"), LIVE)

    left_out = {}
    for name in (f"{AVERAGED}decay", f"{AVERAGED}num_updates"):
        if averages.pop(name, None) is not None:
            left_out[name] = "bookkeeping of the averages"
    picked, lacking = {}, []
    for name, entry in live.items():
        shadow = AVERAGED + name.replace(".", "")
        if shadow in averages:
            picked[name] = Entry(shadow, averages.pop(shadow))
            left_out[name] = "a live weight; its average is used"
        elif any(re.fullmatch(pattern, name) for pattern in untrained):
            picked[name] = entry
        else:
            lacking.append(name)
    if lacking:
        raise UsageError(f"{source} has averaged weights, but none for {some(lacking)}; use the live ones")
    for name in [name for name in averages if name.startswith(f"{AVERAGED}loss")]:  # training parts may be cut off
        del averages[name]
        left_out[name] = "an average of the discriminator, used in training only"
    if averages:
        raise UsageError(f"{source} has averaged weights without a live tensor: {some(sorted(averages))}")
    return Picked(picked, left_out, AVERAGES)


def infer_autoencoder(tensors: Mapping[str, Tensor], source: str, kind: str = "vqgan") -> dict[str, Any]:
    """The table of an AutoencoderConfig from tensors under our names.

    Group counts leave no trace in the tensors: the published 32 is assumed and can be overridden.
    """
    needed = ["encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_out.weight"]
    levels = max(1, count(tensors, r"encoder\.levels\.(\d+)\..*"))
    needed += [f"encoder.levels.{level}.blocks.0.conv1.weight" for level in range(levels)]
    require(tensors, needed, source)
    width = tensors["encoder.conv_in.weight"].shape[0]
    widths = [tensors[name].shape[0] for name in needed[3:]]
    if any(level_width % width for level_width in widths):
        raise UsageError(f"{source} has levels of {widths} channels, which are no multiples of the first, {width}")
    attention = [level for level in range(levels) if f"encoder.levels.{level}.attentions.0.out.bias" in tensors]
    return {
        "kind": kind,
        "channels": tensors["encoder.conv_in.weight"].shape[1],
        "width": width,
        "multipliers": [level_width // width for level_width in widths],
        "residual_blocks": count(tensors, r"encoder\.levels\.0\.blocks\.(\d+)\..*"),
        "attention_levels": attention,
        "middle_attention": "encoder.middle.attention.out.bias" in tensors,
        "z_channels": tensors["encoder.conv_out.weight"].shape[0],
        "groups": 32,
    }


def require(tensors: Mapping[str, Tensor], names: Iterable[str], source: str) -> None:
    """Refuses a checkpoint that lacks tensors from which its architecture is read."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UsageError(f"{source} is not whole: it lacks what becomes {some(missing)}")


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds; 0 if it finds none."""
    numbers = [int(match[1]) for match in (re.fullmatch(pattern, name) for name in names) if match]
    return max(numbers, default=-1) + 1


def published_section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The parameters of a published part, such as "encoder"; empty where there are none."""
    for table in (options, options.get("params"), options.get("model", {})):
        inner = table.get("params", table) if isinstance(table, Mapping) else {}
        part = inner.get(name, inner.get(f"{name}config")) if isinstance(inner, Mapping) else None
        if isinstance(part, Mapping):
            found = part.get("params", part)
            return found if isinstance(found, Mapping) else {}
    return {}


def table_at(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The table that names lead to, one within the other; empty where they lead to none."""
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def integer(options: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number that options name; `default` where they do not."""
    value = options.get(name)
    return value if isinstance(value, int) else default


def apply_overrides(table: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sets dotted options, such as "autoencoder.groups", in a nested table."""
    for name, value in overrides.items():
        *sections, option = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UsageError(f"cannot set {name}: {section} is a value, not a section")
        inner[option] = value
    return table
