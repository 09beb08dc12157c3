"""VQGAN-LC: a frozen bank behind a projector, and its EMA variant."""

import torch

from lexel.quantizers import EMA, build
from tests.parity.fixture import Fixture, Run

BETA = 0.33  # of the codebook term


def check(fixture: Fixture) -> None:
    for part in fixture.parts():
        for run in fixture.runs(part):
            if run.content["config"]["quantizer_type"] == "ema":
                averaged(run)
                continue
            projected(run)
            if "rec" in run.expected:
                tokenizer(run)


def projected(run: Run) -> None:
    config, state = run.content["config"], run.content["state_dict"]
    quantizer = build(
        "vqgan_lc",
        {
            "codebook_size": config["n_vision_words"],
            "codebook_dim": config["embed_dim"],
            "feature_dim": config["codebook_dim"],
            "hidden": len(state["codebook_projection.0.weight"]) if config["use_cblinear"] == 2 else None,
        },
    )
    names = {
        name: name.replace("codebook_projection", "projector" if config["use_cblinear"] == 2 else "projector.0")
        for name in state
        if name.startswith("codebook_projection")
    }
    weights = {ours: state[theirs] for theirs, ours in names.items()}
    quantizer.load_state_dict({**weights, "bank": state["tok_embeddings.weight"]})
    quantizer.to(run.dtype)
    alone = run.expected["quantizer_alone"]
    z = run.cast(run.content["z"]).requires_grad_()
    z_q, indices, losses = quantizer(z)
    run.close("quantizer z_q", z_q, alone["z_q"])
    run.same("quantizer indices", indices, alone["indices"])
    run.close("quantizer codebook", quantizer.codebook, alone["codebook"])
    distances(run, z, quantizer.codebook)
    loss = losses["commitment"] + BETA * losses["codebook"]
    run.close("quantizer loss", loss, alone["loss"])
    leaves = {theirs: quantizer.get_parameter(ours) for theirs, ours in names.items()} | {"z": z}
    for name, theirs in alone["grads_of_loss"].items():
        (gradient,) = torch.autograd.grad(loss, leaves[name], retain_graph=True)
        run.close(f"quantizer grad {name}", gradient, theirs)


def distances(run: Run, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Squared distances of the first latents to all codes."""
    theirs = run.expected["quantizer_alone"]["distances_first"]
    rows = z.movedim(1, -1).flatten(0, -2)[: len(theirs)]
    run.close("distances_first", (rows[:, None] - codebook).square().sum(-1), theirs)


def tokenizer(run: Run) -> None:
    model = run.load("vqgan_lc", {"autoencoder.groups": 32}).train()
    x = run["x"]
    result = model(x)
    run.close("quant", result.quantized.z_q)
    run.same("indices", result.quantized.indices)
    loss = result.quantized.losses["commitment"] + BETA * result.quantized.losses["codebook"]
    run.close("qloss", loss)
    run.close("rec", result.images)
    distance = (result.images - x).abs().mean()
    run.close("l1", distance)
    (name,) = (name for name in run.expected if name.startswith("total_l1_plus_"))
    total = distance + float(name.removeprefix("total_l1_plus_").removesuffix("_q").replace("p", ".")) * loss
    run.close(name, total)
    run.gradients(total, run.parameters(model))


def averaged(run: Run) -> None:
    config, state = run.content["config"], run.content["state_dict"]
    quantizer = build(
        "ema",
        {
            "codebook_size": config["n_vision_words"],
            "codebook_dim": config["embed_dim"],
            "order": "look_up_first",
        },
    )
    assert isinstance(quantizer, EMA)
    quantizer.weight.copy_(state["tok_embeddings.weight"])
    quantizer.counts.copy_(state["cluster_size"])
    quantizer.sums.copy_(state["embed_avg"])
    quantizer.to(run.dtype).train()
    alone = run.expected["quantizer_alone"]
    z = run.cast(run.content["z"]).requires_grad_()
    distances(run, z, quantizer.codebook.clone())
    z_q, indices, losses = quantizer(z)
    run.close("ema codebook", quantizer.codebook, alone["codebook"])
    run.close("ema z_q", z_q, alone["z_q"])
    run.close("ema loss", losses["commitment"], alone["loss"])
    (gradient,) = torch.autograd.grad(losses["commitment"], z)
    run.close("ema grad z", gradient, alone["grads_of_loss"]["z"])
    run.same("ema indices", indices, alone["indices"])
    for name, ours in (("cluster_size_after", "counts"), ("embed_avg_after", "sums"), ("codebook_after", "weight")):
        run.close(f"ema {name}", quantizer.get_buffer(ours), alone[name])
