"""The residual quantizer of RQ-VAE: EMA codebooks, one shared by all depths or one each."""

from collections.abc import Iterator
from contextlib import contextmanager
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
                "decay": config["decay"] if isinstance(config["decay"], float) else 0.99,
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
        if isinstance(config["decay"], list):
            level.decay = config["decay"][q]
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


def number(name: str, before: str) -> float:
    """The number at the end of a name: 0.5 in `soft_codes_temp0p5`."""
    return float(name.removeprefix(before).replace("p", "."))


@contextmanager
def published_restarts(run: Run, quantizer: Residual) -> Iterator[None]:
    """Dead codes take the recorded vectors of the batch, tiled with the recorded noise where there are too few."""
    draws, depth = list(run.content["random_draws"]), -1
    each = len(draws) // quantizer.books

    def begins(*_: object) -> None:
        nonlocal depth
        depth += 1

    def drawn(vectors: Tensor, count: int, generator: object) -> Tensor:
        *noise, order = draws[depth * each : (depth + 1) * each]
        if noise:
            tiled = vectors.repeat(len(noise[0]) // len(vectors), 1)
            vectors = tiled + run.cast(noise[0]) * 0.01 / tiled.shape[1] ** 0.5
        counts = quantizer[depth].counts
        return vectors[order[: len(counts)]][counts < 1]

    hooks = [level.register_forward_pre_hook(begins) for level in quantizer.levels]
    with patch.object(living, "pick_rows", drawn):
        yield
    for hook in hooks:
        hook.remove()


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
    for name in run.expected:
        if name.startswith("soft_codes_temp"):
            run.close(name, quantizer.soft_targets(z.detach(), number(name, "soft_codes_temp")).movedim(1, -2))
    parts = [level.indices_to_codes(part) for level, part in zip(quantizer, indices.unbind(1), strict=True)]
    for theirs, total in zip(run.expected["cumulative_quants"], torch.stack(parts).cumsum(0), strict=True):
        run.close("cumulative_quants", total.movedim(1, -1), theirs)
    run.close("embed_code", unfold(quantizer.indices_to_codes(indices), x))
    by_depth = torch.stack([part.movedim(1, -1) for part in parts], -2)
    run.close("embed_code_with_depth", by_depth)
    for name in run.expected:
        if name.startswith("embed_partial_select"):
            run.close(name, unfold(parts[int(number(name, "embed_partial_select"))], x))
        if name.startswith("embed_partial_add"):
            run.close(name, unfold(sum(parts[: int(number(name, "embed_partial_add")) + 1], torch.zeros(())), x))

    quantizer = published(config, run.content["state_dict"], run.dtype).train()
    step = run.expected["train_step"]
    with published_restarts(run, quantizer):
        z_q, indices, losses = quantizer(fold(x.detach(), config))
    run.close("train_step z_q", unfold(z_q, x), step["z_q"])
    run.close("train_step commitment_loss", losses["commitment"], step["commitment_loss"])
    run.same("train_step codes", indices.movedim(1, -1), step["codes"])
    for q, level in enumerate(quantizer):  # a shared book stands once for every depth
        after = step["state_after"]
        run.close("weight after", level.weight, after[f"codebooks.{q}.weight"][:-1])
        run.close("counts after", level.counts, after[f"codebooks.{q}.cluster_size_ema"])
        run.close("sums after", level.sums, after[f"codebooks.{q}.embed_ema"])
