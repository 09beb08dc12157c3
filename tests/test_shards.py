"""States in shards: written by several processes in the background, read by any number, checked, never executed."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from lexel import shards
from lexel.errors import UsageError

ROWS = torch.arange(30.0).view(10, 3)


def state(rows: torch.Tensor) -> dict:
    return {
        "model": {"rows": rows, "same": torch.tensor([1.0, 2.0])},
        "optimizer": {"rows": {"step": torch.tensor(7.0)}},
    }


def work(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.set_num_threads(1)
    for count in (2, 3):
        if rank >= count:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{count}", rank=rank, world_size=count)
        mesh = init_device_mesh("cpu", (count,))
        if count == 2:
            writing = shards.begin(folder / "s", state(distribute_tensor(ROWS, mesh, [Shard(0)])), dist.new_group())
            torch.save(writing.finish(), folder / f"digests-{rank}.pt")
            assert writing.done
        else:
            empty = state(distribute_tensor(torch.zeros(10, 3), mesh, [Shard(0)]))
            shards.load(folder / "s", empty)
            found = empty["model"]["rows"]
            assert isinstance(found, DTensor)
            assert len(found.to_local()) < 10
            assert torch.equal(found.full_tensor(), ROWS)
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """What two processes wrote and three have read."""
    import torch.distributed.tensor  # a second, which the processes forked here need not spend again

    folder = tmp_path_factory.mktemp("shards")
    multiprocessing.start_processes(work, args=(folder,), nprocs=3, start_method="fork")
    digests = torch.load(folder / "digests-0.pt") | torch.load(folder / "digests-1.pt")
    return folder / "s", digests


def copied(written, tmp_path) -> tuple[Path, dict[str, str]]:
    folder, digests = written
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path, digests


def test_what_two_processes_wrote_is_read_by_one(written):
    folder, digests = written
    assert sorted(digests) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    shards.check(folder, digests)
    assert torch.equal(shards.read(folder, "model")["rows"], ROWS)
    empty = state(torch.zeros(10, 3))
    shards.load(folder, empty)
    assert torch.equal(empty["model"]["rows"], ROWS)
    assert empty["optimizer"]["rows"]["step"] == 7


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_or_missing_shard_is_named(written, tmp_path, name):
    folder, digests = copied(written, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        shards.check(folder, digests)
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"it has no {name}"):
        shards.check(folder, digests)
    with pytest.raises(UsageError, match="cannot be read"):
        shards.read(folder, "model")
    with pytest.raises(UsageError, match="it has no"):
        shards.check(folder, {"../other": "0"})


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("module, name", [("torch.distributed.checkpoint.metadata", "os.system"), ("os", "system")])
def test_nothing_in_a_description_is_executed(written, tmp_path, monkeypatch, module, name):
    folder, _ = copied(written, tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="not plain data"):
        shards.read(folder, "model")
    # A dotted name reaches what a module imports.
    text = b"touch executed"
    (folder / ".metadata").write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93"
        b"\x8c" + bytes([len(text)]) + text + b"\x85R."
    )
    with pytest.raises(UsageError, match="not plain data"):
        shards.load(folder, state(torch.zeros(10, 3)))
    assert not (tmp_path / "executed").exists()


def test_a_state_that_is_not_there_is_told(written):
    with pytest.raises(UsageError, match="cannot be read"):
        shards.load(written[0], {"model": {"other": torch.zeros(2)}})
