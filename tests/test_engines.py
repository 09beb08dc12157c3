"""Engines that run commands elsewhere: each part once and whole, whatever they lose on the way."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_tokens import contents
from typer.testing import CliRunner

from lexel import engines
from lexel.cli import app
from lexel.errors import UsageError
from lexel.tokenizer import Tokenizer, TokenizerConfig

# The engine, its options, and what must be here: a package, and a command where jobs go to a cluster of this machine.
ENGINES = {
    "local": ("local", {}, None, None),
    "slurm, processes of submitit": ("slurm", {"cluster": "local"}, "submitit", None),
    "slurm": ("slurm", {"timeout_min": 10}, "submitit", "sbatch"),
    "ray": ("ray", {"num_cpus": 0.1}, "ray", None),
}


class Flaky:
    """An engine that fails some commands on their first try."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.ran = list(statuses), []

    def __call__(self, commands, notes, options):
        self.ran.append([command[0] for command in commands])
        return [self.statuses.pop(0) for _ in commands]


def test_what_failed_is_run_again_and_what_is_done_is_not(monkeypatch):
    flaky, told = Flaky(0, -9, 1, 0, 0), []
    monkeypatch.setitem(engines.ENGINES, "flaky", flaky)
    engines.run_all([["a"], ["b"], ["c"]], "flaky", Path("notes"), say=told.append)
    assert flaky.ran == [["a", "b", "c"], ["b", "c"]]
    assert told == ["2 of 3 parts failed; the first, part 2, ended with -9; they are run again"]


def test_what_fails_every_time_and_what_the_user_must_mend_is_told(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "flaky", Flaky(1, 1, 1))
    with pytest.raises(UsageError, match="part 1, ended with 1, 3 times: run `lexel a b` to see why"):
        engines.run_all([["a", "b"]], "flaky", Path("notes"))
    wrong = Flaky(2, 0)
    monkeypatch.setitem(engines.ENGINES, "flaky", wrong)
    with pytest.raises(UsageError, match="ended with 2: run `lexel a`"):
        engines.run_all([["a"], ["b"]], "flaky", Path("notes"))
    assert len(wrong.ran) == 1
    with pytest.raises(UsageError, match="unknown engine 'slrum'"):
        engines.run_all([["a"]], "slrum", Path("notes"))
    with pytest.raises(UsageError, match="the engine local has no option 'gpus'; it has at_once"):
        engines.run_all([["a"]], "local", Path("notes"), {"gpus": 1})
    for wrong in ("abc", 0, 1.5):
        with pytest.raises(UsageError, match=f"at_once is the number .*, 1 or more; got {wrong!r}"):
            engines.run_all([["a"]], "local", Path("notes"), {"at_once": wrong})


def test_an_option_of_an_engine_without_a_value_is_named():
    command = ["encode", "a", "b", "--out", "c", "--parts", "2", "--engine", "local", "--engine-option", "x"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == "--engine-option 'x' is not of the form name=value"


def test_a_missing_package_is_named(monkeypatch):
    for name, package in (("slurm", "submitit"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"pip install 'lexel\\[{name}\\]'"):
            engines.run_all([["a"]], name, Path("notes"))


class UnknownJob:
    """A job of submitit on a cluster that keeps no accounts: it has a result once that was looked for so often."""

    job_id, state = "17_2", "UNKNOWN"

    def __init__(self, after: int) -> None:
        self.left = after

    def done(self) -> bool:
        self.left -= 1
        return self.left < 0

    def result(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("squeue", "ended"),
    [
        ("exit 0", -1),  # asked for a job that has ended
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", -1),  # that ended long ago
        ("echo 17_2 PENDING", 0),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", 0),
    ],
    ids=["gone", "forgotten", "queued", "no answer"],
)
def test_a_job_that_left_slurms_queue_without_a_result_is_not_waited_for(tmp_path, monkeypatch, squeue, ended):
    class Executor:
        def __init__(self, **options):
            pass

        update_parameters = __init__

        def map_array(self, function, commands):
            return [UnknownJob(8) for _ in commands]

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(engines, "QUEUE_LOOKS", 0.001)
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert engines.slurm([["a"]], tmp_path, {}) == [ended]


@pytest.mark.parametrize("error", [AssertionError("of type int\nnot str"), RuntimeError("sbatch:\nno such partition")])
def test_what_submitit_refuses_is_told_in_one_line(tmp_path, monkeypatch, error):
    class Executor:
        def __init__(self, **options):
            pass

        def update_parameters(self, **options):
            raise error

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    with pytest.raises(UsageError, match=r"^submitit does not take the jobs: (of type int not|sbatch: no such) \w+$"):
        engines.slurm([["a"]], tmp_path, {"timeout_min": "abc"})


def test_parts_that_no_node_of_ray_can_take_are_not_waited_for_in_silence(tmp_path, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}}]
    ray = types.SimpleNamespace(
        is_initialized=lambda: True,
        remote=lambda **options: lambda function: types.SimpleNamespace(remote=lambda command: 0),
        nodes=lambda: nodes,
        get=lambda ended: ended,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert engines.by_ray([["a"]], tmp_path, {"num_cpus": 4}) == [0]
    with pytest.raises(UsageError, match=r"no node of Ray has 1 CPU and 0\.5 GPU for a part; ask for less"):
        engines.by_ray([["a"]], tmp_path, {"num_gpus": 0.5})
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.warns(UserWarning, match="no node of Ray has 5 CPU for a part; the parts wait until one comes"):
        assert engines.by_ray([["a"]], tmp_path, {"num_cpus": 5}) == [0]


@pytest.fixture
def model(tmp_path) -> Path:
    for number in range(10):
        picture = np.random.default_rng(number).integers(0, 256, (8, 8 + number % 3, 3), np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    small = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": [], "middle_attention": False}
    config = {
        "quantizer": {"kind": "vq", "codebook_size": 8, "codebook_dim": 4},
        "autoencoder": {**small, "z_channels": 4, "groups": 2},
    }
    Tokenizer(TokenizerConfig.model_validate(config)).save_pretrained(tmp_path / "model")
    return tmp_path


def arguments(folder: Path, out: str, size: str) -> list[str]:
    command = ["encode", str(folder / "model"), str(folder / "pictures"), "--out", str(folder / out), "--size", size]
    return [*command, "--shard-size", "2", "--device", "cpu"]


def encode(folder: Path, out: str, size: str, *more: str) -> str:
    result = CliRunner().invoke(app, [*arguments(folder, out, size), *more])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def kill_one(folder: Path, condition: str, monkeypatch) -> None:
    """The first process for which this holds is killed as it begins, on whichever machine it is."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"mark = {str(folder / 'killed')!r}\n"
        f"if {condition} and not os.path.exists(mark):\n"
        "    open(mark, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.mark.slow
@pytest.mark.parametrize("where, size", [*((where, "8") for where in ENGINES), ("local", "native")])
def test_parts_by_an_engine_of_which_one_is_killed_give_the_bytes_of_one_process(model, monkeypatch, where, size):
    engine, options, package, command = ENGINES[where]
    if package:
        pytest.importorskip(package)
    if command and shutil.which(command) is None:
        pytest.skip(f"there is no {command}")
    encode(model, "one", size)
    kill_one(model, "'2/3' in getattr(sys, 'orig_argv', [])", monkeypatch)
    given = [text for pair in options.items() for text in ("--engine-option", "{}={}".format(*pair))]
    output = encode(model, "parts", size, "--parts", "3", "--engine", engine, *given)
    assert (model / "killed").exists()
    assert "10 pictures as" in output
    assert contents(model / "parts") == contents(model / "one")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8", "native"])
def test_processes_of_torchrun_of_which_one_is_killed_give_the_bytes_of_one(model, monkeypatch, size):
    encode(model, "one", size)
    kill_one(model, "os.environ.get('RANK') == '1'", monkeypatch)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "lexel", *arguments(model, "shared", size)],
        check=True,
        capture_output=True,
        timeout=240,
    )
    assert (model / "killed").exists()
    assert contents(model / "shared") == contents(model / "one")
