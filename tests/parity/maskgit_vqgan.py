"""The tokenizer of MaskGIT."""

import torch

from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        model = run.load("maskgit_vqgan")
        x = run["x"]
        z = model.latents(2 * x - 1)
        run.close("z", z)
        result = model.quantizer(z)
        run.same("indices", result.indices)
        run.close("z_q", result.z_q)
        loss = result.losses["commitment"] + config["commitment_cost"] * result.losses["codebook"]  # beta on the codes
        run.close("quantizer_loss", loss)
        vectors = z.flatten(2).transpose(1, 2)
        distances = torch.cdist(vectors, model.quantizer.codebook.expand(len(z), -1, -1)).square()
        for name in run.expected:
            if name.startswith("soft_code_temp"):
                temperature = float(name.removeprefix("soft_code_temp").replace("p", "."))
                run.close(name, (-distances / temperature).softmax(-1))
        images = (model.decode_codes(result.z_q) + 1) / 2
        run.close("rec", images)
        run.close("rec_from_codes_clamped", (model.decode(result.indices) + 1) / 2)
        total = (images - x).square().mean() + loss
        run.close("total", total)
        run.gradients(total, run.parameters(model))
