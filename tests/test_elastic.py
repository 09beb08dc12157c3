"""Two processes under PyTorch's launcher: one is killed, one is told to end; the launcher and the run folder go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import draw_pictures, recipe, weights
from lexel.config import dump
from lexel.run_folder import RunFolder
from lexel.train.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow
STEPS = 8
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from benchmarks.faults import recipe
from lexel.train.tokenizer import train_tokenizer

pictures, out, victim, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def progress(now):
    (out / "reached").write_text(str(now.step))
    if first and victim == 0 and now.step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    if at < 0 and now.step >= 2:  # until it is told to end
        import time
        time.sleep(0.5)

if first and victim == 1 and os.environ["RANK"] == "1":
    from lexel.train.session import Session
    log = Session.log
    def killed(self, step, *rest):
        if step.done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, step, *rest)
    Session.log = killed
train_tokenizer(recipe(pictures, 8 if at >= 0 else 200), out, device="cpu", progress=progress)
"""


def launched(folder: Path, out: Path, victim: int, at: int, restarts: int) -> "subprocess.Popen[bytes]":
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(folder / "pictures"), str(out), str(victim), str(at)], env=environment)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_launcher_starts_a_killed_process_again_and_the_weights_are_those_of_undisturbed_work(tmp_path, victim):
    draw_pictures(tmp_path)
    assert launched(tmp_path, tmp_path / "straight", -1, 0, 0).wait(300) == 0
    assert launched(tmp_path, tmp_path / "killed", victim, 5, 2).wait(300) == 0
    assert RunFolder(tmp_path / "killed", writes=False).steps()[-1] == STEPS
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_the_command_trains_under_the_launcher_on_a_machine_without_a_gpu(tmp_path):
    draw_pictures(tmp_path)
    (tmp_path / "recipe.toml").write_text(dump(recipe(tmp_path / "pictures", STEPS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lexel"]
    command += ["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == 0
    assert RunFolder(tmp_path / "run", writes=False).steps()[-1] == STEPS


def test_a_killed_process_ends_the_job_in_seconds(tmp_path):
    draw_pictures(tmp_path)
    job = launched(tmp_path, tmp_path / "run", 1, 5, 0)
    reached = tmp_path / "run" / "reached"
    while not (reached.is_file() and reached.read_text() == "4"):
        assert job.poll() is None
        time.sleep(0.05)
    started = time.monotonic()
    assert job.wait(120) != 0
    assert time.monotonic() - started < 60


def test_a_job_that_is_told_to_end_saves_and_goes_on_alone(tmp_path):
    draw_pictures(tmp_path)
    job = launched(tmp_path, tmp_path / "run", -1, -1, 0)
    reached = tmp_path / "run" / "reached"
    while not (reached.is_file() and reached.read_text() > "2"):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait(120)
    saved = RunFolder(tmp_path / "run", writes=False).steps()[-1]
    assert 2 <= saved < 20
    trained = train_tokenizer(recipe(tmp_path / "pictures", saved + 200 - saved), tmp_path / "run", device="cpu")
    assert trained.finished
    assert trained.step == 200
