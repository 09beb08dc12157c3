"""ViT-VQGAN."""

from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        inner = {side: config[side].get("dim_head", 64) for side in ("encoder", "decoder")}
        model = run.load("vit_vqgan")
        x = run["x"]
        result = model(2 * x - 1)
        z = model.latents(2 * x - 1)
        assert set(inner.values()) == {model.config.autoencoder.head_width}
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
