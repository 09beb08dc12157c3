"""TiTok in both stages and in one, TA-TiTok, and the discriminator of the second stage."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.losses import BlurDiscriminator, LeCAM, discriminator_loss, generator_loss
from lexel.losses.discriminator import PooledBlurDiscriminator
from lexel.tokenizer import Tokenizer
from tests.parity.fixture import Fixture, Run


def overrides(run: Run) -> dict[str, Any]:
    """The numbers that were substituted for the published sizes."""
    heads = run.content["arch"]["heads"]
    return {"autoencoder.encoder.heads": heads, "autoencoder.decoder.heads": heads}


def options(run: Run) -> Any:
    return run.content["config"]["model"]["vq_model"]


def gradients(run: Run, model: Tokenizer, total: Tensor, name: str = "grads", **inputs: Tensor) -> None:
    run.gradients(total, run.parameters(model) | inputs, name)


def quantized(run: Run, model: Tokenizer, images: Tensor) -> tuple[Any, Tensor]:
    """Compares what the quantizer gives and its losses; returns both."""
    result = model.quantizer(model.latents(images))
    commitment = options(run).get("commitment_cost", 0.25) * result.losses["commitment"]
    for name, ours in {"commitment_loss": commitment, "codebook_loss": result.losses["codebook"]}.items():
        if name in run.expected:
            run.close(name, ours)
    run.same("indices", result.indices)
    return result, commitment + result.losses["codebook"]


def stage1(fixture: Fixture) -> None:
    for run in fixture.runs():
        model = run.load("titok", overrides(run))
        x = run["x"].requires_grad_(True)
        run.close("z", model.latents(2 * x - 1))
        result, loss = quantized(run, model, 2 * x - 1)
        run.close("z_q", result.z_q)
        run.close("quantizer_loss", loss)
        logits = model.autoencoder.code_logits(model.from_codes(result.z_q))
        run.close("proxy_logits", logits)
        crossed = F.cross_entropy(logits.flatten(2), run["proxy_codes"])
        run.close("proxy_ce", crossed)
        total = crossed + run.content["config"]["losses"]["quantizer_weight"] * loss
        run.close("total", total)
        codes = model.quantizer.indices_to_codes(result.indices)
        run.close("proxy_logits_from_tokens", model.autoencoder.code_logits(model.from_codes(codes)))
        gradients(run, model, total, x=x)


def stage2(fixture: Fixture) -> None:
    for run in fixture.runs():
        model = run.load("titok", overrides(run))
        x = run["x"]
        result, loss = quantized(run, model, 2 * x - 1)
        run.close("z_q", result.z_q)
        run.close("quantizer_loss", 0 * loss)  # the second stage multiplies it by 0
        features = model.decoder.features(model.from_codes(result.z_q))
        logits = model.decoder.head.code_logits(features)
        run.close("proxy_logits", logits)
        run.close("pixel_latent", torch.einsum("bkhw,kd->bdhw", logits.softmax(1), model.decoder.head.codebook))
        images = (model.decode_codes(result.z_q) + 1) / 2
        run.close("rec", images)
        total = (images - x).square().mean()
        run.close("l2", total)
        from_tokens = model.decode_codes(model.quantizer.indices_to_codes(result.indices))
        run.close("rec_from_tokens", (from_tokens + 1) / 2)
        gradients(run, model, total)
        published = run.parameters(model)
        trained = {id(part) for name in run.content["trainable"] for part in published[name]}
        learned = {id(part) for part in [*model.decoder.parameters(), *model.from_codes.parameters()]}
        if trained != learned:
            fixture.faults.append("what the second stage trains is not the decoder with its projection")


def single_stage(fixture: Fixture) -> None:
    for run in fixture.runs("vq"):
        model = run.load("titok", overrides(run))
        x = run["x"]
        run.close("z", model.latents(2 * x - 1))
        result, loss = quantized(run, model, 2 * x - 1)
        run.close("quantizer_loss", loss)
        images = (model.decode_codes(result.z_q) + 1) / 2
        run.close("rec", images)
        total = (images - x).square().mean() + run.content["config"]["losses"]["quantizer_weight"] * loss
        run.close("total", total)
        from_tokens = model.decode_codes(model.quantizer.indices_to_codes(result.indices))
        run.close("rec_from_tokens", (from_tokens + 1) / 2)
        gradients(run, model, total)
    for run in fixture.runs("vae"):
        model = run.load("titok", overrides(run))
        x, noise = run["x"], run.cast(run.content["noise"]).squeeze(2)
        latents = model.latents(2 * x - 1)
        mean, log_variance = latents.chunk(2, 1)
        run.close("mean", mean)
        run.close("logvar", log_variance.clamp(-30, 20))
        drawn = model.quantizer.draw(latents, noise)
        run.close("z", drawn.z_q)
        run.close("std", (0.5 * log_variance.clamp(-30, 20)).exp())
        run.close("kl_loss_unweighted", drawn.losses["kl"])
        images = (model.decode_codes(drawn.z_q) + 1) / 2
        run.close("rec", images)
        (name,) = (name for name in run.expected if name.startswith("total_with_kl_weight_"))
        weight = float(name.removeprefix("total_with_kl_weight_").replace("m", "-"))
        total = (images - x).square().mean() + weight * drawn.losses["kl"]
        run.close(name, total)
        run.close("rec_from_mode", (model(2 * x - 1).images + 1) / 2)
        gradients(run, model, total)


def text_aware(fixture: Fixture) -> None:
    for run in fixture.runs():
        model = run.load("titok", overrides(run))
        x, text = run["x"], run["text"]
        run.close("z", model.latents(2 * x - 1))
        result, loss = quantized(run, model, 2 * x - 1)
        run.close("quantizer_loss", loss)
        images = (model.decode_codes(result.z_q, text) + 1) / 2
        run.close("rec", images)
        gradients(run, model, (images - x).square().mean(), "grads_eval")
        model.train()
        z_q = model.quantizer(model.latents(2 * x - 1)).z_q
        run.close("rec_train_step", (model.decode_codes(z_q, text) + 1) / 2)
        run.close("embedding_after", model.quantizer.get_parameter("weight"))
        if "embed_prob_after" in run.expected:
            run.close("embed_prob_after", model.quantizer.get_buffer("use"))


DISCRIMINATOR = {
    r"^block_in\.0": "stem",
    r"^blocks\.(\d+)\.0\.": r"convolutions.\1.",
    r"^blocks\.(\d+)\.2\.": r"norms.\1.",
    "^to_logits": "head",
}


def discriminator(fixture: Fixture) -> None:
    def ours(name: str) -> str:
        for pattern, template in DISCRIMINATOR.items():
            name = re.sub(pattern, template, name)
        return name

    for run in fixture.runs():
        config, state = run.content["config"], run.content["state_dict"]
        network: BlurDiscriminator = PooledBlurDiscriminator(
            config["num_stages"], config["hidden_channels"], config["blur_kernel_size"]
        )
        network.load_state_dict({ours(name): tensor for name, tensor in state.items() if not name.endswith("kernel")})
        network = network.to(run.dtype)
        real, fake = network(run["real"]), network(run["fake"])
        run.close("logits_real", real)
        run.close("logits_fake", fake)
        hinge = discriminator_loss("hinge", real, fake)
        run.close("hinge", hinge)
        lecam = LeCAM().to(run.dtype).eval()
        lecam.real_mean.fill_(config["ema_real"])
        lecam.fake_mean.fill_(config["ema_fake"])
        held = lecam(real.mean(), fake.mean())  # of a batch's means, as published
        run.close("lecam_unweighted", held)
        run.close("g_loss", generator_loss("hinge", fake))
        run.gradients(hinge + held, {name: network.get_parameter(ours(name)) for name in run.expected["grads"]})
