"""VAR: the transformer over scales, as published."""

from collections.abc import Mapping
from typing import Any

from lexel.convert.family import Names
from lexel.convert.generators import GeneratorLayout, family
from lexel.convert.names import count, integer
from lexel.errors import UsageError

PUBLISHED = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))  # at 256 and 512 px


def _scales(tokens: int, levels: int, options: Mapping[str, Any]) -> list[int]:
    """The sides of the scales: as the file's configuration says, or published ones with so many tokens."""
    given = options.get("patch_nums")
    known = [list(given)] if isinstance(given, list | tuple) else [list(sides) for sides in PUBLISHED]
    for sides in known:
        if len(sides) == levels and sum(side * side for side in sides) == tokens:
            return sides
    raise UsageError(
        f"the file has {levels} scales with {tokens} tokens together, and does not say which; "
        'set "transformer.scales" (--set transformer.scales=[1,2,4])'
    )


def _config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
    own = "transformer.network."
    width, dim = tensors[f"{own}word_embed.weight"].shape
    temperatures = tensors.get(f"{own}blocks.0.attn.scale_mul_1H11")  # one for each head
    heads = integer(options, "num_heads", max(1, width // 64))
    return {
        "kind": "next_scale",
        "codebook_size": tensors[f"{own}head.bias"].shape[0],
        "codebook_dim": dim,
        "scales": _scales(tensors[f"{own}pos_1LC"].shape[1], len(tensors[f"{own}lvl_embed.weight"]), options),
        "classes": len(tensors["transformer.classes.weight"]) - 1,
        "width": width,
        "layers": count(tensors, r"transformer\.network\.blocks\.(\d+)\..*"),
        "heads": heads if temperatures is None else temperatures.shape[1],
        "mlp_ratio": tensors[f"{own}blocks.0.ffn.fc1.bias"].shape[0] / width,
        "normalised": temperatures is not None,
        "norm_eps": options.get("norm_eps", 1e-6),
        "shared_modulation": f"{own}blocks.0.ada_gss" in tensors,
    }


LAYOUT = GeneratorLayout(
    "var",
    "VAR, next-scale transformers",
    ["word_embed.weight", "pos_1LC", "lvl_embed.weight", "class_emb.weight", "head_nm.ada_lin.1.weight"],
    [
        (r"class_emb\.weight", "transformer.classes.weight"),
        (
            r"((?:word_embed|pos_start|pos_1LC|lvl_embed|shared_ada_lin|blocks|head_nm|head)(?:\..*)?)",
            r"transformer.network.\1",
        ),
    ],
    _config,
    {
        r"lvl_1L|attn_bias_for_masking": "computed, not learned",
        r"blocks\.\d+\.attn\.zero_k_bias": "zero: keys have no bias",
    },
)

FAMILY = family(LAYOUT)
