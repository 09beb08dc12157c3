"""The IBQ tokenizer of Emu3.5, plain and with codes and latents on the sphere."""

import torch

from lexel.quantizers import build
from lexel.tokenizer import Tokenizer
from tests.parity.fixture import Fixture, Run


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        spherical = run.content["config"]["l2_normalize"]
        tokenizer(run, spherical)
        entropies(run, spherical)


def quantization(losses: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    return losses["quantization"] + losses["commitment"] + beta * losses["codebook"]


def tokenizer(run: Run, spherical: bool) -> None:
    config = run.content["config"]
    overrides = {"autoencoder.groups": 32} | ({"quantizer.normalize": "both"} if spherical else {})
    model = run.load("emu3.5", overrides, config={})
    expected = run.expected["train"]
    x = run["x"]
    result = model.train()(x)
    loss = quantization(result.quantized.losses, config["beta"])
    run.close("train quant", result.quantized.z_q, expected["quant"])
    run.close("train loss", loss, expected["loss"])
    run.same("train indices", result.quantized.indices, expected["indices"])
    run.close("train rec", result.images, expected["rec"])
    features = levels(model, result.quantized.z_q)
    for number, (ours, theirs) in enumerate(zip(features, expected["intermediate_features"], strict=True)):
        run.same("train shapes", torch.tensor(ours.shape), expected["intermediate_shapes"][number])
        run.close(f"train level {number}", ours[:, : theirs.shape[1]], theirs)  # the file has the first channels
    total = (result.images - x).square().mean() + loss
    run.close("train total", total, expected["total"])
    Run(run.fixture, {"f64": expected}, run.dtype, "train ").gradients(total, run.parameters(model))
    model.eval()
    expected = run.expected["eval"]
    indices = model.encode(x)
    run.same("eval indices", indices, expected["indices"])
    run.close("eval h", model.latents(x), expected["h"])
    run.close("eval quant", model.quantizer.indices_to_codes(indices), expected["quant"])
    # The released `get_codebook_entry` forgets to normalise.
    raw = torch.nn.functional.embedding(indices, model.quantizer.weight).movedim(-1, 1)
    run.close("eval codebook_entry", raw, expected["codebook_entry"])
    run.close("eval rec", model.decode_codes(model.quantizer.indices_to_codes(indices)), expected["rec"])
    run.close("eval rec_from_codes", model.decode_codes(raw), expected["rec_from_codes"])


def levels(model: Tokenizer, z_q: torch.Tensor) -> list[torch.Tensor]:
    """What each level of the decoder gives, coarse to fine, after its upsampling."""
    decoder, found = model.decoder, []
    first = decoder.first_upsampled
    for number in reversed(range(len(decoder.levels))):
        last = decoder.upsamples[number - first] if number >= first else decoder.levels[number]
        last.register_forward_hook(lambda _, __, output: found.append(output))
    model.decode_codes(z_q)
    return found


def entropies(run: Run, spherical: bool) -> None:
    config = run.content["config"]
    for name, expected in run.expected["quantizer_entropy"].items():
        temperature = float(name.removeprefix("temperature_"))
        quantizer = build(
            "ibq",
            {
                "codebook_size": config["n_embed"],
                "codebook_dim": config["embed_dim"],
                "entropy_temperature": temperature,
                "normalize": "both" if spherical else None,
            },
        )
        quantizer.load_state_dict({"weight": run.content["state_dict"]["quantize.embedding.weight"]})
        quantizer.to(run.dtype)
        z = run["z"].requires_grad_()
        z_q, indices, losses = quantizer(z)
        run.close(f"{name} z_q", z_q, expected["z_q"])
        run.same(f"{name} indices", indices, expected["indices"])
        run.close(f"{name} quant_loss", quantization(losses, config["beta"]), expected["quant_loss"])
        run.close(f"{name} sample_entropy", losses["entropy_sample"], expected["sample_entropy"], 1e-3)
        run.close(f"{name} avg_entropy", losses["entropy_batch"], expected["avg_entropy"], 1e-3)
        total = (
            losses["entropy_sample"]
            - config["batch_maximization_weight_in_quantizer_entropy"] * losses["entropy_batch"]
        )
        run.close(f"{name} entropy_loss", total, expected["entropy_loss"], 1e-3)
        weights = torch.linspace(-1, 1, z_q.numel(), dtype=run.dtype).view_as(z_q)
        scalars = {
            "grads_quant_loss": quantization(losses, config["beta"]),
            "grads_entropy": total,
            "grads_weighted_z_q": (z_q * weights).sum(),
        }
        leaves = {"embedding.weight": quantizer.get_parameter("weight"), "z": z}
        for which, scalar in scalars.items():
            for leaf, theirs in expected[which].items():
                (gradient,) = torch.autograd.grad(scalar, leaves[leaf], retain_graph=True)
                run.close(f"{name} {which} {leaf}", gradient, theirs, 1e-3)
