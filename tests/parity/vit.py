"""ViT-VQGAN."""

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
        run.same("codes", result.quantized.indices)
        run.close("quant", result.quantized.z_q.flatten(2).transpose(1, 2))
        losses, beta = result.quantized.losses, config["quantizer"].get("beta", 0.25)
        quantization = losses["codebook"] + beta * losses["commitment"]
        run.close("quant_loss", quantization)
        images = (result.images + 1) / 2
        run.close("rec", images)
        run.close(
            "rec_from_codes", (model.decode_codes(model.quantizer.indices_to_codes(result.quantized.indices)) + 1) / 2
        )
        total = (images - x).square().mean() + quantization
        run.close("total", total)
        names = {
            "encoder.to_patch_embedding.0.weight": "encoder.patches.weight",
            "encoder.transformer.layers.0.0.fn.to_qkv.weight": "encoder.blocks.0.qkv.weight",
            "encoder.transformer.norm.weight": "encoder.norm.weight",
            "pre_quant.weight": "to_codes.weight",
            "quantizer.embedding.weight": "quantizer.weight",
            "post_quant.weight": "from_codes.weight",
            "decoder.to_pixel.1.weight": "decoder.pixels.weight",
        }
        run.gradients(total, {theirs: model.get_parameter(ours) for theirs, ours in names.items()})
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
    """Losses that reach the codes by what they leave, too, and no latent: the published residual is not detached."""
    depth, on_sphere = run.content["config"]["num_quantizers"], run.content["config"].get("use_norm", True)
    kind = "cosine" if on_sphere else "vq"
    level = build(kind, options).to(run.dtype)
    left, losses, indices = rows.detach(), [], []
    for _ in range(depth):
        result = functional_call(level, {"weight": table}, (left,))
        losses.append(result.losses["codebook"] + run.content["beta"] * result.losses["commitment"])
        indices.append(result.indices)
        codes = torch.nn.functional.normalize(table) if on_sphere else table
        left = left - codes[result.indices].movedim(-1, 1)
    whole = build("residual", options | {"depth": depth, "base": kind, "shared": True}).to(run.dtype)
    (name,) = (name for name, _ in whole.named_parameters() if name.endswith("weight"))
    found = functional_call(whole, {name: table}, (rows,))
    run.same("indices of levels", torch.stack(indices, -1), run.expected["indices"])
    return found._replace(indices=found.indices.movedim(1, -1)), torch.stack(losses).mean()


def gumbel(run: Run, rows: Tensor, table: Tensor, options: dict[str, int], temperature: float) -> Quantized:
    """Logits that are negative distances, with the recorded noise; hard and still noisy in evaluation."""
    hard = run.prefix.startswith("gumbel_eval")
    quantizer = build("gumbel", {**options, "tau_start": temperature, "tau_end": temperature, "hard": hard})
    (recorded,) = (run.cast(noise) for noise in run.content["gumbel_exponential"])
    weights = {"weight": table, "logits.weight": 2 * table, "logits.bias": -table.square().sum(1)}
    drawn = recorded.flatten(0, -2)
    with mock.patch.object(Tensor, "exponential_", lambda self: self.copy_(drawn)):
        return functional_call(quantizer.to(run.dtype).train(), weights, (rows,))
