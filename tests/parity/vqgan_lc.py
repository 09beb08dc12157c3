"""VQGAN-LC: a frozen bank behind a projector, and its EMA variant."""

from collections.abc import Iterable

import torch

from lexel.quantizers import EMA, VQGANLC, Quantizer, build
from tests.parity.fixture import Fixture, Run

BETA = 0.33  # of the codebook term


def check(fixture: Fixture) -> None:
    for part in fixture.parts():
        for run in fixture.runs(part):
            (averaged if run.content["config"]["quantizer_type"] == "ema" else alone)(run)
            if "rec" in run.expected:
                tokenizer(run)


def made(run: Run) -> Quantizer:
    """The part's quantizer, and where the table trains, its bank as a leaf of gradients."""
    config, state = run.content["config"], run.content["state_dict"]
    options = {"codebook_size": config["n_vision_words"], "codebook_dim": config["embed_dim"]}
    table = state["tok_embeddings.weight"]
    if not config["use_cblinear"]:
        quantizer = build("vq", options)
        quantizer.load_state_dict({"weight": table})
        return quantizer.to(run.dtype)
    hidden = len(state["codebook_projection.0.weight"]) if config["use_cblinear"] == 2 else None
    quantizer = build("vqgan_lc", {**options, "feature_dim": config["codebook_dim"], "hidden": hidden})
    weights = {ours: state[theirs] for theirs, ours in projector(state).items()}
    quantizer.load_state_dict({**weights, "bank": table})
    return quantizer.to(run.dtype)


def projector(names: Iterable[str]) -> dict[str, str]:
    """Our names of the published projector's tensors."""
    theirs = [name for name in names if name.startswith("codebook_projection.")]
    deep = any(name.startswith("codebook_projection.2.") for name in theirs)
    return {name: name.replace("codebook_projection", "projector" if deep else "projector.0") for name in theirs}


def leaves_of(run: Run, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """What a part's gradients may be of, by published names."""
    found = {theirs: quantizer.get_parameter(ours) for theirs, ours in projector(run.content["state_dict"]).items()}
    table = quantizer.bank if isinstance(quantizer, VQGANLC) else quantizer.get_parameter("weight")
    return {**found, "tok_embeddings.weight": table.requires_grad_()}


def alone(run: Run) -> None:
    quantizer, expected = made(run), run.expected["quantizer_alone"]
    leaves = leaves_of(run, quantizer)
    z = run.cast(run.content["z"]).requires_grad_()
    z_q, indices, losses = quantizer(z)
    run.close("quantizer z_q", z_q, expected["z_q"])
    run.same("quantizer indices", indices, expected["indices"])
    run.close("quantizer codebook", quantizer.codebook, expected["codebook"])
    distances(run, z, quantizer.codebook)
    loss = losses["commitment"] + BETA * losses["codebook"]
    run.close("quantizer loss", loss, expected["loss"])
    inner = Run(run.fixture, {"f64": expected}, run.dtype, f"{run.prefix}quantizer ")
    inner.gradients(loss, {**leaves, "z": z}, "grads_of_loss")


def distances(run: Run, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Squared distances of the first latents to all codes."""
    theirs = run.expected["quantizer_alone"]["distances_first"]
    rows = z.movedim(1, -1).flatten(0, -2)[: len(theirs)]
    run.close("distances_first", (rows[:, None] - codebook).square().sum(-1), theirs)


def tokenizer(run: Run) -> None:
    model = run.load("vqgan_lc", {"autoencoder.groups": 32}).train()
    x = run["x"]
    leaves = run.parameters(model)
    if run.content["config"]["quantizer_type"] != "ema":
        leaves |= leaves_of(run, model.quantizer)
    result = model(x)
    run.close("quant", result.quantized.z_q)
    run.same("indices", result.quantized.indices)
    losses = result.quantized.losses
    loss = losses["commitment"] + BETA * losses["codebook"] if "codebook" in losses else losses["commitment"]
    run.close("qloss", loss)
    run.close("rec", result.images)
    distance = (result.images - x).abs().mean()
    run.close("l1", distance)
    (name,) = (name for name in run.expected if name.startswith("total_l1_plus_"))
    total = distance + float(name.removeprefix("total_l1_plus_").removesuffix("_q").replace("p", ".")) * loss
    run.close(name, total)
    run.gradients(total, leaves)


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
