"""Generators: IBQ's and Open-MAGVIT2's (SEED-Voken), whose files bring their tokenizer along, and LlamaGen's.

Heads and the shape of the grid leave no trace in the tensors: heads of 64 channels (LlamaGen's 3B: 100) and a square of
16 x 16 tokens are assumed where the file has no configuration, and can be overridden.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lexel.config import check
from lexel.convert import ibq, open_magvit2
from lexel.convert.family import Conversion, Family, Layout, Names, Request, with_tokenizer
from lexel.convert.names import AVERAGES, Entry, Renamed, Rule, apply_overrides, as_entries, count, rename, require
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig

TOKENIZER = "first_stage_model."
PREFIX = "transformer."
LAYERS = {
    r"attention\.wqkv": "attention.qkv",
    r"attention\.wo": "attention.out",
    r"feed_forward\.w1": "feed_forward.gate",
    r"feed_forward\.w3": "feed_forward.up",
    r"feed_forward\.w2": "feed_forward.down",
    "attention_norm": "attention_norm",
    "ffn_norm": "feed_forward_norm",
}
LEFT_OUT = {
    r".*\.(k_cache|v_cache)": "a cache of sampling",
    r"(.*\.)?(freqs_cis|causal_mask)": "computed, not learned",
}


def block_rules(published: str, ours: str) -> list[Rule]:
    """Rules for a stack of Llama blocks."""
    return [
        (rf"{published}\.(\d+)\.{name}\.weight", rf"transformer.{ours}.\1.{our_name}.weight")
        for name, our_name in LAYERS.items()
    ]


CLASSES: Rule = (r"class_emb\.embedding_table\.weight", "transformer.classes.weight")
IBQ_RULES = [
    CLASSES,
    (r"tok_emb\.weight", "transformer.tokens.weight"),
    *block_rules("blocks", "blocks"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(weight|bias)", r"transformer.blocks.\1.modulation.\2"),
    (r"head_nm\.rmsnorm\.weight", "transformer.norm.weight"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"transformer.modulation.\1"),
    (r"head\.weight", "transformer.head.weight"),
]
OPEN_MAGVIT2_RULES = [
    CLASSES,
    (r"pre_emb\.weight", "transformer.tokens.0.weight"),
    (r"post_emb\.weight", "transformer.tokens.1.weight"),
    *block_rules("spatial_blocks", "blocks"),
    *block_rules("factorized_blocks", "pair_blocks"),
    (r"norm\.weight", "transformer.norm.weight"),
    (r"head\.([01])\.weight", r"transformer.heads.\1.weight"),
]
LLAMAGEN_RULES = [
    (r"cls_embedding\.embedding_table\.weight", "transformer.classes.weight"),
    (r"tok_embeddings\.weight", "transformer.tokens.weight"),
    *block_rules("layers", "blocks"),
    (r"norm\.weight", "transformer.norm.weight"),
    (r"output\.weight", "transformer.head.weight"),
]


def ibq_config(tensors: Names) -> dict[str, Any]:
    return {"head": "plain", "codebook_size": tensors["transformer.tokens.weight"].shape[0]}


def open_magvit2_config(tensors: Names) -> dict[str, Any]:
    factors = [tensors[f"transformer.tokens.{part}.weight"].shape[0] for part in (0, 1)]
    return {
        "head": "factorised",
        "codebook_size": math.prod(factors),
        "factors": factors,
        "pair_layers": count(tensors, r"transformer\.pair_blocks\.(\d+)\..*"),
    }


def llamagen_config(tensors: Names) -> dict[str, Any]:
    return {**ibq_config(tensors), "modulated": False}


class GeneratorLayout(NamedTuple):
    """The layout of a published generator's tensors."""

    family: str
    needed: Sequence[str]  # our tensors that the configuration is read from
    rules: Sequence[Rule]
    config: Callable[[Names], dict[str, Any]]
    tokenizer: Layout | None  # of the tokenizer inside


NEEDED = ("transformer.classes.weight", "transformer.tokens.weight")
IBQ = GeneratorLayout("ibq_generator", NEEDED, IBQ_RULES, ibq_config, ibq.LAYOUT)
OPEN_MAGVIT2 = GeneratorLayout(
    "open_magvit2_generator",
    (NEEDED[0], "transformer.tokens.0.weight", "transformer.tokens.1.weight"),
    OPEN_MAGVIT2_RULES,
    open_magvit2_config,
    open_magvit2.LAYOUT,
)
LLAMAGEN = GeneratorLayout("llamagen_generator", NEEDED, LLAMAGEN_RULES, llamagen_config, None)


def convert(request: Request, layout: GeneratorLayout) -> Conversion:
    """A generator, and its tokenizer where the file has one; options of that one begin with "tokenizer."."""
    tensors = request.published.tensors
    if request.weights == AVERAGES:
        raise UsageError(f"{request.source} is a generator, which has no averaged weights; leave the choice out")
    own = {name.removeprefix(PREFIX): Entry(name, tensor) for name, tensor in _outside(tensors).items()}
    renamed = rename(own, layout.rules, LEFT_OUT, request.source, layout.family)
    options = {name: value for name, value in request.overrides.items() if not name.startswith("tokenizer.")}
    generator = build_generator(renamed, layout, request, options)
    conversion = Conversion(layout.family, generator, renamed.origins, renamed.left_out)
    if layout.tokenizer is None:
        return conversion
    return with_tokenizer(conversion, as_entries(tensors, TOKENIZER), layout.tokenizer, request)


def _outside(tensors: Names) -> dict[str, Tensor]:
    """The tensors that are not the tokenizer's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(TOKENIZER)}


def build_generator(
    renamed: Renamed, layout: GeneratorLayout, request: Request, options: Mapping[str, Any]
) -> Generator:
    tensors = renamed.tensors
    require(tensors, layout.needed, request.source)
    classes, width = tensors["transformer.classes.weight"].shape
    given = request.published.config
    side = math.isqrt(_given(given, "block_size", 256))
    table: dict[str, Any] = {
        "transformer": {
            "width": width,
            "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
            "heads": _given(given, "n_head", max(1, width // (100 if width == 3200 else 64))),
            "classes": classes - 1,  # the last row is the null class
            "rows": side,
            "columns": side,
            **layout.config(tensors),
        }
    }
    config = check(apply_overrides(table, options), GeneratorConfig, request.source)
    return Generator.with_weights(config, tensors, request.source)


def _given(config: Mapping[str, Any], name: str, default: int) -> int:
    """A number that a configuration gives, however deep; `default` where it does not."""
    if isinstance(config.get(name), int):
        return config[name]
    inner = (_given(value, name, -1) for value in config.values() if isinstance(value, Mapping))
    return next((number for number in inner if number >= 0), default)


def _family(title: str, layout: GeneratorLayout, mark: str) -> Family:
    return Family(
        layout.family,
        title,
        lambda names: mark in names or PREFIX + mark in names,
        lambda request: convert(request, layout),
    )


FAMILIES = [
    _family("IBQ generators (SEED-Voken)", IBQ, "tok_emb.weight"),
    _family("Open-MAGVIT2 generators (SEED-Voken)", OPEN_MAGVIT2, "pre_emb.weight"),
    _family("LlamaGen generators", LLAMAGEN, "cls_embedding.embedding_table.weight"),
]
