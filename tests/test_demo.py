"""The demo, from pictures to its page, in a few steps of each training."""

import pytest

from lexel.demo import demo
from lexel.tokenizer import Tokenizer


@pytest.mark.slow
def test_the_demo_tells_the_whole_story_and_goes_on_where_it_was_stopped(tmp_path):
    stages = []
    made = demo(tmp_path, steps=2, progress=lambda stage, done, total, note: stages.append(stage))
    assert [row[0] for row in made.table] == ["", "VQ", "IBQ"]
    html = made.page.read_text()
    for text in ("codes in use", "Held-out drawings", "New drawings", "CC BY-SA 4.0", "nearest"):
        assert text in html, text
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer").codebook_size == 1024
    assert dict.fromkeys(stages).keys() >= {"IBQ and VQ", "tokens", "generator", "drawing"}
    assert [made.parts[0].name, made.parts[-1].name] == ["drawings", "page"]
    assert all(part.seconds >= 0 for part in made.parts)
    again = []
    demo(tmp_path, steps=2, progress=lambda stage, done, total, note: again.append(stage))
    assert not {"IBQ and VQ", "generator"} & {*again}
