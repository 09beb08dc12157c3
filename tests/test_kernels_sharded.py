"""A codebook whose rows are spread over processes finds, and learns, what a whole one does."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lexel.errors import UsageError
from lexel.kernels import index_backpropagation, nearest, sharded

N, K, D = 12, 64, 6  # rows of each of two processes, codes of both
SIMILARITIES = ("dot", "l2", "cosine")
# The entropy temperature decides whether rows have a list of near codes or are wide.
CASES = [
    {"similarity": similarity, "entropy_temperature": tau, **groups}
    for similarity, tau, groups in itertools.product(
        SIMILARITIES, (0.01, 0.5), ({"entropy_parts": 1}, {"entropy_parts": 3}, {"entropy_processes": 2})
    )
]
DTYPES = (torch.float64, torch.float32)


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    z, table, weights = (torch.randn(*shape, generator=generator) for shape in ((2 * N, D), (K, D), (2 * N, D)))
    table[40], table[7] = table[3], table[3]  # equal codes, in both halves
    z[:4] = 3 * table[3]
    return z.to(dtype), table.to(dtype), weights.to(dtype)


def objective(z_q, losses, weights):
    terms = {"quantization": 0.7, "commitment": 0.3, "codebook": 0.2, "entropy_sample": 0.5, "entropy_batch": -0.4}
    return (z_q * weights).sum() / len(z_q) + sum(terms[name] * loss for name, loss in losses.items())


def run(call, z, table, weights):
    z, table = z.clone().requires_grad_(), table.clone().requires_grad_()
    z_q, indices, losses = call(z, table)
    total = objective(z_q, losses, weights)
    return [z_q.detach(), indices, total.detach(), *torch.autograd.grad(total, (z, table))]


def work(rank: int, folder: Path, cases) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own, share, found = slice(rank * N, rank * N + N), slice(rank * K // 2, rank * K // 2 + K // 2), {}
    for dtype in DTYPES:
        z, table, weights = inputs(dtype)
        for number, case in enumerate(cases):
            call = lambda z, table, case=case: sharded.index_backpropagation(z, table, rows=5, **case)  # noqa: E731
            found[dtype, number] = run(call, z[own], table[share], weights[own])
        for similarity in SIMILARITIES:
            found[dtype, similarity] = sharded.nearest(z[own], table[share], similarity)

        def looked_up(z, table, dtype=dtype):
            return sharded.lookup(sharded.nearest(z, table), table), torch.zeros(1), {"codebook": z.square().mean()}

        found[dtype, "lookup"] = run(looked_up, z[own], table[share], weights[own])
    for wrong, rows in (("latents", N + rank), ("codes", N)):
        with pytest.raises(UsageError, match="as many latents" if wrong == "latents" else "cannot share 65 codes"):
            sharded.nearest(z[:rows], table[share]) if wrong == "latents" else sharded.share_of_codes(65)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def check(found, dtype, key, expected):
    """Two halves beside the whole: rows and codes in order; the mean objective; gradients as DDP averages them."""
    first, second = (part[dtype, key] for part in found)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-5}
    z_q, indices, total, d_z, d_table = expected
    torch.testing.assert_close(torch.cat([first[0], second[0]]), z_q, rtol=0, atol=0)
    assert key == "lookup" or torch.equal(torch.cat([first[1], second[1]]), indices)
    torch.testing.assert_close((first[2] + second[2]) / 2, total, **tolerance)
    torch.testing.assert_close(torch.cat([first[3], second[3]]) / 2, d_z, **tolerance)
    torch.testing.assert_close(torch.cat([first[4], second[4]]), d_table, **tolerance)


@pytest.mark.parametrize("cases", [CASES[1::5], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_halves_of_a_codebook_give_the_indices_losses_and_gradients_of_the_whole(tmp_path, cases):
    multiprocessing.start_processes(work, args=(tmp_path, cases), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype in DTYPES:
        z, table, weights = inputs(dtype)
        for number, case in enumerate(cases):
            parts = 2 * case.get("entropy_parts", 1) // case.get("entropy_processes", 1)
            whole = {**case, "entropy_parts": parts, "entropy_processes": 1}
            expected = run(lambda z, table, whole=whole: index_backpropagation(z, table, **whole), z, table, weights)
            check(found, dtype, number, expected)
        for similarity in SIMILARITIES:
            both = torch.cat([part[dtype, similarity] for part in found])
            assert torch.equal(both, nearest(z, table, similarity))
        assert both[:4].tolist() == [3] * 4  # of equal codes the lowest, though another process has one too

        def looked_up(z, table):
            codes = torch.nn.functional.embedding(nearest(z, table), table)
            return codes, torch.zeros(1), {"codebook": z.square().mean()}

        check(found, dtype, "lookup", run(looked_up, z, table, weights))
