"""Masked and random-order generators as published: TiTok's MaskGIT (BERT and U-ViT), MAGE, RAR.

Published files keep codes, mask, classes and null class in one table of embeddings, and BERT's queries, keys and values
apart; here the tables are cut and joined before the tensors are renamed. Heads leave no trace in the tensors of some:
where the file has no configuration, heads of 64 channels are assumed, and can be overridden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lexel.config import check
from lexel.convert.family import Conversion, Family, Names, Request
from lexel.convert.names import AVERAGES, Entry, Rule, apply_overrides, as_entries, count, rename
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig

Entries = dict[str, Entry]
PREFIX = "transformer."


def cut(entries: Entries, name: str, parts: Mapping[str, tuple[int, int]]) -> None:
    """Replaces a table by rows [begin, end) of it under other names; together they must be all of it."""
    published, table = entries.pop(name)
    for part, (begin, end) in parts.items():
        entries[part] = Entry(f"{published}[{begin}:{end}]", table[begin:end].clone())


def join(entries: Entries, names: Sequence[str], into: str) -> None:
    """Replaces tensors by one, row after row."""
    parts = [entries.pop(name) for name in names]
    entries[into] = Entry(", ".join(part.published for part in parts), torch.cat([part.tensor for part in parts]))


class GeneratorLayout(NamedTuple):
    """The layout of a family's tensors, and its options."""

    family: str
    title: str
    mark: Sequence[str]  # published names by which a file is known
    prepare: Callable[[Entries], None]
    rules: Sequence[Rule]
    left_out: Mapping[str, str]
    config: Callable[[Names, Mapping[str, Any]], dict[str, Any]]  # our tensors, the published `generator` section


def convert(request: Request, layout: GeneratorLayout) -> Conversion:
    """A generator by its layout; every tensor used or left out, every parameter found."""
    if request.weights == AVERAGES:
        raise UsageError(f"{request.source} is a generator, which has no averaged weights; leave the choice out")
    entries = as_entries(request.published.tensors)
    missing = [name for name in layout.mark if name not in entries]
    if missing:
        raise UsageError(f"{request.source} is not whole: it lacks {', '.join(missing)}")
    layout.prepare(entries)
    renamed = rename(entries, layout.rules, layout.left_out, request.source, layout.family)
    tensors = renamed.tensors
    given = request.published.config
    options = layout.config(tensors, section(given, "generator") or given)
    table = apply_overrides({"transformer": options}, request.overrides)
    config = check(table, GeneratorConfig, request.source)
    model = Generator.with_weights(config, tensors, request.source)
    return Conversion(layout.family, model, renamed.origins, renamed.left_out)


def family(layout: GeneratorLayout) -> Family:
    """The family of a layout: files that have all the names of its mark."""
    return Family(
        layout.family,
        layout.title,
        lambda names: all(name in names for name in layout.mark),
        lambda request: convert(request, layout),
    )


def unchanged(entries: Entries) -> None:
    """Leaves the tensors as the file has them."""


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The section of a configuration by that name, however deep; empty where there is none."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            inner = value if key == name else section(value, name)
            if inner:
                return inner
    return {}


def shape(tokens: int) -> dict[str, Any]:
    """Tokens on a line, as TiTok's are; a grid can be set by an override."""
    return {"grid": [tokens]}


def heads(options: Mapping[str, Any], width: int) -> int:
    """Heads of attention as the file's configuration says, or of 64 channels."""
    given = options.get("num_attention_heads", options.get("num_heads"))
    return given if isinstance(given, int) else max(1, width // 64)


# ---------------------------------------------------------------------------------------------- TiTok's MaskGIT


def _cut_vocabulary(name: str, head: str) -> Callable[[Entries], None]:
    def prepare(entries: Entries) -> None:
        rows, codes = len(entries[name].tensor), len(entries[head].tensor)
        cut(entries, name, {"tokens": (0, codes + 1), "classes": (codes + 1, rows)})

    return prepare


def _prepare_bert(entries: Entries) -> None:
    _cut_vocabulary("model.embeddings.word_embeddings.weight", "model.lm_head.weight")(entries)
    for layer in range(count(entries, r"model\.encoder\.layer\.(\d+)\..*")):
        attention = f"model.encoder.layer.{layer}.attention.self"
        for kind in ("weight", "bias"):
            names = [f"{attention}.{part}.{kind}" for part in ("query", "key", "value")]
            if all(name in entries for name in names):
                join(entries, names, f"{attention}.qkv.{kind}")


def _masked_config(network: str) -> Callable[[Names, Mapping[str, Any]], dict[str, Any]]:
    def config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
        codes, width = tensors[f"{PREFIX}head.weight"].shape
        first = count(tensors, r"transformer\.blocks\.(\d+)\..*")
        return {
            "kind": "masked",
            "network": network,
            "codebook_size": codes,
            **shape(len(tensors[f"{PREFIX}positions"]) - 1),
            "classes": len(tensors[f"{PREFIX}classes.weight"]) - 1,
            "width": width,
            "layers": first if network == "bert" else 2 * (first - 1),
            "heads": heads(options, width),
            "hidden": tensors[f"{PREFIX}blocks.0.feed_forward.fc1.weight"].shape[0],
        }

    return config


ENDS = r"\.(weight|bias)"
BERT = GeneratorLayout(
    "maskgit_bert",
    "TiTok's MaskGIT generators with a BERT",
    ["model.embeddings.word_embeddings.weight", "model.lm_head.weight"],
    _prepare_bert,
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        (r"model\.embeddings\.position_embeddings\.weight", "transformer.positions"),
        (r"model\.embeddings\.token_type_embeddings\.weight", "transformer.types.weight"),
        (rf"model\.embeddings\.LayerNorm{ENDS}", r"transformer.norm.\1"),
        (rf"model\.encoder\.layer\.(\d+)\.attention\.self\.qkv{ENDS}", r"transformer.blocks.\1.attention.qkv.\2"),
        (rf"model\.encoder\.layer\.(\d+)\.attention\.output\.dense{ENDS}", r"transformer.blocks.\1.attention.out.\2"),
        (rf"model\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm{ENDS}", r"transformer.blocks.\1.norm1.\2"),
        (rf"model\.encoder\.layer\.(\d+)\.intermediate\.dense{ENDS}", r"transformer.blocks.\1.feed_forward.fc1.\2"),
        (rf"model\.encoder\.layer\.(\d+)\.output\.dense{ENDS}", r"transformer.blocks.\1.feed_forward.fc2.\2"),
        (rf"model\.encoder\.layer\.(\d+)\.output\.LayerNorm{ENDS}", r"transformer.blocks.\1.norm2.\2"),
        (rf"model\.lm_head{ENDS}", r"transformer.head.\1"),
    ],
    {r"model\.embeddings\.(position_ids|token_type_ids)": "computed, not learned"},
    _masked_config("bert"),
)


def block_rules(published: str, ours: str) -> list[Rule]:
    """Rules for a stack of pre-norm blocks as timm names them."""
    names = {
        "norm1": "norm1",
        r"attn\.qkv": "attention.qkv",
        r"attn\.proj": "attention.out",
        "norm2": "norm2",
        r"mlp\.fc1": "feed_forward.fc1",
        r"mlp\.fc2": "feed_forward.fc2",
        "skip_linear": "skip",
    }
    return [(rf"{published}\.(\d+)\.{name}{ENDS}", rf"transformer.{ours}.\1.{our}.\2") for name, our in names.items()]


def _prepare_uvit(entries: Entries) -> None:
    _cut_vocabulary("embeddings.weight", "lm_head.weight")(entries)
    entries["pos_embed"] = entries["pos_embed"]._replace(tensor=entries["pos_embed"].tensor[0])
    middle = count(entries, r"in_blocks\.(\d+)\..*")
    for name in [name for name in entries if name.startswith("mid_block.")]:
        entries[f"in_blocks.{middle}.{name.removeprefix('mid_block.')}"] = entries.pop(name)


UVIT = GeneratorLayout(
    "maskgit_uvit",
    "TiTok's MaskGIT generators with a U-ViT",
    ["embeddings.weight", "lm_head.weight", "pos_embed", "mid_block.norm1.weight"],
    _prepare_uvit,
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        ("pos_embed", "transformer.positions"),
        *block_rules("in_blocks", "blocks"),
        *block_rules("out_blocks", "out_blocks"),
        (rf"norm{ENDS}", r"transformer.norm.\1"),
        (rf"lm_head{ENDS}", r"transformer.head.\1"),
    ],
    {},
    _masked_config("uvit"),
)


# ---------------------------------------------------------------------------------------------- RAR


RAR_SPARE = {"pos_embed": 1024, "target_aware_pos_embed": 1024, "timesteps_embeddings": 100}
RAR_TABLES = {
    "pos_embed": {"positions": "all", "unused.positions": "rest"},
    "target_aware_pos_embed": {"unused.before": "first", "targets": "tokens", "unused.targets": "rest"},
    "timesteps_embeddings": {"steps": "all", "unused.steps": "rest"},
}


def _prepare_rar(entries: Entries) -> None:
    rows, codes = len(entries["embeddings.weight"].tensor), len(entries["lm_head.weight"].tensor)
    parts = {"tokens": (0, codes), "unused.mask": (codes, codes + 1), "classes": (codes + 1, rows)}
    cut(entries, "embeddings.weight", parts)
    for name, tables in RAR_TABLES.items():
        entry = entries[name]
        entries[name] = entry._replace(tensor=entry.tensor[0])
        tokens = len(entry.tensor[0]) - RAR_SPARE[name]  # the published tables have rows to spare
        sizes = {"first": 2, "tokens": tokens, "all": tokens + 2}
        begin, parts = 0, {}
        for part, size in tables.items():
            end = len(entry.tensor[0]) if size == "rest" else begin + sizes[size]
            parts[part], begin = (begin, end), end
        cut(entries, name, parts)
    entries["cls_token"] = entries["cls_token"]._replace(tensor=entries["cls_token"].tensor.flatten())


def _rar_config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
    codes, width = tensors[f"{PREFIX}head.weight"].shape
    head_dim = len(tensors[f"{PREFIX}blocks.0.query_norm.weight"])
    return {
        "kind": "random_order",
        "codebook_size": codes,
        **shape(len(tensors[f"{PREFIX}targets"])),
        "classes": len(tensors[f"{PREFIX}classes.weight"]) - 1,
        "width": width,
        "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
        "heads": width // head_dim,
        "hidden": tensors[f"{PREFIX}blocks.0.feed_forward.fc1.weight"].shape[0],
    }


RAR_BLOCKS = {
    "norm1": "norm1",
    r"attn\.qkv": "qkv",
    r"attn\.q_norm": "query_norm",
    r"attn\.k_norm": "key_norm",
    r"attn\.proj": "out",
    "norm2": "norm2",
    r"mlp\.fc1": "feed_forward.fc1",
    r"mlp\.fc2": "feed_forward.fc2",
    r"adaLN_modulation\.1": "modulation",
}
RAR = GeneratorLayout(
    "rar",
    "RAR generators",
    ["embeddings.weight", "lm_head.weight", "cls_token", "target_aware_pos_embed", "timesteps_embeddings"],
    _prepare_rar,
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        ("cls_token", "transformer.first"),
        ("(positions|targets|steps)", r"transformer.\1"),
        *((rf"blocks\.(\d+)\.{name}{ENDS}", rf"transformer.blocks.\1.{our}.\2") for name, our in RAR_BLOCKS.items()),
        (rf"adaln_before_head\.adaLN_modulation\.1{ENDS}", r"transformer.modulation.\1"),
        (rf"lm_head{ENDS}", r"transformer.head.\1"),
    ],
    {r"unused\..*": "rows that no position or token reaches", "attn_mask": "computed, not learned"},
    _rar_config,
)


FAMILIES = [family(BERT), family(UVIT), family(RAR)]
