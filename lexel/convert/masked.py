"""Masked and random-order generators as published: TiTok's MaskGIT (BERT and U-ViT), RAR.

Published files keep codes, mask, classes and null class in one table of embeddings, and BERT's queries, keys and values
apart; here the tables are cut and joined before the tensors are renamed. Heads leave no trace in the tensors of some:
where the file has no configuration, heads of 64 channels are assumed, and can be overridden.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lexel.convert.family import Names
from lexel.convert.generators import ENDS, Entries, GeneratorLayout, change, cut, family, join, stack_rules
from lexel.convert.names import count, integer

PREFIX = "transformer."


def heads(options: Mapping[str, Any], width: int) -> int:
    """Heads of attention as the file's configuration says, or of 64 channels."""
    return integer(options, "num_attention_heads", integer(options, "num_heads", max(1, width // 64)))


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


# Tokens lie on a line, as TiTok's do; a grid can be set by an override.


def _masked_config(network: str) -> Callable[[Names, Mapping[str, Any]], dict[str, Any]]:
    def config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
        codes, width = tensors[f"{PREFIX}head.weight"].shape
        first = count(tensors, r"transformer\.blocks\.(\d+)\..*")
        return {
            "kind": "masked",
            "network": network,
            "codebook_size": codes,
            "grid": [len(tensors[f"{PREFIX}positions"]) - 1],
            "classes": len(tensors[f"{PREFIX}classes.weight"]) - 1,
            "width": width,
            "layers": first if network == "bert" else 2 * (first - 1),
            "heads": heads(options, width),
            "hidden": tensors[f"{PREFIX}blocks.0.feed_forward.fc1.weight"].shape[0],
        }

    return config


BERT_LAYERS = {
    r"attention\.self\.qkv": "attention.qkv",
    r"attention\.output\.dense": "attention.out",
    r"attention\.output\.LayerNorm": "norm1",
    r"intermediate\.dense": "feed_forward.fc1",
    r"output\.dense": "feed_forward.fc2",
    r"output\.LayerNorm": "norm2",
}
BERT = GeneratorLayout(
    "maskgit_bert",
    "TiTok's MaskGIT generators with a BERT",
    ["model.embeddings.word_embeddings.weight", "model.lm_head.weight"],
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        (r"model\.embeddings\.position_embeddings\.weight", "transformer.positions"),
        (r"model\.embeddings\.token_type_embeddings\.weight", "transformer.types.weight"),
        (rf"model\.embeddings\.LayerNorm{ENDS}", r"transformer.norm.\1"),
        *stack_rules(r"model\.encoder\.layer", "blocks", BERT_LAYERS),
        (rf"model\.lm_head{ENDS}", r"transformer.head.\1"),
    ],
    _masked_config("bert"),
    {r"model\.embeddings\.(position_ids|token_type_ids)": "computed, not learned"},
    _prepare_bert,
)


TIMM_LAYERS = {  # of pre-norm blocks
    "norm1": "norm1",
    r"attn\.qkv": "attention.qkv",
    r"attn\.proj": "attention.out",
    "norm2": "norm2",
    r"mlp\.fc1": "feed_forward.fc1",
    r"mlp\.fc2": "feed_forward.fc2",
    "skip_linear": "skip",
}


def _prepare_uvit(entries: Entries) -> None:
    _cut_vocabulary("embeddings.weight", "lm_head.weight")(entries)
    change(entries, "pos_embed", lambda tensor: tensor[0])
    middle = count(entries, r"in_blocks\.(\d+)\..*")
    for name in [name for name in entries if name.startswith("mid_block.")]:
        entries[f"in_blocks.{middle}.{name.removeprefix('mid_block.')}"] = entries.pop(name)


UVIT = GeneratorLayout(
    "maskgit_uvit",
    "TiTok's MaskGIT generators with a U-ViT",
    ["embeddings.weight", "lm_head.weight", "pos_embed", "mid_block.norm1.weight"],
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        ("pos_embed", "transformer.positions"),
        *stack_rules("in_blocks", "blocks", TIMM_LAYERS),
        *stack_rules("out_blocks", "out_blocks", TIMM_LAYERS),
        (rf"norm{ENDS}", r"transformer.norm.\1"),
        (rf"lm_head{ENDS}", r"transformer.head.\1"),
    ],
    _masked_config("uvit"),
    prepare=_prepare_uvit,
)


# ---------------------------------------------------------------------------------------------- RAR


# Of each published table: what becomes of it, its first row that is reached, and how many at its end are to spare.
RAR_TABLES = {
    "pos_embed": ("positions", 0, 1022),
    "target_aware_pos_embed": ("targets", 2, 1022),
    "timesteps_embeddings": ("steps", 0, 98),
}


def _prepare_rar(entries: Entries) -> None:
    rows, codes = len(entries["embeddings.weight"].tensor), len(entries["lm_head.weight"].tensor)
    parts = {"tokens": (0, codes), "unused.mask": (codes, codes + 1), "classes": (codes + 1, rows)}
    cut(entries, "embeddings.weight", parts)
    for name, (ours, first, spare) in RAR_TABLES.items():
        change(entries, name, lambda tensor: tensor[0])
        end, rows = len(entries[name].tensor) - spare, len(entries[name].tensor)
        cut(entries, name, {"unused.before": (0, first), ours: (first, end), f"unused.{ours}": (end, rows)})
    change(entries, "cls_token", Tensor.flatten)


def _rar_config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
    codes, width = tensors[f"{PREFIX}head.weight"].shape
    head_dim = len(tensors[f"{PREFIX}blocks.0.query_norm.weight"])
    return {
        "kind": "random_order",
        "codebook_size": codes,
        "grid": [len(tensors[f"{PREFIX}targets"])],
        "classes": len(tensors[f"{PREFIX}classes.weight"]) - 1,
        "width": width,
        "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
        "heads": width // head_dim,
        "hidden": tensors[f"{PREFIX}blocks.0.feed_forward.fc1.weight"].shape[0],
    }


RAR_LAYERS = {
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
    [
        ("tokens", "transformer.tokens.weight"),
        ("classes", "transformer.classes.weight"),
        ("cls_token", "transformer.first"),
        ("(positions|targets|steps)", r"transformer.\1"),
        *stack_rules("blocks", "blocks", RAR_LAYERS),
        (rf"adaln_before_head\.adaLN_modulation\.1{ENDS}", r"transformer.modulation.\1"),
        (rf"lm_head{ENDS}", r"transformer.head.\1"),
    ],
    _rar_config,
    {r"unused\..*": "rows that no position or token reaches", "attn_mask": "computed, not learned"},
    _prepare_rar,
)


FAMILIES = [family(BERT), family(UVIT), family(RAR)]
