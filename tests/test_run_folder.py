"""What a run reads back from disk may be damaged: the right result, or one line."""

import json
import warnings

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from PIL import Image

from lexel.checkpoint import load_state
from lexel.run_folder import RunFolder
from lexel.run_log import read_metrics
from lexel.train import load_recipe, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run with its recipe, log, checkpoints, snapshots and record of images."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    for number in range(6):
        square = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(square).save(folder / "images" / f"{number}.png")
    overrides = ["train.steps=2", "train.batch_size=2", "train.weights.adversarial=0", "data.validation=0.3"]
    train(load_recipe("tiny", [*overrides, f"data.source={folder / 'images'}"]), folder / "run", device="cpu")
    return RunFolder(folder / "run", writes=False)


@counts
def test_a_damaged_log_gives_its_whole_lines(run, count):
    def check(lines):
        for line in lines:
            assert isinstance(line["step"], int)
            assert all(isinstance(value, int | float) for name, value in line.items() if name != "kind")
            json.dumps(line, allow_nan=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lines are left out
        assert survives(read_metrics, run.metrics, 1, count, check) == count


@counts
def test_a_damaged_recipe_is_refused_in_one_line(run, count):
    assert survives(load_recipe, run.recipe, 2, count) > 0


@counts
def test_a_damaged_record_of_the_images_compares_nothing_or_refuses(run, count):
    names = {"training": ["a"], "validation": ["b"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the images are not compared
        survives(lambda path: run.check_data(names), run.data, 3, count)


def test_a_damaged_checkpoint_is_refused_in_one_line(run):
    survives(lambda path: load_state(path).keys(), run.checkpoint(run.steps()[-1]), 4, 100)


@counts
def test_a_damaged_snapshot_is_left_out_of_the_report(run, count):
    def look(path):
        last = run.contents().last
        return {name: last[name] for name in last}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is left out
        path = run.snapshots / f"{run.snapshot_steps()[-1]:08d}.safetensors"
        assert survives(look, path, 5, min(count, 2000)) > 0


def test_a_state_that_names_another_step_is_refused(run, tmp_path):
    copy = RunFolder(tmp_path)
    copy.checkpoints.mkdir()
    torch.save({"step": 3, "seconds": 1.0}, copy.checkpoint(4))
    with pytest.raises(ValueError, match=r"is no training state of step 4"):
        copy.load(4)
