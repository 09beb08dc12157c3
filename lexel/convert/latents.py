"""Diffusion, flow and masked autoregressive generators of latents as published: DiT, SiT, MAR."""

import math
from collections.abc import Mapping
from typing import Any

from lexel.convert.family import Names
from lexel.convert.generators import Entries, GeneratorLayout, family, join
from lexel.convert.names import count, integer

SD_SCALE = 0.18215  # of the latents of Stable Diffusion's autoencoder
KL16_SCALE = 0.2325  # of MAR's KL-16
HEADS = {1152: 16, 1280: 16}  # of the published widths whose heads have not 64 channels; tensors do not tell


def _heads(options: Mapping[str, Any], name: str, width: int) -> int:
    return integer(options, name, HEADS.get(width, max(1, width // 64)))


def _diffusion_config(objective: str) -> Any:
    def config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
        width, channels, patch, _ = tensors["transformer.network.x_embedder.proj.weight"].shape
        outputs = tensors["transformer.network.final_layer.linear.bias"].shape[0] // patch**2
        side = math.isqrt(tensors["transformer.network.pos_embed"].shape[1]) * patch
        hidden = tensors["transformer.network.blocks.0.mlp.fc1.bias"].shape[0]
        return {
            "kind": "flow",
            "objective": objective,
            "codebook_size": 1,
            "channels": channels,
            "scale": SD_SCALE,
            "rows": side,
            "columns": side,
            "classes": len(tensors["transformer.classes.weight"]) - 1,
            "learned_variance": outputs == 2 * channels,
            "patch": patch,
            "width": width,
            "layers": count(tensors, r"transformer\.network\.blocks\.(\d+)\..*"),
            "heads": _heads(options, "num_heads", width),
            "mlp_ratio": hidden / width,
        }

    return config


def _diffusion(family: str, title: str, objective: str) -> GeneratorLayout:
    return GeneratorLayout(
        family,
        title,
        ["x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed"],
        [
            (r"y_embedder\.embedding_table\.weight", "transformer.classes.weight"),
            (r"((?:pos_embed|x_embedder|t_embedder|blocks|final_layer).*)", r"transformer.network.\1"),
        ],
        _diffusion_config(objective),
    )


DIT = _diffusion("dit", "DiT, diffusion transformers", "diffusion")
SIT = _diffusion("sit", "SiT, scalable interpolant transformers", "flow")


def _prepare_mar(entries: Entries) -> None:
    """MAR keeps its null condition apart from the table of classes."""
    join(entries, ["class_emb.weight", "fake_latent"], "classes")


# Options of MAR by ours; tensors do not tell.
MAR_OPTIONS = {"mask_ratio_min": "mask_ratio_min", "diffusion_batch_mul": "repeats", "norm_eps": "norm_eps"}


def _mar_config(tensors: Names, options: Mapping[str, Any]) -> dict[str, Any]:
    width, token = tensors["transformer.network.z_proj.weight"].shape
    decoder_width = tensors["transformer.network.decoder_embed.bias"].shape[0]
    length = tensors["transformer.network.diffusion_pos_embed_learned"].shape[1]
    patch = integer(options, "patch_size", 1)
    side = math.isqrt(length) * patch
    hidden = tensors["transformer.network.encoder_blocks.0.mlp.fc1.bias"].shape[0]
    return {
        "kind": "continuous",
        "codebook_size": 1,
        "channels": token // patch**2,
        "patch": patch,
        "scale": KL16_SCALE,
        "rows": side,
        "columns": side,
        "classes": len(tensors["transformer.classes.weight"]) - 1,
        "width": width,
        "layers": count(tensors, r"transformer\.network\.encoder_blocks\.(\d+)\..*"),
        "heads": _heads(options, "encoder_num_heads", width),
        "decoder_width": decoder_width,
        "decoder_layers": count(tensors, r"transformer\.network\.decoder_blocks\.(\d+)\..*"),
        "decoder_heads": _heads(options, "decoder_num_heads", decoder_width),
        "mlp_ratio": hidden / width,
        "head_width": tensors["transformer.head.input_proj.bias"].shape[0],
        "head_layers": count(tensors, r"transformer\.head\.res_blocks\.(\d+)\..*"),
        **{ours: options[theirs] for theirs, ours in MAR_OPTIONS.items() if theirs in options},
        "buffer": tensors["transformer.network.encoder_pos_embed_learned"].shape[1] - length,
    }


MAR = GeneratorLayout(
    "mar",
    "MAR, masked autoregressive generators with a diffusion loss",
    ["z_proj.weight", "fake_latent", "class_emb.weight", "diffloss.net.input_proj.weight", "decoder_embed.weight"],
    [
        ("classes", "transformer.classes.weight"),
        (r"diffloss\.net\.(.*)", r"transformer.head.\1"),
        (r"((?:z_proj|encoder_|decoder_|mask_token|diffusion_pos).*)", r"transformer.network.\1"),
    ],
    _mar_config,
    prepare=_prepare_mar,
)


FAMILIES = [family(DIT), family(SIT), family(MAR)]
