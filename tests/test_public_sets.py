"""Public sets are told by their pixels; results on them say so, and what measured them."""

import dataclasses
import os
import subprocess

import numpy as np
import pytest
from PIL import Image
from toys import Grey

from lexel import public_sets
from lexel.data import open_images
from lexel.errors import UsageError
from lexel.evaluate import write_result
from lexel.leaderboard import write_leaderboard
from lexel.machine import _git, commit, machine
from lexel.public_sets import PUBLIC_SETS, measure_on, pixels_fingerprint


def write(folder, arrays, suffix="png") -> str:
    folder.mkdir()
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.{suffix}")
    return str(folder)


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """Two pictures that stand for Kodak's."""
    random = np.random.default_rng(0)
    arrays = {name: random.integers(0, 256, (8, 12, 3), np.uint8) for name in ("b", "a")}
    found = pixels_fingerprint(open_images(write(tmp_path / "whole", arrays), None, None))
    small = dataclasses.replace(PUBLIC_SETS["kodak"], images=2, fingerprint=found)
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "kodak", small)
    return arrays


def measured(folder, **settings):
    return measure_on(Grey(), "kodak", folder, metrics=["psnr"], device="cpu", cache=False, **settings)


def test_a_set_is_known_by_its_pixels_whatever_names_and_formats(pictures, tmp_path):
    renamed = write(tmp_path / "renamed", {"z": pictures["b"], "y": pictures["a"]}, "bmp")
    result = measured(renamed)
    assert result["public_set"] == "kodak"
    assert result["data"]["images"] == 2
    assert result["machine"] == machine("cpu")
    assert result["versions"]["commit"] == commit()


def test_pictures_of_another_set_are_refused_before_anything_is_measured(pictures, tmp_path):
    changed = {**pictures, "a": pictures["a"] ^ 1}
    with pytest.raises(UsageError, match=r"not those of kodak: their pixels differ .*leave out the public set"):
        measured(write(tmp_path / "changed", changed))
    with pytest.raises(UsageError, match="has 1 pictures where kodak has 2; give a folder or archive of the 24 PNG"):
        measured(write(tmp_path / "one", {"a": pictures["a"]}))
    with pytest.raises(UsageError, match="limit cannot be chosen"):
        measured(str(tmp_path / "whole"), limit=2)
    with pytest.raises(UsageError, match="unknown public set 'imagenet'; choose from cifar10, kodak"):
        measure_on(Grey(), "imagenet", str(tmp_path / "whole"))


def test_asking_for_the_commit_takes_no_lock_in_the_checkout(tmp_path):
    (tmp_path / "a").write_text("a")
    for command in (["init", "-q"], ["add", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    index = tmp_path / ".git" / "index"
    os.utime(tmp_path / "a", (1, 1))  # so that git would write the dates of files anew
    before = index.read_bytes()
    assert _git(tmp_path, "status", "--porcelain") == "A  a"
    assert index.read_bytes() == before


def test_the_leaderboard_shows_set_commit_and_machine(pictures, tmp_path):
    write_result(tmp_path / "grey.json", measured(str(tmp_path / "whole")))
    html = write_leaderboard({"grey": tmp_path / "grey.json"}, tmp_path / "page").read_text()
    assert "<th>machine" in html
    assert "torch" in html
    assert "<td>kodak" in html


def test_every_set_has_a_fingerprint():
    assert all(len(found.fingerprint) == 64 for found in PUBLIC_SETS.values())
