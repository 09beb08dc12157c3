"""The Triton kernels against float64: by Triton's interpreter on the CPU, on the device itself with -m gpu.

The interpreter is chosen before triton is first imported, so the default run has a process of its own for it: one
for the files of all kernels.
"""

import os
from pathlib import Path

import pytest
import torch
from processes import SERVERS
from torch import Tensor

from lexel.errors import UsageError
from lexel.kernels import index_backpropagation, nearest
from lexel.kernels.scores import minus_squares
from lexel.kernels.search import near_codes

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
    files = sorted(Path(__file__).parent.glob("test_*_triton.py"))
    script = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-rA", "-p", "no:cacheprovider", *files]
    (said,) = SERVERS["torch"].run(script, arguments, [{"TRITON_INTERPRET": 1, "OMP_NUM_THREADS": 1}])
    for file in files:
        assert f"PASSED tests/{file.name}" in said


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in for the device")
def test_triton_on_a_cpu_is_refused_with_what_would_work():
    with pytest.raises(UsageError, match="needs a CUDA device, got cpu; use 'tiled'"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 3), implementation="triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("capability", "most"), [(80, 163), (86, 99), (90, 227), (120, 99)])
def test_the_kernels_compile_within_a_cards_shared_memory(capability, most, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is left open
    # Compiling needs no GPU. KiB of shared memory a block may take, from NVIDIA's table of compute capabilities.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lexel.kernels import triton_search, triton_softmax
    from lexel.kernels.triton_tiles import LARGEST_DIM, SHAPES

    common = {"BIAS": True, "D": LARGEST_DIM}
    size = max(size for size in SHAPES if size <= most)
    cuts = [SHAPES[size], *[SHAPES[smaller] for smaller in SHAPES if smaller < size][:1]]
    for cut, same in zip(cuts, (True, False), strict=False):
        soft = {**common, "SAME": same}
        for kernel, tiles, constants in [
            (triton_search._maxima_kernel, cut.scan, {**common, "MEMBERS": 16, "WHOLE": True}),
            (triton_softmax._statistics_kernel, cut.statistics, soft),
            (triton_softmax._slope_kernel, cut.slope, {**soft, "BULK": False}),
        ]:
            halves, floats = {"queries", "keys", "codes", "g", "out"}, {"bias", "maxima", "maximum", "total", "mean"}
            types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(floats, "*fp32") | {"scale": "fp32"}
            constants = {**constants, "N": tiles.rows, "K": tiles.codes}
            types = {name: types.get(name, "i32") for name in kernel.arg_names}
            types |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(
                kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            )
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert compiled.metadata.shared <= most * 1024, (kernel, options)


@on_device
def test_float64_is_refused():
    with pytest.raises(UsageError, match="takes float32"):
        nearest(*(torch.zeros(n, 3, device=DEVICE).double() for n in (2, 4)), implementation="triton")


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
def test_products_in_bfloat16_leave_the_values_and_move_the_gradients_little(case):
    rows, size, dim, scale, options = CASES[case]
    z, codebook = normal(rows, dim) * scale, normal(size, dim, seed=1)
    exact = outcome(z, codebook, "oracle", torch.float64, **options)
    dense = outcome(z, codebook, "oracle", torch.float32, **options)
    found = outcome(z, codebook, "triton", torch.float32, **options, products="bf16")
    assert torch.equal(found["indices"], exact["indices"])
    for name, value in exact.items():
        if name != "indices":
            error, allowed = ((x[name].double() - value).norm() for x in (found, dense))
            share = (0.5 if scale > 1 else 0.01) if name.startswith("d_") else 1e-5  # rounded logits of hundreds
            assert error <= 2 * allowed + share * value.norm() + 1e-9, name


LISTED = [(1100, 24, False), (70, 300, True)]


@on_device
@pytest.mark.parametrize(
    ("size", "dim", "distances"), LISTED if INTERPRETED else [*LISTED, (1100, 24, True), (70, 300, False)]
)
def test_the_kernels_list_the_codes_that_the_tiles_list(size, dim, distances):
    rows = 9 if INTERPRETED else 660
    queries, keys = normal(rows, dim).to(DEVICE), normal(size, dim, seed=1).to(DEVICE)
    queries[3] = 0  # all codes are near: a wide row
    bias = minus_squares(keys) if distances else None
    found = near_codes(queries, keys, bias, 0.3, torch.bfloat16, "triton")
    expected = near_codes(queries, keys, bias, 0.3, torch.float32)
    assert found.counts[0] == 1 - distances
    assert all(torch.equal(a, b) for a, b in zip(found[:2] + found[3:], expected[:2] + expected[3:], strict=True))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-13, atol=0)  # sums in another order


@on_device
def test_two_runs_agree_to_the_bit():
    z, codebook = normal(70, 16), normal(130, 16, seed=1)
    first, second = (outcome(z, codebook, "triton", torch.float32, products="bf16") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
def test_a_nan_in_one_row_leaves_the_others_alone():
    z, codebook = normal(5, 8).to(DEVICE), normal(50, 8, seed=1).to(DEVICE)
    spoiled = z.clone()
    spoiled[2, 3] = float("nan")
    others = [0, 1, 3, 4]
    options = {"scan": torch.bfloat16, "implementation": "triton"}
    found, expected = near_codes(spoiled, codebook, **options), near_codes(z, codebook, **options)
    assert torch.equal(found.best[others], expected.best[others])
    assert 0 <= found.best[2] < 50


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts")
@pytest.mark.parametrize(("rows", "size", "dim", "biased"), [(9, 1024, 24, True), (5, 1024, 300, False)])
def test_traffic_is_counted_as_the_interpreter_loads_and_stores(rows, size, dim, biased, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    from benchmarks.traffic import recorded, traffic
    from lexel.kernels import triton_search, triton_softmax
    from lexel.kernels.inputs import Inputs

    counted = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(builder, pointers, mask, *rest):
        value = load(builder, pointers, mask, *rest)
        counted["read"] += int(mask.data.sum()) * value.data.dtype.itemsize
        return value

    def counting_store(builder, pointers, value, mask, *rest):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        counted["written"] += int(mask.data.sum()) * size
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    z, codes, g = normal(rows, dim), normal(size, dim, seed=1), normal(rows, dim, seed=2)
    bias = minus_squares(codes) if biased else None
    with recorded(start=True) as launches:
        low, lengths, losses = triton_search.prepare(codes)
        largest = codes.new_zeros(()) if bias is None else bias.abs().amax().float()
        short, below, ties = triton_search.bounds(z, lengths.amax(), losses.amax(), largest, 0.0)
        listed, found = triton_search.near_groups(triton_search.group_maxima(short, low, bias, 16, 64), below, 32)
        last = triton_search.list_codes(z, codes, bias, ties, listed, found, 0.0, 16, 64, 16)[-1]
        if dim <= 256:
            triton_softmax.soft(Inputs(z, codes, None, biased, 1.0, 0.01, False, 16, 1, 1, True), g, bias)
    assert not last[0], "no row is wide"
    near, chosen = found.sum().item() / rows, last[1].item() / rows
    each = [traffic(launch, near, chosen) for launch in launches]
    assert len({launch.kernel for launch in launches}) == (7 if dim <= 256 else 5)
    assert counted["read"] == pytest.approx(sum(one.read for one in each), rel=1e-9)
    assert counted["written"] == pytest.approx(sum(one.written for one in each), rel=1e-9)
