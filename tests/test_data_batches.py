"""Batches: their content depends on the seed and the step alone."""

import collections
import itertools
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.data import TRANSFORMS, ArrayImages, UnreadableImage, open_images, ordered_batches, training_batches
from lexel.data.batches import default_workers
from lexel.data.config import DataConfig, open_data
from lexel.data.images import CachedImages, ImageSet
from lexel.data.order import Positions, permutation
from lexel.data.pace import Pace
from lexel.errors import UsageError


def numbered(count: int, height: int = 12, width: int = 15) -> ArrayImages:
    """Pictures whose red is their number; columns differ, so that crops can be told apart."""
    array = np.zeros((count, height, width, 3), np.uint8)
    array[..., 0] = np.arange(count)[:, None, None]
    array[..., 1] = np.arange(width)[None, None, :]
    return ArrayImages(array, [f"{n:03d}" for n in range(count)], [n % 3 for n in range(count)], ["a", "b", "c"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, of which 2, 3 and 7 cannot be read."""
    for number in range(10):
        picture = np.full((12, 14, 3), number, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "7.png").write_bytes((tmp_path / "8.png").read_bytes()[:50])
    return tmp_path


CROP = TRANSFORMS["published"](12)


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and torch.equal(x.numbers, y.numbers)
        for x, y in zip(a, b, strict=True)
    )


def test_a_batch_holds_images_labels_and_numbers_that_belong_together():
    batch = next(training_batches(numbered(20), CROP, 6, seed=0))
    assert batch.images.shape == (6, 3, 12, 12)
    assert batch.images.dtype == torch.float32
    red = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(red, batch.numbers)
    assert torch.equal(batch.labels, batch.numbers % 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    images = numbered(11)
    expected = take(training_batches(images, CROP, 4, seed=5, first_step=3), 7)
    assert equal(take(training_batches(images, CROP, 4, seed=5, first_step=3, workers=workers), 7), expected)
    everything = list(ordered_batches(images, CROP, 4))
    assert equal(list(ordered_batches(images, CROP, 4, workers=workers)), everything)


def test_the_processes_together_see_the_batch_of_one():
    images = numbered(11)
    whole = take(training_batches(images, CROP, 12, seed=1), 5)
    for processes in (2, 3):
        parts = [
            take(training_batches(images, CROP, 12, seed=1, rank=r, processes=processes), 5) for r in range(processes)
        ]
        for step in range(5):
            assert torch.equal(torch.cat([part[step].images for part in parts]), whole[step].images)
            assert torch.equal(torch.cat([part[step].numbers for part in parts]), whole[step].numbers)


def test_starting_at_a_step_gives_what_the_whole_run_gave():
    images = numbered(11)
    whole = take(training_batches(images, CROP, 4, seed=1), 12)
    assert equal(take(training_batches(images, CROP, 4, seed=1, first_step=7), 5), whole[7:])
    assert not equal(take(training_batches(images, CROP, 4, seed=2), 12), whole)


def test_every_epoch_shows_every_picture_once_in_a_new_order():
    batches = take(training_batches(numbered(10), CROP, 4, seed=0), 15)  # six epochs
    numbers = torch.cat([batch.numbers for batch in batches]).tolist()
    epochs = [tuple(numbers[start : start + 10]) for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_crops_differ_from_epoch_to_epoch_and_picture_to_picture():
    batches = take(training_batches(numbered(4), CROP, 4, seed=0), 40)
    starts = collections.defaultdict(list)
    for batch in batches:
        for number, image in zip(batch.numbers.tolist(), batch.images, strict=True):
            starts[number].append(round(float(image[1, 0, 0] + 1) * 127.5))
    assert all(set(places) == {0, 1, 2, 3} for places in starts.values())
    assert len({tuple(places) for places in starts.values()}) == 4


def test_the_order_is_the_one_it_always_was():
    """Golden: a run that goes on with a newer version of Lexel must see the pictures in the same order."""
    assert permutation(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, seed=1, epoch=7).tolist() == [1, 8, 0, 4, 9, 3, 2, 6, 7, 5]
    positions = Positions(10, 1)
    assert [positions[75], positions[3]] == [(7, 3), (0, int(permutation(10, 1, 0)[3]))]


def test_permutations_are_uniform():
    firsts = collections.Counter(int(permutation(5, seed, epoch)[0]) for seed in range(40) for epoch in range(50))
    assert all(320 < count < 480 for count in firsts.values())  # 400 expected, standard deviation 18


def test_a_batch_may_be_larger_than_the_set():
    batch = next(training_batches(numbered(1), CROP, 5, seed=0))
    assert batch.numbers.tolist() == [0] * 5
    assert (
        len({tuple(image[1, 0].tolist()) for image in batch.images}) > 1
    )  # each from another epoch, with its own crop


def test_batches_leave_the_global_random_streams_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    take(training_batches(numbered(5), TRANSFORMS["random_resized"](12), 4, seed=0), 3)
    list(ordered_batches(numbered(5), CROP, 4))
    take(training_batches(numbered(5), CROP, 4, seed=0, workers=1), 2)
    assert torch.equal(torch.rand(1), expected[0])
    assert np.random.rand() == expected[1]  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_replaced_by_the_next_and_named(folder, workers):
    batches = training_batches(open_images(folder), CROP, 10, seed=0, workers=workers)
    batch = next(batches)
    order = permutation(10, 0, 0).tolist()
    assert batch.numbers.tolist() == [{2: 4, 3: 4, 7: 8}.get(number, number) for number in order]
    red = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(red, batch.numbers)
    assert batches.unreadable.keys() == {"2.png", "3.png", "7.png"}
    assert "empty" in batches.unreadable["2.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_stops_when_asked_with_one_line(folder, workers):
    images = open_images(folder)
    for batches in (
        training_batches(images, CROP, 10, seed=0, workers=workers, on_error="stop"),
        iter(ordered_batches(images, CROP, 10, workers=workers, on_error="stop")),
    ):
        with pytest.raises(UnreadableImage) as error:
            next(batches)
        assert error.value.name in ("2.png", "3.png", "7.png")
        assert "\n" not in str(error.value)


def test_a_folder_of_unreadable_pictures_does_not_loop_for_ever(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(UsageError, match="none of the 3 images can be read"):
        next(training_batches(open_images(tmp_path), CROP, 2, seed=0))
    batches = ordered_batches(open_images(tmp_path), CROP, 2)
    assert list(batches) == []
    assert len(batches.unreadable) == 3


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_ordered_batches_show_every_readable_picture_once(folder, processes):
    seen, named = [], {}
    for rank in range(processes):
        batches = ordered_batches(open_images(folder), CROP, 2, rank=rank, processes=processes)
        for batch in batches:
            red = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
            assert torch.equal(red, batch.numbers)
            seen += batch.numbers.tolist()
        named |= batches.unreadable
    assert sorted(seen) == [0, 1, 4, 5, 6, 8, 9]
    assert named.keys() == {"2.png", "3.png", "7.png"}


def test_ordered_batches_are_centred_and_repeatable():
    batches = ordered_batches(numbered(5), CROP, 2)
    assert len(batches) == 3
    first, second = list(batches), list(batches)
    assert equal(first, second)
    assert (first[0].images[:, 1, 0, 0] == torch.tensor(1 / 127.5 - 1)).all()  # (15 - 12) // 2 = 1


def test_whole_pictures_come_one_by_one():
    (batch,) = ordered_batches(numbered(1, 7, 9), None, 1)
    assert batch.images.shape == (1, 3, 7, 9)
    with pytest.raises(UsageError, match="batch_size must be 1"):
        ordered_batches(numbered(1), None, 2)


def test_numbers_that_do_not_fit_are_refused():
    images = numbered(5)
    for options, words in [
        ({"batch_size": 5, "processes": 2}, "evenly"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2, "rank": 2, "processes": 2}, "rank"),
        ({"batch_size": 2, "first_step": -1}, "negative"),
        ({"batch_size": 2, "workers": -1}, "negative"),
    ]:
        with pytest.raises(UsageError, match=words):
            training_batches(images, CROP, seed=0, **options)
    with pytest.raises(UsageError, match="no images"):
        training_batches(images.subset([]), CROP, 2, seed=0)


def test_cached_pictures_are_the_same_and_stay_in_their_room(folder):
    images = open_images(folder)
    cached = CachedImages(images, limit=2 * 12 * 14 * 3)
    first = [cached.read(number) for number in (0, 1, 4)]
    for number in (0, 1, 4):
        (folder / f"{number}.png").unlink()
    assert cached.read(0) is first[0]
    assert cached.read(1) is first[1]
    with pytest.raises(UnreadableImage):
        cached.read(4)


def test_a_recipes_section_opens_both_sets(folder):
    training, validation = open_data(DataConfig(source=str(folder), size=12, validation=0.3))
    assert (len(training), len(validation)) == (7, 3)
    assert not set(training.names) & set(validation.names)
    training, validation = open_data(DataConfig(source=str(folder), size=12))  # 5 % of 10, at least one
    assert (len(training), len(validation)) == (9, 1)
    training, validation = open_data(DataConfig(source=str(folder), size=12, validation=str(folder)))
    assert (len(training), len(validation)) == (10, 10)


def test_what_is_held_out_can_be_measured(tmp_path):
    """A folder of a phone: the one picture in twenty that would be held out may be the one that cannot be read."""
    for number in range(8):
        Image.fromarray(np.full((12, 14, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    first = open_images(tmp_path).hold_out(0.1)[1].names
    for name in first:
        (tmp_path / name).write_bytes(b"")
    second = open_images(tmp_path).hold_out(0.1)[1].names
    assert len(first) == 1
    assert len(second) == 2
    assert set(first) < set(second)
    assert len(list(ordered_batches(open_images(tmp_path).hold_out(0.1)[1], CROP, 4))) == 1


def test_a_folder_with_splits_uses_them(folder, tmp_path):
    for split, names in {"train": "0145", "val": "89"}.items():
        (tmp_path / "parts" / split / "a").mkdir(parents=True)
        for name in names:
            (folder / f"{name}.png").rename(tmp_path / "parts" / split / "a" / f"{name}.png")
    source = str(tmp_path / "parts")
    training, validation = open_data(DataConfig(source=source, size=12))
    assert (len(training), len(validation)) == (4, 2)
    assert training.classes == validation.classes == ["a"]
    training, validation = open_data(DataConfig(source=source, size=12, validation=0.5))  # val stays out of both
    assert sorted(training.names + validation.names) == ["a/0.png", "a/1.png", "a/4.png", "a/5.png"]
    with pytest.warns(UserWarning, match="no classes are used"):
        training, validation = open_data(DataConfig(source=source, size=12, validation=str(folder)))
    assert len(training) == 4
    with pytest.raises(UsageError, match="no split 'test'"):
        open_data(DataConfig(source=source, size=12, validation="test"))


def test_a_single_picture_is_learned_and_measured_with_a_warning(folder):
    with pytest.warns(UserWarning, match="single image"):
        training, validation = open_data(DataConfig(source=str(folder / "1.png"), size=12))
    assert training.names == validation.names == ["1.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_data(DataConfig(source=str(folder), size=12))


def test_a_wrong_transform_is_refused_with_the_names():
    with pytest.raises(ValueError, match="adm, center_crop, crop, flip"):
        DataConfig(source="openmoji", size=32, transform="center")
    assert DataConfig(source="openmoji", size=32).make_transform().size == 32


def test_more_unreadable_pictures_than_are_allowed_are_an_error(folder):
    images = open_images(folder)  # 3 of 10 cannot be read
    next(training_batches(images, CROP, 10, seed=0, max_unreadable=0.3))
    with pytest.raises(UsageError, match=r"3 of 10 images cannot be read, more than max_unreadable = 0.2"):
        next(training_batches(images, CROP, 10, seed=0, max_unreadable=0.2))
    with pytest.raises(UsageError, match="max_unreadable"):
        list(ordered_batches(images, CROP, 5, max_unreadable=0))
    assert DataConfig(source="a", size=8, max_unreadable=0.01).max_unreadable == 0.01


def test_jpegs_may_be_decoded_smaller_where_the_transform_shows_the_whole_side(tmp_path):
    ramp = np.linspace(0, 255, 640)[None, :, None] * np.array([1.0, 0.5, 0.2]) + np.zeros((480, 640, 3))
    ramp[:, ::80] = 255
    for number in range(2):
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{number}.jpg", quality=95)
    section = {"source": str(tmp_path), "size": 32, "transform": "titok", "memory": 0}
    plain, scaled = (open_data(DataConfig(**section, jpeg_scaling=on))[0] for on in (False, True))
    assert plain.read(0).shape == (480, 640, 3)
    assert scaled.read(0).shape == (120, 160, 3)  # a quarter: an eighth would have 60 pixels, fewer than twice 32
    a, b = (TRANSFORMS["titok"](32)(images.read(0)).astype(int) for images in (plain, scaled))
    assert 0 < np.abs(a - b).max() <= 12
    with pytest.raises(ValueError, match="jpeg_scaling does not go with the transform 'published'; it goes with adm"):
        DataConfig(**section | {"transform": "published"}, jpeg_scaling=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_slow_reading_is_told_from_slow_training(workers):
    images = numbered(4)
    images.__class__ = SlowImages
    batches = training_batches(images, TRANSFORMS["published"](8), 2, seed=0, workers=workers)
    begun = time.perf_counter()
    take(batches, 6)
    speeds = batches.pace.speeds(time.perf_counter() - begun)
    assert speeds["data_images_per_second"] < 50 * max(1, workers)  # 20 ms an image
    assert speeds["step_images_per_second"] > 2 * 50 * max(1, workers)  # nothing but reading is done here


class SlowImages(ArrayImages):
    def read(self, number: int) -> np.ndarray:
        time.sleep(0.02)
        return super().read(number)


def test_the_speeds_of_reading_and_training_are_those_of_all_processes():
    pace = Pace(workers=4)
    for _ in range(10):
        pace.add(images=8, reading=2.0, waiting=0.1)
    assert pace.speeds(elapsed=5.0, processes=3) == {
        "data_images_per_second": 3 * 80 * 4 / 20,  # four read at a time
        "step_images_per_second": 3 * 80 / 4,  # a second of the five was waited
    }
    assert Pace(0).speeds(elapsed=0.0) == {}


@pytest.mark.parametrize(
    ("cores", "threads", "gpu", "processes", "expected"),
    [(16, 4, False, 1, 8), (8, 6, False, 1, 2), (2, 2, False, 1, 1), (1, 1, False, 1, 0), (16, 16, True, 4, 3)],
)
def test_the_cores_that_a_network_leaves_read_many_images(monkeypatch, cores, threads, gpu, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("lexel.data.batches.launched", lambda: (0, processes))
    many = ImageSet([str(number) for number in range(1_000)])
    assert default_workers(many, CROP) == expected
    assert default_workers(many, None) == 0, "in their own size they may be large"
    assert default_workers(ImageSet(["one", "two"]), CROP) == 0, "few are read sooner than a process starts"
    many.window = 100
    assert default_workers(many, CROP) == 0, "every reader of a stream reads all of it"
