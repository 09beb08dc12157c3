"""Several processes give the result of one, whatever their number: nothing is padded, nothing counted twice."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_evaluate import QUICK, Stopped, assert_same, image_set, pictures, save, stop_after
from toys import Grey

from lexel.errors import UsageError
from lexel.evaluate import evaluate_samples, evaluate_tokenizer
from lexel.parts import Part


def measure(folder: Path, **options) -> list[dict]:
    return [
        evaluate_tokenizer(
            Grey(), folder / "images", QUICK, metrics=[*QUICK.reconstruction, "unseen_codes"], batch_size=3, **options
        ),
        evaluate_samples(folder / "samples.npz", image_set(), QUICK, batch_size=4),
    ]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for processes in (3, 2):
        if rank >= processes:
            return
        os.environ["LEXEL_CACHE"] = str(folder / f"cache-{processes}")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet-{processes}", rank=rank, world_size=processes
        )
        if processes == 3:  # stopped with different shares taken in; the two that come next go on from there
            try:
                measure(folder, resume=folder / "state", save_every=0.0, progress=stop_after(3 + rank))
            except Stopped:
                torch.save(None, folder / f"stopped-{rank}")
            dist.barrier()
            results = measure(folder)
            with pytest.raises(UsageError) as error:
                measure(folder, max_unreadable=0.01)
            (folder / f"too-many-{rank}").write_text(str(error.value))
        else:
            results = measure(folder, resume=folder / "state")
        torch.save(results, folder / f"result-{processes}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def test_two_and_three_processes_with_uneven_shares_give_the_result_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache-1"))
    images = save(tmp_path / "images", pictures())  # 23: shares of 8, 8 and 7, or of 12 and 11
    (images / "0004.png").write_bytes(b"no image")
    np.savez(tmp_path / "samples.npz", arr_0=pictures(20, seed=5))
    expected = measure(tmp_path)
    # Forked: three fresh processes would import torch three times.
    multiprocessing.start_processes(work, args=(tmp_path,), nprocs=3, start_method="fork")
    assert len(list(tmp_path.glob("stopped-*"))) == 3
    assert not (tmp_path / "state").exists()
    too_many = [(tmp_path / f"too-many-{rank}").read_text() for rank in range(3)]  # only one of them met it
    assert len(set(too_many)) == 1
    assert too_many[0].startswith(
        "1 of 23 images cannot be read, more than max_unreadable = 0.01 allows; the first, 0004"
    )
    for processes in (2, 3):
        for rank in range(processes):
            results = torch.load(tmp_path / f"result-{processes}-{rank}.pt", weights_only=False)
            for result, one in zip(results, expected, strict=True):
                assert_same(result, one)
                assert result["processes"] == processes
            assert results[0]["data"]["unreadable"]["count"] == 1
            assert results[0]["data"]["images"] == 22


@pytest.mark.parametrize("stopped", [False, True])
def test_parts_that_know_nothing_of_each_other_give_the_bits_of_one(tmp_path, monkeypatch, stopped):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    images = save(tmp_path / "images", pictures())
    (images / "0004.png").write_bytes(b"no image")
    np.savez(tmp_path / "samples.npz", arr_0=pictures(20, seed=5))
    expected = measure(tmp_path)
    images, samples, seen = tmp_path / "of images", tmp_path / "of samples", []

    def both(**options):
        options = {"batch_size": 3, **options}
        return [
            evaluate_tokenizer(
                Grey(),
                tmp_path / "images",
                QUICK,
                metrics=[*QUICK.reconstruction, "unseen_codes"],
                resume=images,
                **options,
            ),
            evaluate_samples(tmp_path / "samples.npz", image_set(), QUICK, resume=samples, **options),
        ]

    for number in (3, 1, 2):
        part = {"part": Part(number, 3), "cache": number != 1}
        if stopped:
            with pytest.raises(Stopped):
                both(**part, save_every=0.0, progress=stop_after(1))
        assert [result["part"] for result in both(**part)] == [f"{number}/3"] * 2
    results = both(progress=lambda *done: seen.append(done))
    assert not seen  # nothing is measured again
    assert not images.exists()
    for result, one in zip(results, expected, strict=True):
        assert_same(result, one)
        for name in ("l1", "psnr", "ssim"):
            assert result["metrics"].get(name) == one["metrics"].get(name)  # to the bit


def test_parts_that_share_images_are_refused(tmp_path):
    for part in (Part(1, 2), Part(2, 3)):
        evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=3, resume=tmp_path, part=part)
    with pytest.raises(UsageError, match="parts that share images"):
        evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=3, resume=tmp_path)
    with pytest.raises(UsageError, match="needs a folder for its state"):
        evaluate_tokenizer(Grey(), image_set(), QUICK, part=Part(1, 2))


def work_as_torchrun_starts_it(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["LOCAL_RANK"] = str(rank)
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=3)
    torch.save(result, folder / f"result-{rank}.pt")
    dist.barrier()


def test_processes_of_torchrun_find_each_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(work_as_torchrun_starts_it, args=(tmp_path, port), nprocs=2, start_method="fork")
    expected = evaluate_tokenizer(Grey(), image_set(), QUICK)
    for rank in range(2):
        result = torch.load(tmp_path / f"result-{rank}.pt", weights_only=False)
        assert result["processes"] == 2
        assert_same(result, expected)


@pytest.mark.parametrize("name", ["sum", "bank"])
def test_without_other_processes_joining_changes_nothing(name):
    from lexel.metrics import FeatureBank, MomentState

    state = MomentState(3) if name == "sum" else FeatureBank(3)
    rows = torch.randn(5, 3)
    state.add(rows) if name == "sum" else state.add(rows, torch.arange(5))
    before = state.moments().mean if name == "sum" else state.features()
    state.all_reduce()
    assert torch.equal(state.moments().mean if name == "sum" else state.features(), before)
