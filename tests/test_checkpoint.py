"""What is written is read back exactly, whole or not at all, and nothing in a file is executed."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lexel import checkpoint
from lexel.checkpoint import (
    atomic,
    fingerprint,
    load_folder,
    load_state,
    load_strict,
    save_folder,
    save_state,
)
from lexel.errors import UsageError

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "model", {"width": 3}, TENSORS)
    return tmp_path / "model"


def test_a_folder_comes_back_as_it_was_saved(folder):
    config, tensors = load_folder(folder)
    assert config == {"width": 3}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
    assert names(folder) == ["config.json", "model.safetensors"]


def test_channels_last_weights_are_saved_by_value(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_folder(tmp_path, {}, {"weight": weight})
    assert torch.equal(load_folder(tmp_path)[1]["weight"], weight)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic(path) as partial:
            partial.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_killed_process_leaves_the_old_state(tmp_path):
    """The process dies between the write and the rename; the next one reads the old state and can save again."""
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def die():
        checkpoint._sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        save_state(path, {"step": 2})

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load_state(path) == {"step": 1}
    save_state(path, {"step": 3})
    assert load_state(path) == {"step": 3}
    assert names(tmp_path) == ["state.pt"]


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1}
    assert names(tmp_path) == ["state.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_says_so_whatever_was_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_partial", lambda path: path.with_name(f".partial-{path.name}"))
    (tmp_path / ".partial-state.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as of_torch:  # torch itself raises a RuntimeError
        save_state(tmp_path / "state.pt", {"weight": torch.zeros(10**6)})
    (tmp_path / ".partial-model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as of_safetensors, atomic(tmp_path / "model.safetensors"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert of_torch.value.errno == of_safetensors.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_an_error_of_a_writer_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"), atomic(tmp_path / "file"):
        raise RuntimeError("of its own")
    assert names(tmp_path) == []


def test_a_training_state_comes_back_with_its_types(tmp_path):
    state = {
        "step": 7,
        "best": 0.5,
        "name": "adam",
        "none": None,
        "flags": [True, False],
        "nested": {"moments": (torch.ones(2), torch.zeros(1, dtype=torch.bfloat16)), 3: "integer keys"},
    }
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    moments = loaded["nested"].pop("moments")
    expected = state["nested"].pop("moments")
    assert loaded == state
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moments, expected, strict=True))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, zipped):
    path, target = tmp_path / "state.pt", tmp_path / "ran"
    torch.save({"step": Hostile(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"posix\.mkdir.*could run code are refused"):
        load_state(path)
    assert not target.exists()
    with path.open("rb") as file, pytest.raises(Exception):  # noqa: B017, the control: a plain load does run it
        torch.load(file, weights_only=False)["missing"]
    assert target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused(tmp_path):
    path, target = tmp_path / "state.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(UsageError, match=r"is not read|cannot be read"):
        load_state(path)
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_a_truncated_state_gives_one_line(tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError) as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_state_in_which_a_bit_has_changed_is_refused(tmp_path, place):
    path = tmp_path / "state.pt"
    save_state(path, {"weights": torch.randn(10_000)})
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"state.pt is damaged: \S+ does not match its checksum"):
        load_state(path)


def test_a_missing_state_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"state\.pt is not a file"):
        load_state(tmp_path / "state.pt")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_folder_is_refused_with_what_is_missing(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=f"not a whole model folder: it has no {missing}"):
        load_folder(folder)


def test_a_truncated_weights_file_gives_one_line(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match="truncated or no safetensors file") as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


def test_a_configuration_that_is_no_json_gives_one_line(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not valid JSON"):
        load_folder(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="holds a list; an object was expected"):
        load_folder(folder)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist; give a model folder"):
        load_folder(tmp_path / "nothing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file; give a model folder"):
        load_folder(file)
    with pytest.raises(UsageError, match="is a file; give a folder to save to"):
        save_folder(file, {}, {})


def test_a_hub_id_comes_from_the_hubs_cache_without_the_network(folder, tmp_path, monkeypatch):
    """The layout of the hub's cache, made by hand."""
    repository = tmp_path / "cache" / "models--someone--model"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_folder("someone/model")[0] == {"width": 3}
    with pytest.raises(UsageError, match="someone/else is neither a folder here nor a repository"):
        load_folder("someone/else")


def test_a_folder_here_comes_before_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "someone" / "model")
    assert load_folder("someone/model")[0] == {"width": 3}


def test_strict_loading_names_what_is_missing_unknown_and_different():
    layer = nn.Linear(3, 2)
    load_strict(layer, TENSORS, "file")
    assert torch.equal(layer.weight, TENSORS["weight"])
    with pytest.raises(UsageError, match="file does not fit the linear: it lacks bias; it has unknown basi"):
        load_strict(layer, {"weight": TENSORS["weight"], "basi": TENSORS["bias"]}, "file")
    with pytest.raises(UsageError, match=r"differs in shape: weight is \(3, 2\) where \(2, 3\) is needed"):
        load_strict(layer, {**TENSORS, "weight": TENSORS["weight"].T}, "file")


def test_a_long_list_of_names_is_cut():
    tensors = {f"name{number}": torch.zeros(1) for number in range(9)}
    with pytest.raises(UsageError, match="has unknown name0, name1, name2 and 6 more"):
        load_strict(nn.Identity(), tensors, "file")


def test_the_fingerprint_changes_with_every_part():
    base = fingerprint({"width": 3}, TENSORS)
    assert base == fingerprint({"width": 3}, dict(reversed(TENSORS.items())))
    bias = TENSORS["bias"]
    variants = [
        fingerprint({"width": 4}, TENSORS),
        fingerprint({"width": 3}, {**TENSORS, "bias": bias + 1}),
        fingerprint({"width": 3}, {**TENSORS, "bias": bias.double()}),
        fingerprint({"width": 3}, {**TENSORS, "bias": bias.view(1, 2)}),
        fingerprint({"width": 3}, {"weight": TENSORS["weight"], "offset": bias}),
    ]
    assert len({base, *variants}) == 6


def test_the_fingerprint_reads_half_precision_and_scalars():
    assert len(fingerprint({}, {"a": torch.tensor(1.0), "b": torch.ones(2, dtype=torch.bfloat16)})) == 64


def test_json_keeps_the_configuration_readable(folder):
    assert json.loads((folder / "config.json").read_text()) == {"width": 3}


def test_two_writers_of_one_path_do_not_share_a_temporary_file(tmp_path):
    with atomic(tmp_path / "a.txt") as first:
        first.write_text("first")
        with atomic(tmp_path / "a.txt") as second:
            assert second != first
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_temporary_name_is_no_longer_than_a_name_may_be(tmp_path):
    longest = tmp_path / ("n" * 251 + ".txt")
    with atomic(longest) as partial:
        partial.write_text("whole")
    assert longest.read_text() == "whole"


def test_files_have_the_rights_that_the_umask_allows(tmp_path):
    save_folder(tmp_path, {}, {"weight": torch.zeros(2)})
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {expected}


def test_a_state_that_claims_to_span_disks_is_refused_in_one_line(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"a": torch.arange(3)})
    data = bytearray(path.read_bytes())
    locator = data.find(b"PK\x06\x07")  # of the end record of 64-bit archives: the disk it is on, and how many
    assert locator >= 0 or data.rfind(b"PK\x05\x06") >= 0
    if locator < 0:
        end = data.rfind(b"PK\x05\x06")
        data[end:end] = b"PK\x06\x07" + bytes(12) + (9).to_bytes(4, "little")
    else:
        data[locator + 16 : locator + 20] = (9).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is damaged: zipfiles that span multiple disks"):
        load_state(path)
