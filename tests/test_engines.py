"""Engines that run commands elsewhere: each part once and whole, whatever they lose on the way."""

import os
import sys
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

AVAILABLE = {"local": None, "slurm": "submitit", "ray": "ray"}
OPTIONS = {"slurm": {"cluster": "local"}, "ray": {"num_cpus": 0.1}}


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


def test_a_missing_package_is_named(monkeypatch):
    for name, package in (("slurm", "submitit"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"pip install 'lexel\\[{name}\\]'"):
            engines.run_all([["a"]], name, Path("notes"))


@pytest.fixture
def model(tmp_path) -> Path:
    for number in range(10):
        picture = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    small = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": [], "middle_attention": False}
    config = {
        "quantizer": {"kind": "vq", "codebook_size": 8, "codebook_dim": 4},
        "autoencoder": {**small, "z_channels": 4, "groups": 2},
    }
    Tokenizer(TokenizerConfig.model_validate(config)).save_pretrained(tmp_path / "model")
    return tmp_path


def encode(folder: Path, out: str, *more: str) -> str:
    arguments = ["encode", str(folder / "model"), str(folder / "pictures"), "--out", str(folder / out), "--size", "8"]
    result = CliRunner().invoke(app, [*arguments, "--shard-size", "2", "--device", "cpu", *more])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("engine", AVAILABLE)
def test_parts_by_an_engine_of_which_one_is_killed_give_the_bytes_of_one_process(model, monkeypatch, engine):
    if AVAILABLE[engine]:
        pytest.importorskip(AVAILABLE[engine])
    encode(model, "one")
    # The first process that begins part 2 is killed, on whichever machine it is.
    (model / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"mark = {str(model / 'killed')!r}\n"
        "if '2/3' in getattr(sys, 'orig_argv', []) and not os.path.exists(mark):\n"
        "    open(mark, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(model), *filter(None, [os.environ.get("PYTHONPATH")])]))
    options = [text for pair in OPTIONS.get(engine, {}).items() for text in ("--engine-option", "{}={}".format(*pair))]
    output = encode(model, "parts", "--parts", "3", "--engine", engine, *options)
    assert (model / "killed").exists()
    assert "10 pictures as" in output
    assert contents(model / "parts") == contents(model / "one")
