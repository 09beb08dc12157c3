"""The residual quantizer of RQ-VAE: EMA codebooks, one shared by all depths or one each."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lexel.quantizers import Residual, build, living
from tests.parity.fixture import Fixture, Run


def check(fixture: Fixture) -> None:
    for part in fixture.parts():
        for run in fixture.runs(part):
            compare(run)


def published(config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> Residual:
    """Our quantizer with the published options and numbers."""
    depth = config["code_shape"][-1]
    size, width = config["n_embed"], state["codebooks.0.embed_ema"].shape[1]
    quantizer = build(
        "residual",
        {
            "codebook_size": size,
            "codebook_dim": width,
            "depth": depth,
            "base": "ema",
            "shared": config["shared_codebook"],
            "base_options": {
                "decay": config["decay"],
                "order": "look_up_first",
                "restart_below": 1.0 if config["restart_unused_codes"] else 0.0,
            },
        },
    )
    assert isinstance(quantizer, Residual)
    for q, level in enumerate(quantizer.levels):
        level.weight.copy_(state[f"codebooks.{q}.weight"][:-1])  # the last row is padding
        level.counts.copy_(state[f"codebooks.{q}.cluster_size_ema"])
        level.sums.copy_(state[f"codebooks.{q}.embed_ema"])
    return quantizer.to(dtype)


def fold(x: Tensor, config: dict[str, Any]) -> Tensor:
    """Latents (B, H, W, D) as (B, rH rW D, h, w), space to depth with D last."""
    height, width, _ = config["code_shape"]
    batch, full_height, full_width, _ = x.shape
    blocks = x.view(batch, height, full_height // height, width, full_width // width, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).movedim(-1, 1)


def unfold(z: Tensor, like: Tensor) -> Tensor:
    """The way back: (B, H, W, D)."""
    rows, columns = like.shape[1] // z.shape[2], like.shape[2] // z.shape[3]
    blocks = z.movedim(1, -1).view(len(z), z.shape[2], z.shape[3], rows, columns, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(like.shape)


def compare(run: Run) -> None:
    config = run.content["config"]
    x = run["x"].requires_grad_()
    quantizer = published(config, run.content["state_dict"], run.dtype).eval()
    z = fold(x, config)
    z_q, indices, losses = quantizer(z)
    back = unfold(z_q, x)
    run.close("z_q", back)
    run.close("commitment_loss", losses["commitment"])
    run.same("codes", indices.movedim(1, -1))
    (gradient,) = torch.autograd.grad(losses["commitment"], x, retain_graph=True)
    run.close("grad_commitment_x", gradient)
    weights = torch.linspace(-1, 1, back.numel(), dtype=run.dtype).view_as(back)
    (gradient,) = torch.autograd.grad((back * weights).sum(), x)
    run.close("grad_weighted_x", gradient)
    run.close("soft_codes_temp0p5", quantizer.soft_targets(z.detach(), 0.5).movedim(1, -2))
    parts = [level.indices_to_codes(part) for level, part in zip(quantizer, indices.unbind(1), strict=True)]
    for theirs, total in zip(run.expected["cumulative_quants"], torch.stack(parts).cumsum(0), strict=True):
        run.close("cumulative_quants", total.movedim(1, -1), theirs)
    run.close("embed_code", unfold(quantizer.indices_to_codes(indices), x))
    by_depth = torch.stack([part.movedim(1, -1) for part in parts], -2)
    run.close("embed_code_with_depth", by_depth)
    run.close("embed_partial_select1", unfold(parts[1], x))
    run.close("embed_partial_add1", unfold(parts[0] + parts[1], x))

    draws = iter(run.content["random_draws"])

    def drawn(vectors: Tensor, count: int, generator: object) -> Tensor:
        return vectors[next(draws)[: len(current.counts)]][current.counts < 1]

    quantizer = published(config, run.content["state_dict"], run.dtype).train()
    current = quantizer[0]
    step = run.expected["train_step"]
    with patch.object(living, "pick_rows", drawn):
        z_q, indices, losses = quantizer(fold(x.detach(), config))
    run.close("train_step z_q", unfold(z_q, x), step["z_q"])
    run.close("train_step commitment_loss", losses["commitment"], step["commitment_loss"])
    run.same("train_step codes", indices.movedim(1, -1), step["codes"])
    for q, level in enumerate(quantizer.levels):
        after = step["state_after"]
        run.close("weight after", level.weight, after[f"codebooks.{q}.weight"][:-1])
        run.close("counts after", level.counts, after[f"codebooks.{q}.cluster_size_ema"])
        run.close("sums after", level.sums, after[f"codebooks.{q}.embed_ema"])
