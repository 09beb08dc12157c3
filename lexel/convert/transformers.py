"""Generators: IBQ's and Open-MAGVIT2's (SEED-Voken), whose files bring their tokenizer along, and LlamaGen's.

Heads and the shape of the grid leave no trace in the tensors: heads of 64 channels (LlamaGen's 3B: 100) and a square of
16 x 16 tokens are assumed where the file has no configuration, and can be overridden.
"""

import math
from collections.abc import Mapping
from typing import Any

from lexel.convert import ibq, open_magvit2
from lexel.convert.family import Names
from lexel.convert.generators import GeneratorLayout, Inside, family, stack_rules
from lexel.convert.names import Rule, count

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
    r"ada_lin\.1": "modulation",
}
LEFT_OUT = {
    r".*\.(k_cache|v_cache)": "a cache of sampling",
    r"(.*\.)?(freqs_cis|causal_mask)": "computed, not learned",
}


CLASSES: Rule = (r"class_emb\.embedding_table\.weight", "transformer.classes.weight")
IBQ_RULES = [
    CLASSES,
    (r"tok_emb\.weight", "transformer.tokens.weight"),
    *stack_rules("blocks", "blocks", LAYERS),
    (r"head_nm\.rmsnorm\.weight", "transformer.norm.weight"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"transformer.modulation.\1"),
    (r"head\.weight", "transformer.head.weight"),
]
OPEN_MAGVIT2_RULES = [
    CLASSES,
    (r"pre_emb\.weight", "transformer.tokens.0.weight"),
    (r"post_emb\.weight", "transformer.tokens.1.weight"),
    *stack_rules("spatial_blocks", "blocks", LAYERS),
    *stack_rules("factorized_blocks", "pair_blocks", LAYERS),
    (r"norm\.weight", "transformer.norm.weight"),
    (r"head\.([01])\.weight", r"transformer.heads.\1.weight"),
]
LLAMAGEN_RULES = [
    (r"cls_embedding\.embedding_table\.weight", "transformer.classes.weight"),
    (r"tok_embeddings\.weight", "transformer.tokens.weight"),
    *stack_rules("layers", "blocks", LAYERS),
    (r"norm\.weight", "transformer.norm.weight"),
    (r"output\.weight", "transformer.head.weight"),
]


def shared_config(tensors: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that all three families have."""
    classes, width = tensors["transformer.classes.weight"].shape
    side = math.isqrt(_given(given, "block_size", 256))
    return {
        "width": width,
        "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
        "heads": _given(given, "n_head", max(1, width // (100 if width == 3200 else 64))),
        "classes": classes - 1,  # the last row is the null class
        "rows": side,
        "columns": side,
    }


def ibq_config(tensors: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    codes = tensors["transformer.tokens.weight"].shape[0]
    return {**shared_config(tensors, given), "head": "plain", "codebook_size": codes}


def open_magvit2_config(tensors: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    factors = [tensors[f"transformer.tokens.{part}.weight"].shape[0] for part in (0, 1)]
    return {
        **shared_config(tensors, given),
        "head": "factorised",
        "codebook_size": math.prod(factors),
        "factors": factors,
        "pair_layers": count(tensors, r"transformer\.pair_blocks\.(\d+)\..*"),
    }


def llamagen_config(tensors: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**ibq_config(tensors, given), "modulated": False}


def _given(config: Mapping[str, Any], name: str, default: int) -> int:
    """A number that a configuration gives, however deep; `default` where it does not."""
    if isinstance(config.get(name), int):
        return config[name]
    inner = (_given(value, name, -1) for value in config.values() if isinstance(value, Mapping))
    return next((number for number in inner if number >= 0), default)


CLASS_TABLE, TOKENS = "transformer.classes.weight", "transformer.tokens.weight"
IBQ = GeneratorLayout(
    "ibq_generator",
    "IBQ generators (SEED-Voken)",
    ["tok_emb.weight"],
    IBQ_RULES,
    ibq_config,
    LEFT_OUT,
    needed=[CLASS_TABLE, TOKENS],
    prefix=PREFIX,
    tokenizer=Inside(TOKENIZER, ibq.LAYOUT),
)
OPEN_MAGVIT2 = IBQ._replace(
    family="open_magvit2_generator",
    title="Open-MAGVIT2 generators (SEED-Voken)",
    mark=["pre_emb.weight"],
    rules=OPEN_MAGVIT2_RULES,
    config=open_magvit2_config,
    needed=[CLASS_TABLE, "transformer.tokens.0.weight", "transformer.tokens.1.weight"],
    tokenizer=Inside(TOKENIZER, open_magvit2.LAYOUT),
)
LLAMAGEN = IBQ._replace(
    family="llamagen_generator",
    title="LlamaGen generators",
    mark=["cls_embedding.embedding_table.weight"],
    rules=LLAMAGEN_RULES,
    config=llamagen_config,
    tokenizer=None,
)
FAMILIES = [family(IBQ), family(OPEN_MAGVIT2), family(LLAMAGEN)]
