"""The tokenizer of RQ-VAE."""

import torch

from tests.parity.fixture import Fixture
from tests.parity.rq import unfold


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        given = run.content["config"]["hparams"]
        model = run.load("rqvae")
        x = run["x"]
        run.close("z_e", unfold(model.latents(x), run.expected["z_e"]))
        result = model(x)
        indices = result.quantized.indices  # (B, depth, h, w)
        run.same("codes", indices.movedim(1, -1))
        run.close("rec", result.images)
        loss = result.quantized.losses["commitment"]
        run.close("commitment_loss", loss)
        difference = result.images - x
        likeness = difference.square().mean() if given["loss_type"] == "mse" else difference.abs().mean()
        run.close("loss_recon", likeness)
        total = likeness + given["latent_loss_weight"] * loss
        run.close("loss_total", total)
        run.close("decode_code", model.decode_codes(model.quantizer.indices_to_codes(indices)))
        codes = model.quantizer.codes_of_levels(indices)
        for name in run.expected:
            if name.startswith("decode_partial_add"):
                kept = codes[: int(name.removeprefix("decode_partial_add")) + 1]
                run.close(name, model.decode_codes(torch.stack(kept).sum(0)))
            if name.startswith("decode_partial_select"):
                run.close(name, model.decode_codes(codes[int(name.removeprefix("decode_partial_select"))]))
        run.gradients(total, run.parameters(model))
