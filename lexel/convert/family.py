"""Families of published checkpoints: how one is recognised and converted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lexel.config import check
from lexel.convert.files import Published
from lexel.convert.names import Entry, Renamed, Rule, apply_overrides, pick_weights, rename, require
from lexel.generators import Generator
from lexel.tokenizer import Tokenizer, TokenizerConfig

Names = Mapping[str, Tensor]


class Request(NamedTuple):
    """A published checkpoint and what the user wants of it."""

    published: Published
    weights: str | None  # "live", "averaged", or None for the averages where there are any
    overrides: Mapping[str, Any]  # options of the configuration that shapes do not tell, by dotted names

    @property
    def source(self) -> str:
        return self.published.source


class Conversion(NamedTuple):
    """The result of a conversion. `origins` and `left_out` account for every tensor of the checkpoint."""

    family: str
    model: Tokenizer | Generator
    origins: dict[str, str]  # our tensor: the published one
    left_out: dict[str, str]  # the published tensor: the reason
    weights: str = "live"  # or "averaged"
    tokenizer: Tokenizer | None = None  # what a generator's file brings along


@dataclass(frozen=True)
class Family:
    """One published layout.

    `fits` looks at names and shapes and must be true of every file of the family; it may be true of others' files
    too, which are then refused until the user names the family.
    """

    name: str
    title: str
    fits: Callable[[Names], bool]
    convert: Callable[[Request], Conversion]


class Layout(NamedTuple):
    """The layout of a published tokenizer's tensors."""

    family: str
    rules: Callable[[Names], Sequence[Rule]]  # for the names of a file
    left_out: Mapping[str, str]  # patterns of published names: reasons
    untrained: Sequence[str]  # patterns of names that have no averaged weight
    needed: Sequence[str]  # our tensors that `config` looks at, beside the autoencoder's
    config: Callable[[Names, str], dict[str, Any]]  # our tensors, the source: the table of a TokenizerConfig


def convert_tokenizer(
    request: Request, layout: Layout, tensors: Names | None = None, made: Names | None = None
) -> Conversion:
    """A tokenizer by its layout's table; every tensor used or left out, every parameter found.

    Args:
        request: the file.
        layout: of its tensors.
        tensors: the published ones in the form that the layout has, where the file has another.
        made: what the file does not tell, under published names; no origin of ours.
    """
    tensors, made = request.published.tensors if tensors is None else tensors, made or {}
    picked = pick_weights({**tensors, **made}, request.weights, layout.untrained, request.source)
    model, renamed = build_tokenizer(picked.entries, layout, request)
    return Conversion(
        layout.family,
        model,
        {ours: theirs for ours, theirs in renamed.origins.items() if theirs not in made},
        {**picked.left_out, **renamed.left_out},
        picked.weights,
    )


def build_tokenizer(entries: Mapping[str, Entry], layout: Layout, request: Request) -> tuple[Tokenizer, Renamed]:
    """The tokenizer of tensors under the names that a layout knows, and how they were renamed."""
    names = {name: entry.tensor for name, entry in entries.items()}
    renamed = rename(entries, layout.rules(names), layout.left_out, request.source, layout.family)
    require(renamed.tensors, layout.needed, request.source)
    table = apply_overrides(layout.config(renamed.tensors, request.source), request.overrides)
    config = check(table, TokenizerConfig, request.source)
    return Tokenizer.with_weights(config, renamed.tensors, request.source), renamed
