"""Text that survives: the formula by hand, the metric with a reader that answers as told, and the real one."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_evaluate import image_set
from toys import Grey

from lexel.evaluate import evaluate_tokenizer
from lexel.evaluate.metrics import text as metric
from lexel.metrics.text import TextState, edit_distance, survival
from lexel.networks.reader import Line, Reader


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0),
])  # fmt: skip
def test_edit_distances_are_those_by_hand(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


BOX, ELSEWHERE = (0.0, 0.0, 100.0, 20.0), (0.0, 50.0, 100.0, 70.0)


def test_characters_survive_where_they_were():
    assert survival([Line("LEXEL 2026", BOX)], [Line("LEXEL2026", BOX)]) == (9, 9)
    assert survival([Line("LEXEL", BOX)], [Line("LEVEL", (5.0, 2.0, 90.0, 22.0))]) == (4, 5)
    assert survival([Line("LEXEL", BOX)], [Line("LEXEL", ELSEWHERE)]) == (0, 5)
    assert survival([Line("LEXEL", BOX)], []) == (0, 5)
    assert survival([], [Line("noise", BOX)]) == (0, 0)
    assert survival([Line("ab", BOX)], [Line("completely different", BOX)]) == (0, 2)


def test_a_line_of_the_reconstruction_stands_for_one_line_only():
    two = [Line("word", BOX), Line("word", (0.0, 5.0, 100.0, 25.0))]
    assert survival(two, [Line("word", BOX)]) == (4, 8)
    assert survival(two, [Line("wore", BOX), Line("word", (0.0, 4.0, 100.0, 24.0))]) == (7, 8)


def test_the_share_is_of_all_characters_and_groups_give_the_interval():
    state = TextState(3)
    state.add([survival([Line("abcd", BOX)], [Line("abcd", BOX)])], torch.tensor([0]))
    state.add([survival([Line("abcdabcd", BOX)], []), survival([], [])], torch.tensor([2, 1]))
    assert state.share == pytest.approx(4 / 12)
    assert state.pictures == 2
    interval = state.interval()
    assert interval is not None
    assert interval.low < 4 / 12 < interval.high
    other = TextState(3)
    other.load_state_dict(state.state_dict())
    other.merge(state)
    assert other.share == state.share


class Told:
    """Reads one line in every picture; in those that a tokenizer made, with its last character lost."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []

    def read(self, picture: np.ndarray) -> list[Line]:
        self.pictures.append(picture)
        made = bool((picture[::4, ::4] == picture[1::4, 1::4]).all())  # Grey's flat patches
        return [Line("text" if made else "texts", BOX)]

    def about(self) -> dict[str, str]:
        return {"rapidocr": "told"}


def test_the_metric_reads_both_sides_as_a_viewer_sees_them(monkeypatch):
    told = Told()
    monkeypatch.setattr(metric, "Reader", lambda: told)
    result = evaluate_tokenizer(Grey(), image_set(6), metrics=["text"], size=16, device="cpu", cache=False)
    assert result["metrics"] == {"text_survival": pytest.approx(4 / 5)}
    assert all(picture.dtype == np.uint8 and picture.shape == (16, 16, 3) for picture in told.pictures)
    assert result["weights"]["text"] == {"rapidocr": "told"}


@pytest.mark.skipif(find_spec("rapidocr") is not None, reason="rapidocr is installed")
def test_without_the_package_the_metric_is_left_out_with_the_command_to_install_it():
    result = evaluate_tokenizer(Grey(), image_set(6), metrics=["psnr", "text"], size=16, device="cpu", cache=False)
    assert "text_survival" not in result["metrics"]
    assert any("pip install 'lexel[ocr]'" in warning for warning in result["warnings"])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rapidocr") is None, reason="pip install rapidocr")
def test_the_real_reader_reads_print_and_loses_it_in_a_blur():
    picture = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(picture).text((12, 24), "LEXEL2026", fill="black", font_size=36)
    blurred = picture.resize((16, 6)).resize((256, 96))
    reader = Reader()
    found = reader.read(np.asarray(picture))
    assert [line.text for line in found] == ["LEXEL2026"]
    assert survival(found, found) == (9, 9)
    assert survival(found, reader.read(np.asarray(blurred))).survived < 5
