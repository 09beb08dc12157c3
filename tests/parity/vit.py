"""ViT-VQGAN."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.func import functional_call

from lexel.quantizers import Quantized, build
from tests.parity.fixture import TOLERANCES, Fixture, Run


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        model = run.load("vit_vqgan")
        x = run["x"]
        result = model(2 * x - 1)
        z = model.latents(2 * x - 1)
        run.close("h", z.flatten(2).transpose(1, 2))
        indices = result.quantized.indices  # (B, *depth, h, w)
        run.same("codes", indices.movedim(1, -1) if indices.dim() == 4 else indices)
        run.close("quant", result.quantized.z_q.flatten(2).transpose(1, 2))
        losses, beta = result.quantized.losses, config["quantizer"].get("beta", 0.25)
        if config["quantizer"].get("use_residual"):
            table = model.quantizer.get_parameter("levels.0.weight")
            quantization = level_losses(z, table, config["quantizer"], beta)
        else:
            quantization = losses["codebook"] + beta * losses["commitment"]
        run.close("quant_loss", quantization)
        images = (result.images + 1) / 2
        run.close("rec", images)
        run.close("rec_from_codes", (model.decode_codes(model.quantizer.indices_to_codes(indices)) + 1) / 2)
        total = (images - x).square().mean() + quantization
        run.close("total", total)
        run.gradients(total, run.parameters(model))
    variants(fixture)


def variants(fixture: Fixture) -> None:
    """The quantizer alone: on the sphere, plain, residual, and by Gumbel's softmax."""
    for name, part in fixture.content.get("quantizer_variants", {}).items():
        if not isinstance(part, dict):
            continue
        for dtype in TOLERANCES:
            run = Run(fixture, part, dtype, f"{name} ")
            z = run.cast(fixture.content["quantizer_variants"]["z"]).requires_grad_()
            table = run.cast(part["embedding"]).requires_grad_()
            variant(run, z, table)


def variant(run: Run, z: Tensor, table: Tensor) -> None:
    part = run.content
    size, dim = table.shape
    options = {"codebook_size": size, "codebook_dim": dim}
    rows = z.movedim(-1, 1)
    if "temp_init" in part["config"]:
        codes = table
        if part["config"].get("use_norm", True):
            rows, codes = torch.nn.functional.normalize(rows, dim=1), torch.nn.functional.normalize(table)
        result = gumbel(run, rows, codes, options, part["config"]["temp_init"])
        loss = result.losses["kl"]
    elif part["config"].get("use_residual"):
        result, loss = residual(run, rows, table, options)
    else:
        kind = {"kind": "cosine", "raw_gradient": True} if part["config"].get("use_norm", True) else {"kind": "vq"}
        quantizer = build(kind.pop("kind"), options | kind).to(run.dtype)
        result = functional_call(quantizer, {"weight": table}, (rows,))
        loss = result.losses["codebook"] + part["beta"] * result.losses["commitment"]
    z_q = result.z_q.movedim(1, -1)
    run.close("z_q", z_q)
    run.same("indices", result.indices)
    run.close("loss", loss)
    leaves = {"embedding.weight": table, "z": z}
    run.gradients(loss, leaves, "grads_of_loss")
    weights = torch.linspace(-1, 1, z_q.numel()).to(run.dtype).view_as(z_q)
    run.gradients((z_q * weights).sum(), leaves, "grads_of_weighted_z_q")


def residual(run: Run, rows: Tensor, table: Tensor, options: dict[str, int]) -> tuple[Quantized, Tensor]:
    config = run.content["config"]
    kind = "cosine" if config.get("use_norm", True) else "vq"
    whole = build("residual", options | {"depth": config["num_quantizers"], "base": kind, "shared": True}).to(run.dtype)
    found = functional_call(whole, {"levels.0.weight": table}, (rows,))
    loss = level_losses(rows, table, config, run.content["beta"])
    return found._replace(indices=found.indices.movedim(1, -1)), loss


def level_losses(rows: Tensor, table: Tensor, config: Mapping[str, Any], beta: float) -> Tensor:
    """Losses that reach the codes by what they leave, too, and no latent: the published residual is not detached."""
    on_sphere = config.get("use_norm", True)
    level = build(
        "cosine" if on_sphere else "vq", {"codebook_size": table.shape[0], "codebook_dim": table.shape[1]}
    ).to(table.dtype)
    left, losses = rows.detach(), []
    for _ in range(config["num_quantizers"]):
        result = functional_call(level, {"weight": table}, (left,))
        losses.append(result.losses["codebook"] + beta * result.losses["commitment"])
        codes = torch.nn.functional.normalize(table) if on_sphere else table
        left = left - codes[result.indices].movedim(-1, 1)
    return torch.stack(losses).mean()


def gumbel(run: Run, rows: Tensor, table: Tensor, options: dict[str, int], temperature: float) -> Quantized:
    """Logits that are negative distances, with the recorded noise; hard and still noisy in evaluation."""
    hard = run.prefix.startswith("gumbel_eval")
    quantizer = build("gumbel", {**options, "tau_start": temperature, "tau_end": temperature, "hard": hard})
    (recorded,) = (run.cast(noise) for noise in run.content["gumbel_exponential"])
    weights = {"weight": table, "logits.weight": 2 * table, "logits.bias": -table.square().sum(1)}
    drawn = recorded.flatten(0, -2)
    with mock.patch.object(Tensor, "exponential_", lambda self: self.copy_(drawn)):
        return functional_call(quantizer.to(run.dtype).train(), weights, (rows,))
