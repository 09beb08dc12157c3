"""The leaderboard: comparable results on one page, others refused with the reason."""

import copy
import re

import numpy as np
import pytest
from PIL import Image

from lexel.errors import UsageError
from lexel.evaluate import write_result
from lexel.leaderboard import write_leaderboard


def result(psnr: float, bits: float | None = 640.0) -> dict:
    found = {
        "kind": "reconstruction",
        "metrics": {"psnr": psnr, "lpips_vgg": 0.1},
        "intervals": {"psnr": {"low": psnr - 1, "high": psnr + 1, "standard_error": 0.5}},
        "warnings": [],
        "protocol": {"name": "lexel"},
        "network": None,
        "data": {"images": 5, "fingerprint": "f" * 64},
        "tokenizer": "a" * 64,
    }
    return found | ({} if bits is None else {"tokens": {"bits": bits}})


def files(folder, **results):
    for name, found in results.items():
        write_result(folder / f"{name}.json", found)
    return {name: folder / f"{name}.json" for name in results}


def test_results_are_grouped_by_bits_and_the_best_comes_first(tmp_path):
    given = files(tmp_path, low=result(10.0), high=result(20.0), small=result(9.0, 64.0), old=result(5.0, None))
    html = write_leaderboard(given, tmp_path / "page").read_text()
    heads = re.findall(r"<h2>([^<]*)</h2>", html)
    assert heads == ["64 bits a picture", "640 bits a picture", "Bits a picture not recorded", "How it was measured"]
    assert html.index("<td>high") < html.index("<td>low")
    assert "20 ± 0.98" in html


@pytest.mark.parametrize("change, reason", [
    (("data", "fingerprint", "0" * 64), "data differs"),
    (("data", "images", 6), "5 and 6 images"),
    (("protocol", "name", "ibq"), "different protocols"),
])  # fmt: skip
def test_results_that_cannot_be_compared_are_refused_with_both_names(tmp_path, change, reason):
    other = copy.deepcopy(result(20.0))
    part, name, value = change
    other[part][name] = value
    with pytest.raises(UsageError, match=reason) as error:
        write_leaderboard(files(tmp_path, one=result(10.0), two=result(11.0), other=other), tmp_path / "page")
    assert str(error.value).startswith("one and other: ")
    assert not (tmp_path / "page").exists()


def test_the_page_loads_nothing_from_elsewhere_and_shows_pictures(tmp_path):
    Image.fromarray(np.zeros((700, 20, 3), np.uint8)).save(tmp_path / "a.png")
    html = write_leaderboard(files(tmp_path, a=result(10.0)), tmp_path, {"a": tmp_path / "a.png"}).read_text()
    assert "http" not in html
    assert "data:image/png;base64," in html
    assert "aria-sort" in html


def test_a_name_with_markup_stays_text(tmp_path):
    path = files(tmp_path, a=result(10.0))["a"]
    assert "<script>alert" not in write_leaderboard({"<script>alert(1)</script>": path}, tmp_path).read_text()


def test_a_picture_of_no_result_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no result 'b'"):
        write_leaderboard(files(tmp_path, a=result(10.0)), tmp_path, {"b": tmp_path / "b.png"})
