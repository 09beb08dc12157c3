"""The frame of training: what several processes decide, what a step waits for, and what a run knows of its data."""

import dataclasses
import shutil
import traceback

import numpy as np
import pytest
import test_generators
import test_generators_latents
import torch
from PIL import Image
from processes import run_together
from thorough import thorough
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lexel.config import check, dump
from lexel.data import TRANSFORMS, open_images
from lexel.data.files import UnreadableImage
from lexel.data.images import ArrayImages
from lexel.data.tokens import TokenBatch
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer
from lexel.loading import load_tokenizer
from lexel.run_folder import RunFolder
from lexel.run_log import read_metrics
from lexel.tokenizer import Tokenizer
from lexel.train import generator as generators
from lexel.train import load_recipe, train
from lexel.train.generator_recipe import GeneratorRecipe, GeneratorTrainConfig
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import train_tokenizer
from lexel.train.validation import RULES, SpacedImages, validate

pytestmark = pytest.mark.usefixtures("undrawn_charts")


@pytest.fixture
def pictures(tmp_path):
    """Twelve little pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 18), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    return folder


def tables(pictures, quantizer="vq", **train):
    size = {} if quantizer in ("none", "gaussian") else {"codebook_size": 16}
    return {
        "model": {
            "quantizer": {"kind": quantizer, "codebook_dim": 4, **size},
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
        "data": {"source": str(pictures), "size": 16, "validation": 0.3},
        "train": {
            "steps": 8,
            "batch_size": 4,
            "lr": 1e-2,
            "weights": {"l1": 1.0, "adversarial": 0.1},
            "discriminator": {"layers": 1, "width": 4, "lecam": 0.05, "adaptive": True},
            "log_every": 4,
            "validate_every": 4,
            "save_every": 8,
            **train,
        },
    }


def recipe(pictures, quantizer="vq", **train):
    return check(tables(pictures, quantizer, **train), TokenizerRecipe, "test")


# ------------------------------------------------------------------------------------------------ several processes

SLOW = """
import sys, time, torch
torch.set_num_threads(1)
from lexel.errors import UsageError
from lexel.run_folder import RunFolder
from lexel.train import generator as generators
from lexel.train import load_recipe, train
from lexel.train.generator_recipe import GeneratorRecipe, GeneratorTrainConfig
from lexel.train.processes import Processes

write = RunFolder.log
def slow(run, *line):  # a network file system: the other processes read before this one has written
    if run.writes:
        time.sleep(0.1)
    write(run, *line)
RunFolder.log = slow
done = train(load_recipe(sys.argv[1]), sys.argv[2], device="cpu")

processes = Processes("cpu")
def fail():
    if processes.rank == 1:
        raise UsageError("the disk of rank 1 is gone")
try:
    processes.together(fail)
except UsageError as error:
    print(done.step, done.finished, error, flush=True)
"""


def test_processes_agree_on_the_best_validation_however_slow_the_log_is(pictures, tmp_path):
    chosen = recipe(pictures, steps=3, validate_every=1, save_every=100)
    (tmp_path / "recipe.toml").write_text(dump(chosen))
    said = run_together(SLOW, [tmp_path / "recipe.toml", tmp_path / "run"])
    assert said == ["3 True the disk of rank 1 is gone\n"] * 2
    lines = [*RunFolder(tmp_path / "run", writes=False).lines("validation")]
    assert [line["step"] for line in lines] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ waiting for a device

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::_unique2"}
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


class CountWaits:
    """Notes every operation whose result the host needs, and so waits for.

    What is on the CPU on every machine does not count: pictures being read, Adam's own step count, and the one number
    that MAR draws for a batch.
    """

    def __init__(self):
        self.places = []
        outer = self

        class Operations(TorchDispatchMode):  # below autograd, whatever calls them
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                outer.note(function.name().split(".")[0], WAITS)
                return function(*arguments, **(options or {}))

        class Methods(TorchFunctionMode):  # reads of a tensor that is on the CPU here, which below are nothing
            def __torch_function__(self, function, types, arguments=(), options=None):
                outer.note(getattr(function, "__name__", ""), READS)
                return function(*arguments, **(options or {}))

        self.modes = Operations(), Methods()

    def note(self, name, watched):
        if name in watched:
            files = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
            elsewhere = ("/torch/optim/", "/lexel/data/", "/lexel/kernels/")
            drawn = any(frame.name == "_mask_ratio" for frame in traceback.extract_stack())
            if not drawn and not any(folder in file for folder in elsewhere for file in files):
                self.places.append((name, *[file for file in files if "/lexel/" in file][-2:]))


def waits_of_steps(train):
    """What each of eight steps waited for; `train` gets the function to call after every step."""
    count, waits, seen = CountWaits(), {}, 0

    def after(progress):
        nonlocal seen
        waits[progress.step], seen = count.places[seen:], len(count.places)

    with count.modes[0], count.modes[1]:
        train(after)
    return waits


def only_logging_waits(waits):
    assert len(waits[4]) > 0  # it logs: what waits is seen
    for step in (2, 3, 6, 7):  # what is counted for step 5 is the validation after step 4
        assert waits[step] == [], step


PARTS = {"accumulation": 2, "clip": 1.0}


@pytest.mark.parametrize(
    ("quantizer", "parts"),
    [("vq", PARTS), ("ibq", {}), *thorough(*((name, {}) for name in ("simvq", "fsq", "lfq", "none", "gaussian")))],
)
def test_a_step_waits_for_the_device_only_where_it_logs_validates_or_saves(pictures, tmp_path, quantizer, parts):
    chosen = recipe(pictures, quantizer, **parts)
    assert chosen.train.average_decay > 0
    assert chosen.train.discriminator.lecam > 0
    only_logging_waits(
        waits_of_steps(lambda after: train_tokenizer(chosen, tmp_path / "run", device="cpu", progress=after))
    )


def test_a_generators_step_on_pictures_waits_only_where_it_logs_validates_or_saves(pictures, tmp_path):
    Tokenizer(recipe(pictures).model).save_pretrained(tmp_path / "tokenizer")
    network = {"codebook_size": 16, "rows": 8, "columns": 8, "classes": 1, "width": 8, "layers": 1, "heads": 2}
    table = {
        "generator": network,
        "data": {"tokenizer": str(tmp_path / "tokenizer"), "images": tables(pictures)["data"]},
        "train": {"steps": 8, "batch_size": 4, "lr": 1e-3, "log_every": 4, "validate_every": 4, "save_every": 8},
    }
    chosen = check(table, GeneratorRecipe, "test")
    only_logging_waits(
        waits_of_steps(lambda after: generators.train_generator(chosen, tmp_path / "run", device="cpu", progress=after))
    )


@pytest.mark.parametrize("family", [*test_generators.NETWORKS, *test_generators_latents.FAMILIES])
def test_a_step_of_no_family_of_generators_waits_for_the_device(family):
    latent = family in test_generators_latents.FAMILIES
    generator = (test_generators_latents if latent else test_generators).make(family)
    table = {"steps": 2, "batch_size": 4, "lr": 1e-3, "accumulation": 2, "average_decay": 0.9}
    learner = generators.Learner(check(table, GeneratorTrainConfig, "test"), generator, Processes("cpu"))
    batch = TokenBatch(torch.zeros(4, *generator.grid, dtype=torch.long), torch.arange(4), torch.arange(4))
    learner.step(batch, 1e-3, 0.05)  # makes the optimizer's state
    count = CountWaits()
    with count.modes[0], count.modes[1]:
        learner.step(batch, 1e-3, 0.05)
    assert count.places == []


# ------------------------------------------------------------------------------------------------ the data of a run


def test_a_run_goes_on_where_its_pictures_have_moved(pictures, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path / "run", device="cpu")
    moved = pictures.rename(tmp_path / "elsewhere")
    assert train_tokenizer(recipe(moved, steps=9), tmp_path / "run", device="cpu").step == 9


def test_a_run_refuses_other_pictures_and_says_how_many_differ(pictures, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path / "run", device="cpu")
    for number in range(5):
        shutil.copy(pictures / f"{number:02d}.png", pictures / f"new{number}.png")
    with pytest.raises(
        UsageError, match=r"other training images: \d+ pictures then, \d+ now, \d are new and \d are gone"
    ):
        train_tokenizer(recipe(pictures, steps=9), tmp_path / "run", device="cpu")


def test_options_of_operation_may_change_when_a_run_goes_on(pictures, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path / "run", device="cpu")
    table = tables(pictures, steps=9, validate_every=3, collapse_patience=0, keep_last=1)
    table["data"] |= {"memory": 0.0, "on_error": "stop"}
    assert train_tokenizer(check(table, TokenizerRecipe, "test"), tmp_path / "run", device="cpu").step == 9


def test_a_fine_tuning_goes_on_without_the_model_it_started_from(pictures, tmp_path):
    train_tokenizer(recipe(pictures, steps=2), tmp_path / "base", device="cpu")
    table = tables(pictures, steps=2) | {"init": {"source": str(tmp_path / "base")}}
    train_tokenizer(check(table, TokenizerRecipe, "test"), tmp_path / "run", device="cpu")
    shutil.rmtree(tmp_path / "base")
    table["train"]["steps"] = 3
    assert train_tokenizer(check(table, TokenizerRecipe, "test"), tmp_path / "run", device="cpu").step == 3
    assert train_tokenizer(recipe(pictures, steps=4), tmp_path / "run", device="cpu").step == 4  # without --init, too


def test_damaged_lines_of_the_log_are_left_out_with_a_warning(tmp_path):
    good = b'{"step": 3, "kind": "train", "seconds": 1.5, "loss": 0.25}\n'
    bad = [b"\0\0\0\0\n", b"[]\n", b'{"step": -1, "kind": "train", "seconds": 1}\n', b'{"step": 1, "kind": "train"}\n']
    bad += [b'{"step": 1, "kind": "train", "seconds": 1, "loss": NaN}\n', b"[" * 100_000 + b"\n", b"\xff\n"]
    bad += [b'{"step": 1, "kind": 3, "seconds": 1}\n', b'{"step": true, "kind": "train", "seconds": 1}\n']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([good, *bad, good, b'{"step": 4, "ki']))
    with pytest.warns(UserWarning, match=rf"{len(bad)} damaged lines are left out"):
        lines = [*read_metrics(path)]
    assert lines == [{"step": 3, "kind": "train", "seconds": 1.5, "loss": 0.25}] * 2


# ------------------------------------------------------------------------------------------------ validation


class Holes(ArrayImages):
    """Grey squares, number by number; those in `holes` cannot be read."""

    def __init__(self, count, holes):
        greys = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
        super().__init__(greys, [f"{number:03d}" for number in range(count)])
        self.holes = holes

    def read(self, number):
        if number in self.holes:
            raise UnreadableImage(self.names[number], "damaged")
        return super().read(number)


def measured(images, limit, processes):
    """The grey levels that are measured, over all processes."""
    levels = []
    for rank in range(processes):
        places = SpacedImages(images, TRANSFORMS["published"](8), limit)
        share = range(len(places))[rank::processes]
        levels += [
            round((float(image.mean()) + 1) * 127.5) for batch in places.read(share, 3) for image in batch.images
        ]
    return sorted(levels)


def test_an_unreadable_picture_gives_its_place_to_the_next_readable_one():
    images = Holes(20, holes={0, 2, 4, 8, 9, 10, 11})
    assert measured(images, 5, 1) == [1, 5, 12, 16]  # of 0, 4, 8, 12, 16: the place of 8 to 11 has none
    for processes in (2, 3):
        assert measured(images, 5, processes) == [1, 5, 12, 16]
    assert measured(images, None, 2) == [number for number in range(20) if number not in images.holes]


def test_a_validation_set_without_a_readable_picture_is_refused_before_training():
    Holes(3, holes={0, 1}).first_readable("validation images")
    with pytest.raises(UsageError, match=r"none of the 3 validation images can be read; the first, 000: damaged"):
        Holes(3, holes={0, 1, 2}).first_readable("validation images")


def test_a_validation_gives_the_numbers_of_an_evaluation_whatever_its_batches(pictures):
    tokenizer, images = Tokenizer(recipe(pictures).model).eval(), open_images(str(pictures))
    transform, alone = TRANSFORMS["published"](16), Processes("cpu")
    rules = dataclasses.replace(RULES, transform="published", size=16)
    metrics = ["l1", "psnr", "usage", "latents"]
    expected = evaluate_tokenizer(tokenizer, images, rules, metrics=metrics, batch_size=12, device="cpu")["metrics"]
    assert expected.keys() == {"l1", "psnr", "usage", "perplexity", "quantization_error", "latent_norm"}
    for batch_size in (1, 5, 12):
        values = validate(tokenizer, images, transform, batch_size, alone).values
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "gaussian"])
def test_continuous_latents_train_and_validate_without_codes(pictures, tmp_path, kind):
    from lexel.inspection import inspect

    (tmp_path / "recipe.toml").write_text(dump(recipe(pictures, kind)))
    assert train(load_recipe(tmp_path / "recipe.toml"), tmp_path / "run", device="cpu").finished
    last = RunFolder(tmp_path / "run", writes=False).last_lines("validation")[-1]
    assert {"psnr", "l1", "latent_norm"} <= last.keys()
    assert not {"usage", "perplexity", "quantization_error", "gradient_ratio"} & last.keys()
    assert (tmp_path / "run" / "report.html").is_file()  # written by train(), not by the command alone
    assert inspect(tmp_path / "run")["steps done"] == 8
    measured = evaluate_tokenizer(load_tokenizer(tmp_path / "run"), str(pictures), metrics=["psnr", "usage"], size=16)
    assert measured["metrics"]["psnr"] > 0
    assert any("usage is left out: images that come" in warning for warning in measured["warnings"])
