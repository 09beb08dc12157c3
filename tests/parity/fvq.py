"""FVQ's table behind VQBridge."""

import re

import torch

from lexel.quantizers import build
from tests.parity.fixture import Fixture

WIDTHS = {"XS": 32, "S": 64, "B": 128, "L": 256, "XL": 512}
NAMES = [
    (r"embedding\.", ""),
    (r"qbridge\.x_embedder\.proj", "bridge.compress"),
    (r"qbridge\.final_layer\.linear", "bridge.recover"),
    (r"qbridge\.blocks\.(\d+)\.attn\.qkv", r"bridge.blocks.\1.qkv"),
    (r"qbridge\.blocks\.(\d+)\.attn\.proj", r"bridge.blocks.\1.out"),
    (r"qbridge\.blocks\.(\d+)\.mlp\.fc1", r"bridge.blocks.\1.widen"),
    (r"qbridge\.blocks\.(\d+)\.mlp\.fc2", r"bridge.blocks.\1.narrow"),
]


def ours(name: str) -> str:
    """Our name of a published tensor."""
    for theirs, mine in NAMES:
        name = re.sub(theirs, mine, name)
    return name


def squares(tensor: torch.Tensor) -> torch.Tensor:
    """A convolution (width, D, p, p) as a linear layer on (p, p, D)."""
    return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.dim() == 4 else tensor


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        size, patch = config["QB_type"].removeprefix("QBridge-").split("/")
        quantizer = build(
            "fvq",
            {
                "codebook_size": config["n_e"],
                "codebook_dim": config["e_dim"],
                "width": WIDTHS[size],
                "patch": int(patch),
            },
        )
        state = {ours(name): squares(value) for name, value in run.content["state_dict"].items()}
        quantizer.load_state_dict(state)
        quantizer.to(run.dtype)
        z = run["z"].requires_grad_()
        z_q, indices, losses = quantizer(z)
        run.close("codebook", quantizer.codebook)
        run.close("z_q", z_q)
        run.same("indices", indices)
        run.close("vq_loss", losses["codebook"])
        run.close("commit_loss", config["beta"] * losses["commitment"])
        run.close("entry", quantizer.indices_to_codes(indices))
        leaves = {name: quantizer.get_parameter(ours(name)) for name in run.content["state_dict"]} | {"z": z}
        weights = torch.linspace(-1, 1, z_q.numel(), dtype=run.dtype).view_as(z_q)
        theirs = run.expected["grads_weighted_z_q"]
        run.gradients((z_q * weights).sum(), {name: leaves[name] for name in theirs}, "grads_weighted_z_q")
