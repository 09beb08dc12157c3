"""Kinds of product with constant weights: as PyTorch does them, packed for oneDNN, or in 8 bits."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError

Linear = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)


def plain(weight: Tensor) -> Linear:
    """The product as PyTorch does it."""
    return lambda x: F.linear(x, weight)


def packed(weight: Tensor) -> Linear:
    """Weights reordered once into the blocks that oneDNN multiplies by; the few rows of a decode step gain the most.

    Raises:
        UsageError: the weights are not on the CPU, or neither float32 nor bfloat16.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"packed weights need the CPU and float32 or bf16, got {weight.device.type} and {weight.dtype}"
        )
    if not torch.backends.mkldnn.is_available():
        raise UsageError("packed weights need a PyTorch with oneDNN; use implementation = 'plain'")
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def int8(weight: Tensor) -> Linear:
    """Weights rounded to 8 bits, one scale for each output; inputs are rounded as they come, one scale for all.

    Raises:
        UsageError: the weights are not float32 on the CPU.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise UsageError(f"int8 weights need the CPU and float32, got {weight.device.type} and {weight.dtype}")
    scales = (weight.abs().amax(1).double() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():  # PyTorch means to move these types elsewhere; the products themselves stay
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    blocks = torch.ops.quantized.linear_prepack(rounded, None)
    # Without VNNI, pairs of 8-bit products are added in 16 bits and saturate: leave them a bit of room.
    reduce_range = not getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return lambda x: torch.ops.quantized.linear_dynamic(x, blocks, reduce_range)


LINEARS: dict[str, Callable[[Tensor], Linear]] = {"plain": plain, "packed": packed, "int8": int8}
