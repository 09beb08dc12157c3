"""DQ-VAE with two granularities: evaluation, a step of training, budgets."""

import torch

from lexel.autoencoders.dynamic import budget, pack, places, unpack
from lexel.autoencoders.entropy import patch_entropy
from lexel.tokenizer import Tokenizer
from tests.parity.fixture import Fixture, Run


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model = run.load("dqvae", {"autoencoder.share": run.content["config"]["budget"]["target_ratio"]})
        x = run["x"]
        features, gates = model.encoder.routed(x)
        run.close("h_dual", features)
        run.close("router_logits", model.encoder.features(x)[2])
        run.same("grain_indices", model.autoencoder.granularity(x))
        fine = places(gates[:, 1:])
        run.close("codebook_mask", fine + (1 - fine) / 4)
        result = model(x)
        run.close("quant", result.quantized.z_q)
        run.same("codes", result.quantized.indices)
        run.close("vq_loss", commitments(run) * result.quantized.losses["commitment"])
        run.close("rec", result.images)
        budgets(run)
        packing(run)
        entropy(run)
        step(run, model)


def commitment(run: Run) -> float:
    """The weight of the commitment."""
    return float(run.content["config"]["quantizer"]["params"]["commitment_beta"])


def commitments(run: Run) -> float:
    """The published loss has the commitment twice: weighted, and as a term that moves no code."""
    return 1 + commitment(run)


def weight(run: Run) -> float:
    """Of the budget: gamma, twice where the published code adds its second term, which is the same."""
    given = run.content["config"]["budget"]
    return float(given["gamma"] * (2 if given["calculate_all"] else 1))


def budgets(run: Run) -> None:
    """A file does not say the weight and share of its `budgets`: they are the usual ones or its model's."""
    given, model = run.content["budgets"], run.content["config"]["budget"]
    share, gates = model["target_ratio"], run.cast(given["gate2"])
    usual = {"dual_all": (20.0, 0.5), "dual_single": (2.0, 0.7)}
    own = {"dual_all": (2 * model["gamma"], share), "dual_single": (model["gamma"], share)}
    for name in usual:
        theirs = given[name]
        found = [factor * budget(gates, wanted) for factor, wanted in (usual[name], own[name])]
        run.close(f"budgets {name}", min(found, key=lambda ours: (ours - theirs).abs().item()), theirs)
    run.close("budget_of_logits", weight(run) * budget(run.expected["router_logits"], share))


def entropy(run: Run) -> None:
    given = run.content["entropy"]
    theirs = given["f64" if run.dtype == torch.float64 else "f32"]["out"]
    run.close("entropy", patch_entropy(run.cast(given["x"]), given["patch_size"]), theirs)


def packing(run: Run) -> None:
    """Tokens once each, with an end and padding as published."""
    given = run.content["permuter"]
    codes, config = given["codes"], given["config"]
    for theirs, ours in {"region-first": "regions", "row-first": "rows"}.items():
        packed = pack(codes, given["grain"] == 1, ours)
        for part, tokens in packed._asdict().items():
            name = part.replace("_places", "_position") if "_" in part else f"{part}_content"
            prefix = name if "position" in name else "content"
            padded = torch.nn.functional.pad(tokens, (0, 1), value=-1)
            ends = (padded < 0).cumsum(1) == 1
            padded = padded.where(~ends, config[f"{prefix}_eos_code"])
            padded = padded.where(padded >= 0, config[f"{prefix}_pad_code"])
            run.same(f"permuter {theirs} {name}", padded, given[theirs][name])
            if prefix == "content":  # which of the two sequences a token belongs to
                segment = given[theirs][f"{part}_segment"]
                run.same(f"permuter {theirs} {part}_segment", torch.full_like(padded, int(part == "fine")), segment)
        run.same(f"permuter {theirs} back", unpack(packed, tuple(codes.shape[1:])), given[theirs]["back"])


def step(run: Run, model: Tokenizer) -> None:
    """One step of training, with the published draw."""
    model.train()
    published, x = run.expected["train_step"], run["x"]
    noise = run.cast(run.content["inputs"]["gumbel_exponential"][0]).movedim(-1, 1)
    features, gates = model.encoder.routed(x, noise)
    run.same("train_step grain_indices", gates.argmax(1), published["grain_indices"])
    run.close("train_step gate", gates, published["gate"])
    z = model.to_codes(features)
    quantized = model.quantizer(z)
    losses = model.autoencoder.routing_losses(gates, z, quantized.z_q, quantized.losses)
    images = model.decode_codes(quantized.z_q)
    run.close("train_step rec", images, published["rec"])
    run.close("train_step vq_loss", commitments(run) * losses["commitment"], published["vq_loss"])
    weighted = weight(run) * losses["budget"]
    run.close("train_step budget", weighted, published["budget"])
    difference = (images - x).abs().mean()
    run.close("train_step total", difference + commitments(run) * losses["commitment"] + weighted, published["total"])
    total = difference + commitment(run) * losses["commitment"] + weighted
    inner = Run(run.fixture, {"f64": published}, run.dtype, "train_step ")
    inner.gradients(total, run.parameters(model))
    run.close("train_step cluster_size_after", model.quantizer.counts, published["cluster_size_after"])
    run.close("train_step codebook_after", model.quantizer.weight, published["codebook_after"][:-1])
