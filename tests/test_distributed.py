"""Sums, rows and values over processes."""

import torch
from processes import run_together

from lexel import distributed


def test_a_single_process_is_the_identity():
    rows = torch.arange(6.0).view(3, 2)
    assert distributed.processes() == 1
    assert distributed.rank() == 0
    assert distributed.all_rows(rows) is rows
    assert distributed.gather("a") == ["a"]
    assert distributed.broadcast("a") == "a"


def _with_two(rank: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    rows = distributed.all_rows(torch.full((rank + 1, 2), float(rank)))
    total = distributed.all_sum(torch.tensor([rank + 1.0]))
    value = torch.tensor([float(rank)], requires_grad=True)
    mean = distributed.mean_over_processes(value)
    mean.sum().backward()
    state = (rows, total, mean.detach(), value.grad, distributed.gather(rank), distributed.broadcast(f"from {rank}"))
    torch.save(state, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_same_rows_sums_and_values(tmp_path):
    run_together(
        f"import os\nfrom {__name__} import _with_two\n_with_two(int(os.environ['RANK']), {str(tmp_path)!r})", []
    )
    for rank in range(2):
        rows, total, mean, grad, gathered, broadcast = torch.load(tmp_path / f"{rank}.pt")
        assert rows.tolist() == [[0, 0], [1, 1], [1, 1]]  # in the order of ranks, with different numbers of rows
        assert total.tolist() == [3]
        assert mean.tolist() == [0.5]
        assert grad.tolist() == [1]
        assert gathered == [0, 1]
        assert broadcast == "from 0"
