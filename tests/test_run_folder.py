"""What a run reads back from disk may be damaged: the right result, or one line."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from PIL import Image
from safetensors.torch import load_file, save_file

from lexel.checkpoint import load_state
from lexel.publish import stage
from lexel.report import latent_map, write_report
from lexel.run_folder import RunFolder
from lexel.run_log import Snapshot, read_metrics
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


@counts
def test_a_damaged_checkpoint_is_refused_in_one_line(run, count):
    survives(lambda path: load_state(path).keys(), run.checkpoint(run.steps()[-1]), 4, count)


@counts
def test_a_damaged_snapshot_is_left_out_of_the_report(run, count):
    def look(path):
        last = run.contents().last
        return {name: last[name] for name in last}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is left out
        path = run.snapshots / f"{run.snapshot_steps()[-1]:08d}.safetensors"
        assert survives(look, path, 5, count) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("originals", torch.zeros(8, 16, 16, 3)),
        ("originals", torch.zeros(8, 3, 16, dtype=torch.uint8)),
        ("reconstructions", torch.zeros(8, 4, 64, 3, dtype=torch.uint8)),
        ("histogram", torch.zeros(2, 16, dtype=torch.int64)),
        ("codes", torch.zeros(32, 5)),
        ("indices", torch.zeros(0, 4, 4, dtype=torch.int64)),
    ],
)
def test_a_snapshot_of_other_shapes_is_left_out(run, tmp_path, name, value):
    path = run.snapshot_path(run.snapshot_steps()[-1])
    save_file(load_file(path) | {name: value}, tmp_path / path.name)
    with pytest.warns(UserWarning, match=r"is left out: \w+ is"):
        assert not Snapshot(tmp_path / path.name)


def test_a_report_and_a_card_are_written_without_a_damaged_snapshot(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run", writes=False)
    save_file({"samples": torch.zeros(3, 5)}, copy.snapshot_path(copy.snapshot_steps()[-1]))
    (copy.snapshots / "notes.safetensors").write_bytes(b"of somebody else")
    with pytest.warns(UserWarning, match="is left out"):
        write_report(copy.path)
    with pytest.warns(UserWarning, match="is left out"):
        stage(copy.path, tmp_path / "published")
    assert not (tmp_path / "published" / "samples.png").exists()


def test_codes_that_are_not_finite_are_left_out_of_the_map(run):
    rows = np.array([[0.0, 1.0, 2.0], [np.nan, 0.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 5.0]])
    assert latent_map(rows, rows[1:]).html
    assert not latent_map(rows[1:2], rows[1:2]).html


def test_a_state_that_names_another_step_is_refused(run, tmp_path):
    copy = RunFolder(tmp_path)
    copy.checkpoints.mkdir()
    torch.save({"step": 3, "seconds": 1.0}, copy.checkpoint(4))
    with pytest.raises(ValueError, match=r"is no training state of step 4"):
        copy.load(4)
