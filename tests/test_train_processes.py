"""The same global batch gives the same training on any number of processes, to the rounding of float64."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lexel.config import check, flatten
from lexel.data import TRANSFORMS, training_batches
from lexel.data.images import ArrayImages
from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS, sharding
from lexel.tokenizer import Tokenizer
from lexel.train.optimization import seed_step
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import Learner

STEPS = 4
# What a case changes in the recipe. Quantizers that draw random numbers are left out: each process draws its own.
OPTIONS = {"ibq": {"statistics": "global"}, "lfq": {"statistics": 2}, "bsq": {"statistics": "global"}}
RANDOM = {"gumbel", "nested"}


def case(kind, accumulation=1, first=True, batch=8, spread=False, **discriminator):
    options = {"kind": kind, "accumulation": accumulation, "first": first, "batch": batch, "spread": spread}
    return {**options, **discriminator}


# Losses with a projector and a balanced weight, and a discriminator on a frozen network's features.
ALIGNED = {
    "weights": {"l1": 1.0, "adversarial": 0.1, "va_vae": 0.5, "decoder": 0.3, "gram": 2.0},
    "losses": {
        "va_vae": {"teacher": "random"},
        "decoder": {"kind": "repa", "teacher": "random", "at": "decoder.middle", "level": 0, "hidden": 8},
        "gram": {"network": "random"},
    },
    "discriminator": {"kind": "features", "width": 8, "options": {"network": "random"}},
}
QUICK = [case("ema", 2), case("ibq", 2, first=False, spread=True), case("vq", adaptive_over="process")]
KINDS = sorted(QUANTIZERS.keys() - RANDOM)


def recipe(kind, accumulation, first, batch, spread, train=None, **discriminator):
    quantizer = {"kind": kind, "codebook_dim": 4, **({} if kind == "none" else {"codebook_size": 16})}
    tables = {
        "model": {
            "quantizer": {**quantizer, **OPTIONS.get(kind, {})},
            "autoencoder": {
                "width": 4,
                "multipliers": [1, 2],
                "residual_blocks": 1,
                "attention_levels": [],
                "middle_attention": False,
                "z_channels": 4,
                "groups": 2,
            },
        },
        "data": {"source": "openmoji", "size": 8},
        "train": {
            "steps": STEPS,
            "batch_size": batch,
            "accumulation": accumulation,
            "lr": 1e-3,
            "clip": 1.0,
            "shard_codebook": spread,
            "weights": {"l1": 1.0, "adversarial": 0.1},
            "discriminator": {
                "layers": 1,
                "width": 4,
                "lecam": 0.05,
                "adaptive": True,
                "statistics": 2,
                "first": first,
                **discriminator,
            },
            **(train or {}),
        },
    }
    return check(tables, TokenizerRecipe, "test")


def trained(options, processes):
    """Everything that a few steps of a case leave behind, as a flat table of tensors, and the mean losses."""
    chosen = recipe(**{**options, "spread": options["spread"] and processes.count > 1})
    torch.manual_seed(0)
    learner = Learner(chosen, Tokenizer(chosen.model), processes)
    generator = np.random.default_rng(0)
    images = ArrayImages(
        generator.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), [f"{number}" for number in range(12)]
    )
    batches = training_batches(
        images,
        TRANSFORMS["published"](8),
        chosen.train.batch_size,
        0,
        rank=processes.rank,
        processes=processes.count,
        micro_batches=chosen.train.accumulation,
    )
    losses = {}
    for step in range(STEPS):
        seed_step(0, step, processes.rank)
        values = learner.step(next(batches).images.double(), True, 1.0)
        means = processes.reduce(list(values.values()))
        losses |= {f"{name} of step {step}": torch.tensor(mean) for name, mean in zip(values, means, strict=True)}
    state = flatten(learner.state_dict())
    # The discriminator is always in training mode: what its batch norm runs along is each process's own, and unread.
    unread = ("running_mean", "running_var", "num_batches_tracked")
    kept = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return losses | {name: value.clone() for name, value in kept.items() if not name.endswith(unread)}


def test_a_training_runs_beside_an_accelerator_of_another_precision():
    AcceleratorState._reset_state(True)  # of the trainings before
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        assert Processes("cpu", "float32").runtime.half is None
        assert Accelerator().mixed_precision == "bf16"  # the user's stays as it was
    finally:
        AcceleratorState._reset_state(True)


def work(rank, count, folder, port, cases, learn):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in shared.items()})
    AcceleratorState._reset_state(True)  # of the process that this one is a copy of
    processes = Processes("cpu")
    assert processes.count == count
    torch.save([learn(options, processes) for options in cases], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_several(count: int, folder: Path, cases, learn=trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: fresh processes would each import torch.
    multiprocessing.start_processes(work, args=(count, folder, port, cases, learn), nprocs=count, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture
def in_float64():
    """Rounding of float32 would be enlarged by Adam where a gradient is nothing but rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(tmp_path, cases, counts):
    alone = [trained(options, Processes("cpu")) for options in cases]
    for count in counts:
        found = on_several(count, tmp_path, cases)
        for options, one, *others in zip(cases, alone, *found, strict=True):
            for rank, other in enumerate(others):
                assert other.keys() == one.keys()
                for name, value in one.items():
                    message = f"{options}, {rank} of {count}: {name}, {value} alone, {other[name]} with {count}"
                    torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=message)


def test_two_processes_train_as_one_with_the_same_global_batch(in_float64, tmp_path):
    compare(tmp_path, QUICK[:2], [2])


@pytest.mark.thorough
def test_losses_that_learn_train_the_same_on_two_processes(in_float64, tmp_path):
    compare(tmp_path, [case("ibq", 2, train=ALIGNED)], [2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_quantizer_trains_the_same_on_one_two_and_four_processes(in_float64, tmp_path, kind):
    compare(tmp_path, [case(kind, accumulation, batch=16) for accumulation in (1, 2)], [2, 4])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ibq", "vq"])
def test_a_codebook_spread_over_processes_learns_what_a_whole_one_does(in_float64, tmp_path, kind):
    compare(tmp_path, [case(kind, accumulation, batch=16, spread=True) for accumulation in (1, 2)], [2, 4])


def test_only_tables_that_processes_can_share_are_spread():
    with pytest.raises(UsageError, match="codes of EMA cannot be spread over processes; those of vq and ibq can be"):
        sharding.shard(QUANTIZERS["ema"](8, 2))
    with pytest.raises(UsageError, match="do not restart"):
        sharding.shard(QUANTIZERS["vq"](8, 2, restart_below=1.0))
    for quantizer in (QUANTIZERS[kind](8, 2) for kind in ("vq", "ibq")):
        z, before = torch.randn(2, 2, 3), quantizer.state_dict()["weight"]
        expected = quantizer(z).z_q
        sharding.shard(quantizer)
        with sharding.whole(quantizer):
            assert not quantizer.sharded
        torch.testing.assert_close(quantizer(z).z_q, expected)
        sharding.gather(quantizer)
        assert torch.equal(quantizer.state_dict()["weight"], before)


def test_the_adaptive_weight_of_each_process_is_another_choice(in_float64, tmp_path):
    (first, second), one = on_several(2, tmp_path, QUICK[2:]), trained(QUICK[2], Processes("cpu"))
    name = "adversarial_weight of step 0"
    assert torch.equal(first[0][name], second[0][name])
    assert not torch.isclose(first[0][name], one[name])
