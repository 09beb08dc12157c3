"""What a run reads back from disk may be damaged: the right result, or one line."""

import itertools
import json
import shutil
import tracemalloc
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
from lexel.run_log import LARGEST, RECENT, Snapshot, read_metrics
from lexel.train import load_recipe, train

pytestmark = pytest.mark.usefixtures("undrawn_charts")


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
            texts = [name for name, value in line.items() if isinstance(value, str) and name != "kind"]
            assert not texts or line["kind"] == "choices"
            json.dumps(line, allow_nan=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lines are left out
        survives(lambda path: [*read_metrics(path)], run.metrics, 1, count, check, always=True)


@counts
def test_a_damaged_recipe_is_refused_in_one_line(run, count):
    assert survives(load_recipe, run.recipe, 2, count) > 0 or count < 300  # one in a hundred is a recipe yet


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


# ------------------------------------------------------------------------------------------------ long logs


def long_log(folder, count):
    """A run folder that has logged so many steps, every tenth a validation; the values rise, then fall."""
    run = RunFolder(folder)
    folder.mkdir()
    lines = []
    for step in range(1, count + 1):
        lines.append({"step": step, "kind": "train", "seconds": step / 10, "loss": 1 / step})
        if step % 10 == 0:
            lines.append(
                {"step": step, "kind": "validation", "seconds": step / 10, "psnr": -float(abs(step - count // 2))}
            )
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run, lines


@pytest.mark.parametrize("count", [1, 9, 10, 25, 4000])
@pytest.mark.parametrize("asked", [1, 3, 1000])
def test_the_last_lines_are_those_of_the_whole_log(tmp_path, count, asked):
    run, lines = long_log(tmp_path / "run", count)
    for kind in ("train", "validation"):
        assert run.last_lines(kind, asked) == [line for line in lines if line["kind"] == kind][-asked:]
    with run.metrics.open("a") as file:
        file.write('{"step": 9999, "kind": "validation", "sec')  # a killed process
    assert run.last_lines("validation", asked) == [line for line in lines if line["kind"] == "validation"][-asked:]


def test_the_best_step_is_that_of_all_validations_of_the_log_and_since(tmp_path):
    run, _ = long_log(tmp_path / "run", 200)
    assert run.best_step() == 100
    run.log(201, "validation", 20.1, {"psnr": 0.0})  # as good: the earlier one stays
    assert run.best_step() == 100
    run.log(202, "validation", 20.2, {"psnr": 3.0})
    assert run.best_step() == RunFolder(run.path).best_step() == 202


def test_a_log_of_any_length_is_held_in_bounded_memory(tmp_path):
    run, lines = long_log(tmp_path / "run", 20_000)
    contents = run.contents()
    train = [line for line in lines if line["kind"] == "train"]
    assert len(contents.train) <= LARGEST + RECENT
    assert contents.train[0] == train[0]
    assert contents.train[-RECENT:] == train[-RECENT:]
    steps = [line["step"] for line in contents.train]
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 2 * len(train) / LARGEST + 1
    assert contents.validation == [line for line in lines if line["kind"] == "validation"]  # short: all of it


def test_what_a_training_keeps_of_its_log_does_not_grow_with_it(tmp_path):
    kept = []
    for count in (2_000, 20_000):
        run, _ = long_log(tmp_path / str(count), count)
        run.best_step()
        tracemalloc.start()
        for step in range(count + 1, count + 4):
            run.log(step, "validation", 1.0, {"psnr": 20.0})
            run.best_step()
            run.last_lines("validation", 5)
        kept.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert kept[1] < 1.2 * kept[0]
