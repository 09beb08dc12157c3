"""Quantizers in two processes: statistics are those of one, whatever the shares, and evaluation asks nobody."""

from typing import Any

import pytest
import torch
from processes import run_together
from torch import Tensor

from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS, build

RESTARTING = ["ema", "vq", "cosine", "ibq", "soft", "affine"]
RUNNING: list[tuple[str, dict[str, Any]]] = [("ema", {}), ("ema", {"start": "kmeans"})]
RUNNING += [("affine", {}), ("ibq_affine", {})]
RUNNING += [(kind, {"restart_below": 0.995}) for kind in RESTARTING]
RUNNING += [(kind, {"clustering": True}) for kind in ("vq", "cosine")]
SHARES = {"even": (2, 2), "uneven": (3, 1)}
ENTROPIC = ["ibq", "lfq", "bsq"]
STATISTICS = [1, 2, 4, "process", "global"]

WORKER = f"""
import os, sys, torch, torch.distributed as dist
from lexel.quantizers import QUANTIZERS
rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)

def batch(step, scale=1.0):
    return scale * torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step))

def own(images, shares):
    return images[rank * shares[0]:rank * shares[0] + shares[rank]]

def entropy(kind, statistics, shares):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[kind](64, 8, statistics=statistics).double()
    z = own(batch(0, 0.1), shares).double().requires_grad_()
    term = quantizer(z).losses["entropy_batch"]
    return [term.detach(), torch.autograd.grad(term, z)[0]]

built = {{}}
for name, shares in {SHARES}.items():
    for kind, options in {RUNNING}:
        torch.manual_seed(0)
        built[name, kind, str(options)] = QUANTIZERS[kind](64, 8, **options)  # before there are processes
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)

results = {{}}
for key, quantizer in built.items():
    for step in range(3):
        quantizer(own(batch(step), {SHARES}[key[0]]))
    results[" ".join(key)] = quantizer.state_dict()
for kind in {ENTROPIC}:
    for statistics in {STATISTICS}:
        results[f"{{kind}} {{statistics}}"] = entropy(kind, statistics, (2, 2))
    results[f"{{kind}} uneven"] = entropy(kind, "global", (3, 1))
if rank == 0:  # one process evaluates alone, the other waits
    for kind in QUANTIZERS:
        quantizer = QUANTIZERS[kind](64, 8).eval()
        quantizer(batch(0))
        quantizer.assign(batch(0))
    for kind in {ENTROPIC}:
        quantizer = QUANTIZERS[kind](64, 8, statistics="global")
        quantizer.eval()(batch(0))
        with torch.no_grad():
            quantizer.train()(batch(0))
dist.barrier()
torch.save(results, f"{{folder}}/out.{{rank}}")
"""


def batch(step: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two processes found; each has to end by itself."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(WORKER, [folder])
    first, second = (torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(2))
    return first, second


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind, options", RUNNING, ids=str)
def test_two_processes_keep_the_running_statistics_of_one(two, kind, options, shares):
    first, second = (results[f"{shares} {kind} {options}"] for results in two)
    torch.manual_seed(0)
    one = QUANTIZERS[kind](64, 8, **options)
    start = one.codebook.clone()
    for step in range(3):
        one(batch(step))
    assert not torch.equal(one.codebook, start)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(first[name], value, msg=name)
        assert torch.equal(first[name], second[name]), f"{name} differs between processes"


def entropy(kind: str, statistics: int | str) -> tuple[Tensor, Tensor]:
    """The batch entropy of four images in one process, and its gradient for the latents."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS[kind](64, 8, statistics=statistics).double()
    z = batch(0, 0.1).double().requires_grad_()
    term = quantizer(z).losses["entropy_batch"]
    return term.detach(), torch.autograd.grad(term, z)[0]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", ENTROPIC)
def test_the_batch_entropy_is_the_same_on_any_number_of_processes(two, kind, statistics):
    first, second = (results[f"{kind} {statistics}"] for results in two)
    # In one process the batch of a process is everything: two of them have two images each.
    term, gradient = entropy(kind, 2 if statistics == "process" else statistics)
    # Data-parallel training averages the terms and the gradients of both processes.
    torch.testing.assert_close((first[0] + second[0]) / 2, term)
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, gradient)
    assert not torch.isclose(entropy(kind, 1)[0], entropy(kind, 4)[0])


@pytest.mark.parametrize("kind", ENTROPIC)
def test_uneven_shares_give_the_batch_entropy_of_all(two, kind):
    first, second = (results[f"{kind} uneven"] for results in two)
    term, gradient = entropy(kind, "global")
    torch.testing.assert_close(first[0], term)
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, gradient)


@pytest.mark.parametrize("kind", ENTROPIC)
def test_a_group_of_images_that_cannot_be_formed_is_refused(kind):
    with pytest.raises(UsageError, match="statistics over 3 images cannot be taken from 1 x 4 images a step"):
        build(kind, {"codebook_size": 64, "codebook_dim": 8, "statistics": 3})(batch(0))
    for wrong in ("all", 0, 1.5, True):
        with pytest.raises(UsageError, match="statistics"):
            build(kind, {"codebook_size": 64, "codebook_dim": 8, "statistics": wrong})
