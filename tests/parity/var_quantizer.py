"""The multi-scale residual quantizer of VAR."""

from typing import Any

import torch

from lexel.quantizers import Multiscale, build
from tests.parity.fixture import Fixture, Run


def check(fixture: Fixture) -> None:
    for part in fixture.parts():
        for run in fixture.runs(part):
            compare(run)


def published(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Multiscale:
    """Our quantizer with the published options and numbers."""
    shared = config["share_quant_resi"]
    quantizer = build(
        "multiscale",
        {
            "codebook_size": config["vocab_size"],
            "codebook_dim": config["Cvae"],
            "scales": config["v_patch_nums"],
            "base_options": {"similarity": "cosine" if config["using_znorm"] else "l2"},
            "smoothing": abs(config["quant_resi"]),
            "smoothers": shared or None,
        },
    )
    assert isinstance(quantizer, Multiscale)
    tensors = {ours(name): value for name, value in state.items() if name != "ema_vocab_hit_SV"}
    if not config["quant_resi"]:  # nothing is smoothed, and there are no tensors of it
        tensors = {name: torch.zeros_like(value) for name, value in quantizer.state_dict().items()} | tensors
    quantizer.load_state_dict(tensors)
    return quantizer


def ours(name: str) -> str:
    """Our name of a published tensor."""
    if name == "embedding.weight":
        return "base.weight"
    numbered = name.replace("quant_resi.qresi_ls.", "").replace("quant_resi.qresi.", "0.").replace("quant_resi.", "")
    return f"smoothers.{numbered}"


def compare(run: Run) -> None:
    config = run.content["config"]
    quantizer = published(config, run.content["state_dict"]).to(run.dtype)
    assert quantizer.smoother_of_scale == run.content["phi_of_scale"]
    f = run["f"].requires_grad_()
    z_q, indices, losses = quantizer(f)
    run.close("f_hat", z_q)
    loss = losses["codebook"] + config["beta"] * losses["commitment"]
    run.close("vq_loss", loss)
    for theirs, part in zip(run.expected["indices"], quantizer.split(indices), strict=True):
        run.same("indices", part, theirs)
    sums = quantizer.partial_sums(indices)
    for name in ("f_hat_after_scale", "embed_to_fhat"):
        for theirs, z in zip(run.expected[name], sums, strict=True):
            run.close(name, z, theirs)
    run.close("var_input", quantizer.next_inputs(indices))
    leaves = dict(quantizer.named_parameters()) | {"f": f}
    for name, scalar in (
        ("grads_of_vq_loss", loss),
        ("grads_of_weighted_f_hat", (z_q * torch.linspace(-1, 1, z_q.numel(), dtype=run.dtype).view_as(z_q)).sum()),
    ):
        theirs = run.expected[name]
        run.gradients(scalar, {key: leaves[key if key == "f" else ours(key)] for key in theirs}, name)
