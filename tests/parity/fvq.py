"""FVQ's table behind VQBridge."""

import math
import re

import torch

from lexel.kernels import index_backpropagation
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


def entropies(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Sample less batch entropy of softmax(-distance / 0.01); but for z . z, -distance = [z, 1] . [2 e, -e . e]."""
    rows = z.movedim(1, -1).flatten(0, -2)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    table = torch.cat([2 * codebook, -codebook.square().sum(1, keepdim=True)], 1)
    terms = index_backpropagation(rows, table, entropy_temperature=0.01)[2]
    return terms["entropy_sample"] - terms["entropy_batch"]


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        config = run.content["config"]
        size, patch, _, depth = re.fullmatch(r"QBridge-(\w+)/(\d+)(-d(\d+))?", config["QB_type"]).groups()
        quantizer = build(
            "fvq",
            {
                "codebook_size": config["n_e"],
                "codebook_dim": config["e_dim"],
                "width": WIDTHS[size],
                "patch": int(patch),
                "depth": int(depth or 2),
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
        entropy = config["entropy_loss_ratio"] * entropies(z, quantizer.codebook)
        run.close("entropy_loss_weighted", entropy, tolerance=1e-3)
        if run.dtype == torch.float64:  # at a temperature of 0.01 it amplifies the rounding of float32
            total = losses["codebook"] + config["beta"] * losses["commitment"] + entropy
            gradients = torch.autograd.grad(total, [leaves[name] for name in run.expected["grads"]], retain_graph=True)
            for (name, theirs), found in zip(run.expected["grads"].items(), gradients, strict=True):
                run.published("", theirs)
                run.close(f"grads:{name}", found, squares(theirs) if name in run.content["state_dict"] else theirs)
        side = math.isqrt(config["n_e"])
        line = torch.linspace(-1, 1, config["n_e"] * config["e_dim"], dtype=run.dtype)
        picture = line.view(1, config["e_dim"], side, side).flatten(2)[0].T  # (K, D)
        run.close("bridge_of_linspace", quantizer.bridge(picture).T)
        theirs = run.expected["grads_weighted_z_q"]
        run.gradients((z_q * weights).sum(), {name: leaves[name] for name in theirs}, "grads_weighted_z_q")
