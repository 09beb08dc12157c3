"""What a training chose for its device: one line in the log at every start, so that two runs can be told apart."""

import torch
from torch.nn.attention import SDPBackend

from lexel.kernels.search import search_on
from lexel.machine import machine
from lexel.quantizers import Continuous, Quantizer
from lexel.quantizers.lattice import LatticeQuantizer
from lexel.runtime import Runtime

HEAD = (1, 4, 256, 64)  # images, heads, tokens and width of the attention that PyTorch is asked about


def choices(where: Runtime, optimizer: torch.optim.Optimizer, *, processes: int, readers: int) -> dict[str, str]:
    """What decides the speed of a run and not its recipe, as names and texts.

    Args:
        where: the device and precision that it trains in.
        optimizer: after a checkpoint was loaded, whose optimizer goes on as it began.
        processes: that train together.
        readers: processes that read images for each of them; 0 where it reads itself.
    """
    return {
        "machine": machine(where.device),
        "processes": str(processes),
        "precision": "float32" if where.half is None else str(where.half).removeprefix("torch."),
        "float32_products": float32_products(where.device),
        "optimizer": f"{type(optimizer).__name__}, {_update(optimizer)}",
        "attention": attention(where),
        "compiled": "no",
        "reading_processes": str(readers),
    }


def attention(where: Runtime) -> str:
    """The kernel that PyTorch takes for attention in training: "flash_attention", "math", ..."""
    if where.device.type not in ("cpu", "cuda"):
        return "PyTorch's choice"
    heads = torch.zeros(HEAD, device=where.device, dtype=where.half or torch.float32, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(heads, heads, heads)).name.lower()


def float32_products(device: torch.device) -> str:
    """How float32 matrices are multiplied, and convolved on a GPU: "ieee" (exact products), "tf32", "bf16"."""
    if device.type != "cuda":
        return _named(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    products = _named(torch.backends.cuda.matmul.fp32_precision)
    return f"{products}, convolutions {_named(torch.backends.cudnn.conv.fp32_precision)}"  # type: ignore[attr-defined]


def search(quantizer: Quantizer, device: torch.device, rows: int) -> str:
    """How the nearest codes of `rows` latents are found; "none" where codes follow from the latents by arithmetic."""
    leaf = next(  # of a stack or a pyramid, its first level
        part
        for part in quantizer.modules()
        if isinstance(part, Quantizer) and not any(isinstance(other, Quantizer) for other in [*part.modules()][1:])
    )
    if isinstance(leaf, LatticeQuantizer | Continuous):
        return "none"
    return search_on(device, rows, leaf.codebook_size, leaf.codebook_dim)


def _update(optimizer: torch.optim.Optimizer) -> str:
    return "fused" if optimizer.param_groups[0].get("fused") else "not fused"


def _named(precision: str) -> str:
    """PyTorch says "none" where nobody has chosen, which is IEEE's float32."""
    return "ieee" if precision == "none" else precision
