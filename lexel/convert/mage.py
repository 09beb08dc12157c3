"""MAGE (https://arxiv.org/abs/2211.09117), whose file brings MaskGIT's tokenizer along."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lexel.convert import maskgit_vqgan
from lexel.convert.family import Names
from lexel.convert.generators import ENDS, Entries, GeneratorLayout, Inside, change, cut, family, join, stack_rules
from lexel.convert.masked import TIMM_LAYERS, heads
from lexel.convert.names import Rule, count

POSITIONS = "token_emb.position_embeddings.weight"
WORDS = "token_emb.word_embeddings.weight"
LABELS = 1000  # numbers between the codes and the mask, of which one is used
LABEL = 76  # which of them stands first in every image
RULES: list[Rule] = [
    ("tokens", "transformer.tokens.weight"),
    ("label", "transformer.start.weight"),
    ("positions", "transformer.positions"),
    (rf"token_emb\.LayerNorm{ENDS}", r"transformer.embedding_norm.\1"),
    *stack_rules("blocks", "blocks", TIMM_LAYERS),
    *stack_rules("decoder_blocks", "decoder_blocks", TIMM_LAYERS),
    (rf"norm{ENDS}", r"transformer.norm.\1"),
    (rf"decoder_embed{ENDS}", r"transformer.to_decoder.\1"),
    ("decoder_pos_embed_learned", "transformer.decoder_positions"),
    (rf"decoder_norm{ENDS}", r"transformer.decoder_norm.\1"),
    (rf"mlm_layer\.fc{ENDS}", r"transformer.to_vectors.\1"),
    (rf"mlm_layer\.ln{ENDS}", r"transformer.vector_norm.\1"),
    ("bias", "transformer.bias"),
]
LEFT_OUT = {
    r"unused\..*": "rows that no position or token reaches",
    r"(token_emb\.)?position_ids": "computed, not learned",
    r"cls_token|mask_token|pos_embed|decoder_pos_embed|(patch_embed\.proj|decoder_pred)\..*": "not used by the network",
}


def _config(tensors: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    width, narrow = tensors["transformer.tokens.weight"].shape[1], tensors["transformer.decoder_positions"].shape[1]
    tokens = len(tensors["transformer.decoder_positions"]) - 1
    side = round(tokens**0.5)
    return {
        "kind": "masked",
        "network": "mage",
        "condition": {"kind": "none"},
        "codebook_size": len(tensors["transformer.bias"]),
        **({"rows": side, "columns": side} if side * side == tokens else {"grid": [tokens]}),
        "width": width,
        "layers": count(tensors, r"transformer\.blocks\.(\d+)\..*"),
        "heads": heads(given, width),
        "hidden": tensors["transformer.blocks.0.feed_forward.fc1.weight"].shape[0],
        "decoder_width": narrow,
        "decoder_layers": count(tensors, r"transformer\.decoder_blocks\.(\d+)\..*"),
        "decoder_heads": given.get("decoder_num_heads", 16),
        "dropped": given.get("mask_ratio_min", 0.5),
        "norm_eps": given.get("norm_eps", 1e-6),
        "decoder_hidden": tensors["transformer.decoder_blocks.0.feed_forward.fc1.weight"].shape[0],
    }


def _prepare(entries: Entries) -> None:
    """Cuts the tables that hold more than the network reaches."""
    rows = len(entries[WORDS].tensor)
    codes = rows - LABELS - 1
    edges = [0, codes, codes + LABEL, codes + LABEL + 1, rows - 1, rows]
    names = ["codes", "unused.before", "label", "unused.after", "mask"]
    cut(entries, WORDS, dict(zip(names, pairwise(edges), strict=True)))
    join(entries, ["codes", "mask"], "tokens")
    for name in ("decoder_pos_embed_learned", "mlm_layer.bias"):
        change(entries, name, lambda tensor: tensor.reshape(tensor.shape[1:] if tensor.shape[1] > 1 else -1))
    places, total = len(entries["decoder_pos_embed_learned"].tensor), len(entries[POSITIONS].tensor)
    cut(entries, POSITIONS, {"positions": (0, places), "unused.positions": (places, total)})
    cut(entries, "mlm_layer.bias", {"bias": (0, codes), "unused.bias": (codes, rows)})


LAYOUT = GeneratorLayout(
    "mage",
    "MAGE",
    [WORDS, POSITIONS, "decoder_pos_embed_learned", "mlm_layer.bias"],
    RULES,
    _config,
    LEFT_OUT,
    _prepare,
    tokenizer=Inside(
        "vqgan.",
        maskgit_vqgan.LAYOUT,
        {"mid.block_1.": "mid.0.", "mid.block_2.": "mid.1.", "upsample.": "upsample_"},
    ),
)
FAMILY = family(LAYOUT)
