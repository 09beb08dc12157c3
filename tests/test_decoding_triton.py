"""The kernels of a decode step against the plain block, on the device with -m gpu.

`test_kernels_triton.py` runs this file under Triton's interpreter.
"""

import os

import pytest
import torch

from lexel.generators.next_token.config import NextTokenConfig
from lexel.generators.next_token.fused import CacheWrite, FusedBlock, Modulation
from lexel.generators.next_token.linears import plain
from lexel.generators.next_token.network import Transformer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu

pytest.importorskip("triton")


@on_device
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("rows", [3, 17])
def test_a_step_by_the_kernels_is_no_further_from_float64_than_the_plain_one(rows, modulated):
    from lexel.generators.next_token.triton_block import TritonBlock

    torch.manual_seed(0)
    sizes = {"layers": 1, "heads": 2, "width": 24 if INTERPRETED else 384, "rows": 4, "columns": 4}
    network = Transformer(NextTokenConfig(codebook_size=16, **sizes)).to(DEVICE)
    width, slots, slot = sizes["width"], 11, 6
    block = network.blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    x = torch.randn(rows, 1, width, device=DEVICE)
    rope = torch.view_as_complex(torch.randn(1, width // 4, 2, device=DEVICE))
    caches = torch.randn(2, rows, 2, slots, width // 2, device=DEVICE)
    modulation = Modulation(*torch.randn(6, rows, 1, width, device=DEVICE).unbind()) if modulated else None
    write = CacheWrite(torch.tensor([slot], device=DEVICE), slots, (torch.arange(slots, device=DEVICE) <= slot)[None])

    def outcome(kind, dtype):
        keys, values = caches.to(torch.bfloat16).to(dtype).clone().unbind()
        rounded = modulation and Modulation(*(part.to(torch.bfloat16).to(dtype) for part in modulation))
        table = rope.to(torch.complex128) if dtype == torch.float64 else rope
        network.to(torch.bfloat16).to(dtype)
        result = kind(block, plain, dtype)(x.to(torch.bfloat16).to(dtype), table, rounded, (keys, values), write)
        return torch.cat([result.flatten(), keys.flatten(), values.flatten()]).double()

    exact, expected = outcome(FusedBlock, torch.float64), outcome(FusedBlock, torch.bfloat16)
    found = outcome(TritonBlock, torch.bfloat16)
    most = 2.5 if INTERPRETED else 1.2  # the interpreter cuts numbers off where a GPU rounds
    assert (found - exact).norm() <= most * (expected - exact).norm()
    assert (found - exact).norm() < 0.05 * exact.norm()
