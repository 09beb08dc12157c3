"""RQ-Transformer: the transformers over positions and depths of residual codes, as published."""

import math
from collections.abc import Mapping
from typing import Any

from lexel.convert.family import Names
from lexel.convert.generators import Entries, GeneratorLayout, family
from lexel.convert.names import count, integer, table_at

OWN = "transformer.network."


def _prepare(entries: Entries) -> None:
    """Conditions of one number are classes, longer ones are words."""
    kind = "classes" if entries["pos_emb_cond"].tensor.shape[1] == 1 else "words"
    entries[kind] = entries.pop("cond_emb.weight")


def _config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
    width = tensors[f"{OWN}pos_emb_d"].shape[2]
    positions, depths = tensors[f"{OWN}pos_emb_hw"].shape[1], tensors[f"{OWN}pos_emb_d"].shape[1]
    side = math.isqrt(positions)
    size = options.get("block_size")
    rows, columns = size[:2] if isinstance(size, list | tuple) and len(size) == 3 else (side, side)
    body, head = (table_at(options, part, "block") for part in ("body", "head"))
    own_tables = f"{OWN}tok_emb.weight" in tensors
    shared = tensors[f"{OWN}classifier.linear.weight"].dim() == 2
    if "transformer.classes.weight" in tensors:
        classes = len(tensors["transformer.classes.weight"])
        condition = {"kind": "class", "classes": classes, "null_class": False}
    else:
        length = tensors[f"{OWN}pos_emb_cond"].shape[1]
        condition = {"kind": "words", "vocabulary": len(tensors["transformer.words.weight"]), "length": length}
    config: dict[str, Any] = {
        "kind": "residual",
        "codebook_size": tensors[f"{OWN}classifier.linear.bias"].shape[-1],
        "codebook_dim": 0 if own_tables else tensors[f"{OWN}input_mlp.weight"].shape[1],
        "books": depths,
        "rows": rows,
        "columns": columns,
        "condition": condition,
        "width": width,
        "layers": count(tensors, r"transformer\.network\.body_transformer\.blocks\.(\d+)\..*"),
        "heads": integer(body, "n_head", max(1, width // 64)),
        "depth_layers": count(tensors, r"transformer\.network\.head_transformer\.blocks\.(\d+)\..*"),
        "depth_heads": integer(head, "n_head", max(1, width // 64)),
        # Every released model sums; the published default is not to, and tables are never summed.
        "cumulative": not own_tables and bool(options.get("cumsum_depth_ctx", "block_size" not in options)),
        "shared_classifier": shared,
        "sigmoid_gelu": body.get("gelu") == "v2",
        "depth_sigmoid_gelu": head.get("gelu") == "v2",
    }
    if own_tables:
        config["shared_tables"] = tensors[f"{OWN}tok_emb.weight"].shape[0] == config["codebook_size"] and depths > 1
    if "transformer.words_classifier.linear.weight" in tensors:
        config["words_weight"] = 0.1
    return config


LAYOUT = GeneratorLayout(
    "rq_transformer",
    "RQ-Transformer over residual codes",
    ["cond_emb.weight", "pos_emb_cond", "pos_emb_hw", "pos_emb_d", "classifier.linear.weight"],
    [
        ("classes", "transformer.classes.weight"),
        ("words", "transformer.words.weight"),
        (r"cond_classifier\.(.*)", r"transformer.words_classifier.\1"),
        (
            r"((?:pos_emb_cond|pos_emb_hw|pos_emb_d|tok_emb|input_mlp|head_mlp|body_transformer|head_transformer"
            r"|classifier)(?:\..*)?)",
            r"transformer.network.\1",
        ),
    ],
    _config,
    {r"tok_emb\.offsets": "computed, not learned"},
    _prepare,
)

FAMILY = family(LAYOUT)
