"""Published generators by their layouts, with the tokenizers that files bring along."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel.config import check
from lexel.convert.family import Conversion, Family, Layout, Names, Request, build_tokenizer
from lexel.convert.names import AVERAGES, Entry, Rule, apply_overrides, as_entries, rename, require
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig

Entries = dict[str, Entry]
INSIDE = "tokenizer."  # begins options of the tokenizer inside
ENDS = r"\.(weight|bias)"


class Inside(NamedTuple):
    """The tokenizer in a generator's file."""

    prefix: str  # of its tensors' names
    layout: Layout
    respelled: Mapping[str, str] = {}  # parts of its names that its own files spell otherwise


class GeneratorLayout(NamedTuple):
    """The layout of a published generator's tensors, and its options."""

    family: str
    title: str
    mark: Sequence[str]  # published names by which a file is known
    rules: Sequence[Rule]
    config: Callable[[Names, Mapping[str, Any]], dict[str, Any]]  # our tensors, the published options: the network's
    left_out: Mapping[str, str] = {}  # patterns of published names: reasons
    prepare: Callable[[Entries], None] | None = None  # cuts and joins tensors before they are renamed
    needed: Sequence[str] = ()  # our tensors that `config` looks at, beside what follows from the mark
    prefix: str = ""  # that names may have in front of them
    tokenizer: Inside | None = None


def convert(request: Request, layout: GeneratorLayout) -> Conversion:
    """A generator by its layout, and its tokenizer where the file has one; every tensor used or left out."""
    source, published, inside = request.source, request.published.tensors, layout.tokenizer
    if request.weights == AVERAGES:
        raise UsageError(f"{source} is a generator, which has no averaged weights; leave the choice out")
    entries = {
        name.removeprefix(layout.prefix): entry
        for name, entry in as_entries(published).items()
        if inside is None or not name.startswith(inside.prefix)
    }
    missing = [name for name in layout.mark if name not in entries]
    if missing:
        raise UsageError(f"{source} is not whole: it lacks {', '.join(missing)}")
    if layout.prepare is not None:
        layout.prepare(entries)
    renamed = rename(entries, layout.rules, layout.left_out, source, layout.family)
    require(renamed.tensors, layout.needed, source)
    given = request.published.config
    options = layout.config(renamed.tensors, section(given, "generator") or given)
    own = {name: value for name, value in request.overrides.items() if inside is None or not name.startswith(INSIDE)}
    config = check(apply_overrides({"transformer": options}, own), GeneratorConfig, source)
    model = Generator.with_weights(config, renamed.tensors, source)
    conversion = Conversion(layout.family, model, renamed.origins, renamed.left_out)
    return conversion if inside is None else _with_tokenizer(conversion, model, inside, request)


def _with_tokenizer(conversion: Conversion, generator: Generator, inside: Inside, request: Request) -> Conversion:
    """The conversion with the tokenizer that the file holds, attached to the generator; unchanged if it holds none."""
    entries: Entries = {}
    for name, entry in as_entries(request.published.tensors, inside.prefix).items():
        for theirs, ours in inside.respelled.items():
            name = name.replace(theirs, ours)
        entries[name] = entry
    if not entries:
        return conversion
    own = {name.removeprefix(INSIDE): value for name, value in request.overrides.items() if name.startswith(INSIDE)}
    tokenizer, renamed = build_tokenizer(entries, inside.layout, request._replace(overrides=own))
    tokenizer.provenance = {"source": request.published.name, "family": inside.layout.family}
    generator.attach(tokenizer)
    origins = {f"tokenizer.{name}": origin for name, origin in renamed.origins.items()}
    return conversion._replace(
        origins=conversion.origins | origins, left_out=conversion.left_out | renamed.left_out, tokenizer=tokenizer
    )


def family(layout: GeneratorLayout) -> Family:
    """The family of a layout: files that have all the names of its mark."""
    return Family(
        layout.family,
        layout.title,
        lambda names: all(name in names or layout.prefix + name in names for name in layout.mark),
        lambda request: convert(request, layout),
    )


# What layouts are written with.


def stack_rules(published: str, ours: str, layers: Mapping[str, str]) -> list[Rule]:
    """Rules for a stack of numbered blocks, from patterns of a block's published layers to ours."""
    return [
        (rf"{published}\.(\d+)\.{layer}{ENDS}", rf"transformer.{ours}.\1.{our_layer}.\2")
        for layer, our_layer in layers.items()
    ]


def cut(entries: Entries, name: str, parts: Mapping[str, tuple[int, int]]) -> None:
    """Replaces a table by rows [begin, end) of it under other names; together they must be all of it."""
    published, table = entries.pop(name)
    for part, (begin, end) in parts.items():
        if begin < end:
            entries[part] = Entry(f"{published}[{begin}:{end}]", table[begin:end].clone())


def join(entries: Entries, names: Sequence[str], into: str) -> None:
    """Replaces tensors by one, row after row."""
    parts = [entries.pop(name) for name in names]
    entries[into] = Entry(", ".join(part.published for part in parts), torch.cat([part.tensor for part in parts]))


def change(entries: Entries, name: str, into: Callable[[Tensor], Tensor]) -> None:
    """Replaces a tensor by what a function makes of it."""
    entries[name] = entries[name]._replace(tensor=into(entries[name].tensor))


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The section of a configuration by that name, however deep; empty where there is none."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            inner = value if key == name else section(value, name)
            if inner:
                return inner
    return {}
