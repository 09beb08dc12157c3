"""The budget of unreadable images: one rule and one option wherever a set of images is read once."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_codec import TINY
from test_evaluate import QUICK, pictures, save
from toys import Grey

from lexel.cli import main
from lexel.data import open_images
from lexel.errors import UsageError
from lexel.evaluate import evaluate_samples, evaluate_tokenizer, reference_statistics
from lexel.networks import build
from lexel.parts import Part
from lexel.tokenizer import Tokenizer


def broken(folder):
    """23 images, of which those numbered 3, 4 and 20 are none."""
    save(folder, pictures())
    for number in (3, 4, 20):
        (folder / f"{number:04}.png").write_bytes(b"no image")
    return folder


def measured(folder, **options):
    return evaluate_tokenizer(Grey(), folder, QUICK, metrics=["psnr"], batch_size=4, **options)


def test_an_evaluation_with_more_unreadable_images_than_allowed_ends_and_says_which(tmp_path):
    folder = broken(tmp_path / "images")
    with pytest.raises(UsageError, match=r"^3 of 23 images cannot be read, more than max_unreadable = 0.1 allows"):
        measured(folder, max_unreadable=0.1)
    with pytest.raises(UsageError, match=r"^2 of 6 images .*; the first, 0003.png: "):  # of those that a limit takes
        measured(open_images(folder).subset([3, 4, 5, 6, 7, 8]), limit=6, max_unreadable=0.1)
    with pytest.raises(UsageError, match="max_unreadable must lie in"):
        measured(folder, max_unreadable=1.5)
    unlimited = measured(folder)
    assert measured(folder, max_unreadable=3 / 23)["data"] == unlimited["data"]
    assert unlimited["data"]["unreadable"]["count"] == 3


def test_it_ends_as_soon_as_there_are_too_many_not_after_the_last_image(tmp_path):
    seen = []
    with pytest.raises(UsageError, match=r"^2 of 23 images"):
        measured(broken(tmp_path / "images"), max_unreadable=0.05, progress=lambda done, total: seen.append(done))
    assert seen == [3]


def test_parts_count_their_own_images_and_the_whole_counts_all(tmp_path):
    folder, state = broken(tmp_path / "images"), tmp_path / "state"
    with pytest.raises(UsageError, match=r"^2 of 8 images"):  # the first third has two of the three
        measured(folder, resume=state, part=Part(1, 3), max_unreadable=0.15)
    for number in (1, 2, 3):
        allowed = {"max_unreadable": 0.25}  # 2 of 8
        assert measured(folder, resume=state, part=Part(number, 3), **allowed)["images"] == (6, 8, 6)[number - 1]
    with pytest.raises(UsageError, match=r"^3 of 23 images"):  # all of them, though no part was of all
        measured(folder, resume=state, max_unreadable=0.1)
    assert measured(folder, resume=state, max_unreadable=0.15)["data"]["unreadable"]["count"] == 3


def test_an_image_that_became_readable_no_longer_counts_when_the_same_call_goes_on(tmp_path, monkeypatch):
    images = open_images(broken(tmp_path / "images"))
    fingerprint = images.fingerprint()
    monkeypatch.setattr(type(images), "fingerprint", lambda self: fingerprint)  # a mount that was away for a while
    assert len(measured(images, resume=tmp_path / "state", part=Part(1, 1))["unreadable"]) == 3
    for number in (3, 4, 20):
        save(tmp_path / f"{number}", pictures())
        whole = (tmp_path / f"{number}" / f"{number:04}.png").read_bytes()
        (tmp_path / "images" / f"{number:04}.png").write_bytes(whole)
    result = measured(images, resume=tmp_path / "state", max_unreadable=0.1)
    assert result["data"]["images"] == 23
    assert result["data"]["unreadable"] == {"count": 0, "reasons": {}}


def test_a_reference_has_the_budget_too_be_it_measured_or_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    reference, network = broken(tmp_path / "reference"), build("random")
    for _ in range(2):  # the second time it would be found
        with pytest.raises(UsageError, match=r"^3 of 23 images"):
            reference_statistics(reference, QUICK, network, max_unreadable=0.1)
        assert reference_statistics(reference, QUICK, network).pooled.n == 20
    np.savez(tmp_path / "samples.npz", arr_0=pictures(20, seed=5))
    with pytest.raises(UsageError, match=r"^3 of 23 images"):
        evaluate_samples(tmp_path / "samples.npz", reference, QUICK, max_unreadable=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, and nine images of two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    tokenizer = Tokenizer(TINY).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    for kind, grey in (("dark", 20), ("light", 230)):
        (folder / "images" / kind).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((8, 8, 3), grey + number, np.uint8)).save(folder / f"images/{kind}/{number}.png")
    (folder / "images" / "dark" / "bad.png").write_bytes(b"no image")
    return folder


MEASURED = "--validation", "images"
COMMANDS = {
    "evaluate": ["evaluate", "tokenizer", "--data", "images", "--metric", "psnr", "--size", "8"],
    "usage": ["usage", "images", "--model", "tokenizer", "--size", "8"],
    "usage of tokens": ["usage", "tokens"],
    "probe": ["probe", "images", "--tokenizer", "tokenizer", "--size", "8", *MEASURED],
    "probe of tokens": ["probe", "tokens", "--tokenizer", "tokenizer"],
    "probe kept": ["probe", "images", "--tokenizer", "tokenizer", "--size", "8", "--resume", "kept", *MEASURED],
    "prune": ["prune", "tokenizer", "images", "--size", "8", "--out", "pruned"],
    "grow": ["grow", "tokenizer", "--to", "17", "--data", "images", "--size", "8", "--out", "grown"],
    "bank": ["bank", "tokenizer", "images", "--size", "8", "--codes", "2", "--out", "bank.safetensors"],
    "reconstruct": ["reconstruct", "tokenizer", "images", "--size", "8", "--out", "pictures"],
    "encode": ["encode", "tokenizer", "images", "--size", "8", "--out", "encoded"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_reads_a_set_once_ends_beyond_the_budget_in_one_line(name, inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    if "tokens" in name and not (inputs / "tokens").exists():
        monkeypatch.setattr(sys, "argv", ["lexel", "encode", "tokenizer", "images", "--size", "8", "--out", "tokens"])
        main()
        capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lexel", *COMMANDS[name], "--device", "cpu", "--max-unreadable", "0.1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "1 of 9 images cannot be read, more than max_unreadable = 0.1 allows; the first, dark/bad.png: " in errors


def test_results_in_files_count_and_name_what_was_left_out(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    for name in ("evaluate", "usage"):
        monkeypatch.setattr(sys, "argv", ["lexel", *COMMANDS[name], "--device", "cpu", "--json", f"{name}.json"])
        main()
        result = json.loads((inputs / f"{name}.json").read_text())
        left_out = result.get("data", result)["unreadable"]
        assert left_out["count"] == 1
        assert left_out["reasons"].keys() == {"dark/bad.png"}


def test_a_part_of_an_evaluation_names_what_it_left_out(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    part = [*COMMANDS["evaluate"], "--device", "cpu", "--part", "1/1", "--resume", "part"]
    monkeypatch.setattr(sys, "argv", ["lexel", *part])
    main()
    errors = capsys.readouterr().err
    assert "left out dark/bad.png: it is no image of a known kind" in errors
    assert "1 pictures could not be used" in errors
