"""The Triton kernels against float64: by Triton's interpreter on the CPU, on the device itself with -m gpu.

The interpreter is chosen before triton is first imported, so the default run starts a process of its own for it.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.kernels import index_backpropagation, nearest
from lexel.kernels.search import minus_squares, near_codes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu

pytest.importorskip("triton")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(z: Tensor, codebook: Tensor, implementation: str, dtype: torch.dtype, **options):
    z, codebook = z.to(DEVICE, dtype).requires_grad_(), codebook.to(DEVICE, dtype).requires_grad_()
    z_q, indices, terms = index_backpropagation(z, codebook, implementation=implementation, **options)
    g = normal(*z.shape, seed=9).to(z_q) / len(z)
    loss = (z_q * g).sum() + terms["quantization"] + 5 * terms["entropy_sample"] - 4 * terms["entropy_batch"]
    d_z, d_codebook = torch.autograd.grad(loss, (z, codebook))
    return {"z_q": z_q, "indices": indices, **terms, "d_z": d_z, "d_codebook": d_codebook}


@pytest.mark.skipif(INTERPRETED, reason="the process that this test starts")
def test_the_kernels_pass_their_tests_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in for the device")
def test_triton_on_a_cpu_is_refused_with_what_would_work():
    with pytest.raises(UsageError, match="needs a CUDA device, got cpu; use 'tiled'"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 3), implementation="triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("capability", "most"), [(80, 163), (86, 99), (90, 227)])
def test_the_kernels_compile_within_a_cards_shared_memory(capability, most):
    # Compiling needs no GPU. KiB of shared memory a block may take, from NVIDIA's table of compute capabilities.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lexel.kernels import triton_kernels as kernels

    tile = {
        "PRECISION": kernels.PRECISION,
        "N": kernels.BLOCK_N,
        "K": kernels.BLOCK_K,
        "D": kernels.BLOCK_D,
        "BIAS": True,
    }
    for kernel, constants in [
        (kernels._maxima_kernel, {**tile, "HALF": True, "MEMBERS": 16}),
        (kernels._statistics_kernel, tile),
        (kernels._queries_kernel, {**tile, "OUT": kernels.OUTPUT}),
        (kernels._keys_kernel, {**tile, "OUT": kernels.OUTPUT}),
    ]:
        function = kernel.fn
        numbers = {"count", "size", "dim", "groups", "tiles", "blocks"}
        types = {
            name: "i32" if name in numbers else "fp32" if name == "scale" else "*fp32" for name in function.arg_names
        }
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            function, types, {(function.arg_names.index(name),): value for name, value in constants.items()}
        )
        for config in kernels.CONFIGS:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert compiled.metadata.shared <= most * 1024, (function, options)


@on_device
def test_float64_is_refused():
    with pytest.raises(UsageError, match="computes in float32"):
        nearest(torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), implementation="triton")


CASES = {
    "one row, two codes": (1, 2, 1, 1.0, {}),
    "ragged tiles": (70, 130, 40, 1.0, {}),
    "saturated, where S - sum p S cancels": (70, 130, 40, 30.0, {}),
    "many columns": (9, 70, 300, 1.0, {"similarity": "cosine", "temperature": 0.1}),
    "distances": (70, 130, 24, 1.0, {"similarity": "l2", "temperature": 0.5}),
    "a split without a code": (3, 577, 8, 1.0, {}),
}


@on_device
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_no_further_from_float64_than_the_dense_path(case):
    rows, size, dim, scale, options = CASES[case]
    z, codebook = normal(rows, dim) * scale, normal(size, dim, seed=1)
    exact = outcome(z, codebook, "oracle", torch.float64, **options)
    dense = outcome(z, codebook, "oracle", torch.float32, **options)
    found = outcome(z, codebook, "triton", torch.float32, **options)
    assert torch.equal(found["indices"], exact["indices"])
    for name, value in exact.items():
        if name != "indices":
            error, allowed = ((x[name].double() - value).norm() for x in (found, dense))
            assert error <= 2 * allowed + 1e-5 * value.norm() + 1e-9, name


@on_device
@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("scan", [torch.bfloat16, torch.float32])
def test_the_scan_lists_the_codes_that_the_tiles_list(scan, distances):
    queries, keys = normal(66, 24).to(DEVICE), normal(1100, 24, seed=1).to(DEVICE)
    bias = minus_squares(keys) if distances else None
    found = near_codes(queries, keys, bias, 0.3, scan, "triton")
    expected = near_codes(queries, keys, bias, 0.3, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_device
def test_two_runs_agree_to_the_bit():
    z, codebook = normal(70, 16), normal(130, 16, seed=1)
    first, second = (outcome(z, codebook, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
def test_a_nan_in_one_row_leaves_the_others_alone():
    z, codebook = normal(5, 8).to(DEVICE), normal(50, 8, seed=1).to(DEVICE)
    spoiled = z.clone()
    spoiled[2, 3] = float("nan")
    others = [0, 1, 3, 4]
    found = nearest(spoiled, codebook, implementation="triton")
    assert torch.equal(found[others], nearest(z, codebook, implementation="triton")[others])
    assert 0 <= found[2] < 50
