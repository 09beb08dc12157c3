"""Folders of pictures: which subfolders are splits, which are classes, and what is left out with a word."""

import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lexel.data import ArrayImages, NoSplit, UnreadableImage, open_images, read_image
from lexel.data.config import DataConfig, open_data
from lexel.data.folder import classes_of_names, layout
from lexel.data.images import CachedImages
from lexel.data.listing import find_images
from lexel.data.names import Names
from lexel.errors import UsageError

PICTURE = Image.fromarray(np.full((12, 14, 3), 7, np.uint8))


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(folder / name)
    return folder


def opened(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures and classes that training, validation and the whole set show, each by the same rule."""
    training, measuring = open_data(DataConfig(source=str(folder), size=12))
    return sorted(training.names + measuring.names), training.classes


def test_a_class_called_train_is_a_class_and_said_to_be_one(tmp_path):
    made(tmp_path, "bus/0.png", "bus/1.png", "car/0.png", "train/0.png", "train/1.png")
    with pytest.warns(UserWarning, match="train is a class of .* lies beside bus, car"):
        names, classes = opened(tmp_path)
    assert (len(names), classes) == (5, ["bus", "car", "train"])
    with pytest.warns(UserWarning, match="train is a class"):
        images = open_images(tmp_path)
    assert (images.names, images.classes) == (names, classes)
    with pytest.raises(NoSplit, match="train is a class beside bus, car"):
        open_images(tmp_path, "train")


def test_folders_beside_two_splits_are_left_out_and_named(tmp_path):
    made(tmp_path, "train/a/0.png", "train/a/1.png", "val/a/2.png", "extra/3.png", "stray.png")
    (tmp_path / "notes").mkdir()
    with pytest.warns(UserWarning, match=r"splits train, val; left out: extra, stray.png"):
        images = open_images(tmp_path)
    assert images.names == ["train/a/0.png", "train/a/1.png", "val/a/2.png"]
    assert (images.labels, images.classes) == ([0, 0, 0], ["a"])
    with pytest.warns(UserWarning, match="left out: extra"):
        assert open_images(tmp_path, "train").names == ["a/0.png", "a/1.png"]
    with pytest.warns(UserWarning, match="left out: extra"):
        assert opened(tmp_path) == (["a/0.png", "a/1.png", "a/2.png"], ["a"])


def test_two_folders_for_one_split_are_not_merged_in_silence(tmp_path):
    made(tmp_path, "train/0.png", "val/1.png", "validation/2.png")
    with pytest.warns(UserWarning, match="left out: val"):
        assert open_images(tmp_path, "validation").names == ["2.png"]


def test_folders_without_pictures_beside_splits_change_nothing(tmp_path):
    made(tmp_path, "train/a/0.png", "train/a/1.png", "val/a/2.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layout(tmp_path).splits == {"train": "train", "validation": "val"}
        assert opened(tmp_path)[0] == ["a/0.png", "a/1.png", "a/2.png"]


def test_a_stray_picture_that_takes_the_labels_away_is_named(tmp_path):
    made(tmp_path, "ant/0.png", "bee/1.png", "cover.png")
    with pytest.warns(UserWarning, match=r"no classes are used: 1 of 3 .* ant, bee, not in them: cover.png"):
        assert open_images(tmp_path).labels is None


def test_what_cannot_be_opened_is_left_out_named_and_counted(tmp_path):
    made(tmp_path / "set", "a/0.png", "b/1.png")
    os.mkfifo(tmp_path / "set" / "a" / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "set" / "b" / "socket.png"))
    (tmp_path / "set" / "b" / "null.png").symlink_to(os.devnull)
    with pytest.warns(UserWarning, match="left out 3 entries"):
        images = open_images(tmp_path / "set")
    server.close()
    assert images.names == ["a/0.png", "b/1.png"]
    assert images.left_out.keys() == {"a/pipe.png", "b/socket.png", "b/null.png"}
    assert "named pipe" in images.left_out["a/pipe.png"]


def test_a_folder_without_rights_stops_nothing(tmp_path, monkeypatch):
    made(tmp_path, "a/0.png", "lost+found/1.png", "z/2.png")
    scandir = os.scandir

    def refuses(path):  # root may open every folder, so that rights alone would show nothing here
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.warns(UserWarning, match=r"left out 1 entries .* lost\+found \(Permission denied\)"):
        images = open_images(tmp_path)
    assert images.names == ["a/0.png", "z/2.png"]
    with pytest.raises(UsageError, match="cannot be opened: Permission denied"):
        open_images(tmp_path / "lost+found")


@pytest.mark.parametrize("special", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, special):
    path = tmp_path / "a.png"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[special](path)
    with pytest.raises(UnreadableImage, match=f"{special}, not a regular file"):  # and it returns at all
        read_image(path)


def test_whatever_a_decoder_raises_is_an_unreadable_picture(tmp_path, monkeypatch):
    made(tmp_path, "a.png")
    for error in (
        RuntimeError("decoder"),
        AttributeError("x"),
        MemoryError(),
        RecursionError("deep"),
        SystemError("c"),
    ):

        def raises(*_, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "convert", raises)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", raises)
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_image(tmp_path / "a.png")


def test_a_damaged_avif_is_named(tmp_path):
    try:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.avif")
    except (KeyError, ValueError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    outcomes = set()
    for place in range(len(data) // 2, len(data), 97):
        changed = bytearray(data)
        changed[place : place + 8] = bytes(8)
        (tmp_path / "b.avif").write_bytes(changed)
        try:
            outcomes.add(read_image(tmp_path / "b.avif").ndim)
        except UnreadableImage:
            outcomes.add("unreadable")
    assert outcomes <= {3, "unreadable"}


def test_damaged_files_of_a_known_kind_are_called_damaged(tmp_path):
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif", "avif"):
        path = tmp_path / f"a.{suffix}"
        try:
            PICTURE.save(path)
        except (KeyError, ValueError):
            continue  # no AVIF
        path.write_bytes(path.read_bytes()[:24])
        with pytest.raises(UnreadableImage) as error:
            read_image(path)
        assert "known kind" not in error.value.reason, error.value.reason


def test_files_that_only_carry_the_name_of_a_picture_are_told_apart(tmp_path):
    for content, words in {
        b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
        b"<!DOCTYPE html><html>": "HTML",
        bytes(100): "zero bytes",
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40): "JPEG 2000",
    }.items():
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UnreadableImage, match=words):
            read_image(tmp_path / "a.jpg")


def test_the_limit_on_pixels_is_an_option_where_it_is_read(tmp_path):
    made(tmp_path, "0.png", "1.png")
    with pytest.raises(UnreadableImage, match=r"data\.pixel_limit"):
        read_image(tmp_path / "0.png", pixel_limit=100)
    training, _ = open_data(DataConfig(source=str(tmp_path), size=12, pixel_limit=100, memory=0))
    with pytest.raises(UnreadableImage, match="14 x 12 pixels are more than the limit of 100"):
        training.read(0)
    assert open_data(DataConfig(source=str(tmp_path), size=12, memory=0))[0].read(0).shape == (12, 14, 3)


def test_classes_are_matched_by_name(tmp_path):
    made(tmp_path, "train/ant/0.png", "train/bee/1.png", "train/cat/2.png", "val/cat/3.png", "val/bee/4.png")
    training, measured = open_images(tmp_path, "train"), open_images(tmp_path, "validation")
    assert (measured.classes, measured.labels) == (["bee", "cat"], [0, 1])
    matched = measured.with_classes(training.classes)
    assert (matched.classes, matched.labels) == (["ant", "bee", "cat"], [1, 2])
    assert matched.subset([1]).labels == [2]
    assert np.array_equal(matched.read(0), measured.read(0))
    with pytest.raises(UsageError, match="unknown class 'ant'; the classes are bee, cat"):
        training.with_classes(measured.classes)


def test_names_take_little_room_and_are_what_they_were(tmp_path):
    given = ["a.png", "", "ä/写.png", os.fsdecode(b"caf\xe9.png"), "b" * 300]
    names = Names(given)
    assert list(names) == [names[number] for number in range(5)] == given
    assert names == given
    assert names[-1] == given[-1]
    assert names[1:4] == given[1:4]
    assert names.__add__(["x"]) == [*given, "x"]
    assert names != given[:4]
    with pytest.raises(IndexError):
        names[5]
    assert Names([]) == []
    assert names.distinct
    assert not Names([*given, "b" * 300]).distinct
    assert len(names.letters)
    assert not len(Names(["", ""]).letters)
    assert Names(given, "ö/") == [f"ö/{name}" for name in given]
    written = [name.replace("/", ":") for name in given]
    assert Names.between("/", "".join(f"{name}/" for name in written), "ö/") == [f"ö/{name}" for name in written]
    assert Names.between("/", "", "ö/") == []
    assert Names.joined([names, Names([]), Names(given, "c/")]) == [*given, *(f"c/{name}" for name in given)]


def test_listing_equals_a_plain_walk(tmp_path):
    random = np.random.default_rng(0)
    for number in range(60):
        # Folders and files that sort before and behind each other's slash.
        parts = [f"d{['', ' b', '.png', 'ä'][random.integers(4)]}" for _ in range(random.integers(3))]
        name = f"{'Zad.'[random.integers(4)]}{number}.{['png', 'JPG', 'jpeg', 'txt.png'][number % 4]}"
        made(tmp_path, "/".join([*parts, name]))
    expected = sorted(
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*.*")
        if path.is_file() and path.name[0] != "."
    )
    assert find_images(tmp_path) == expected
    for level in (0, 1):
        named = [name for name in expected if name.count("/") > level]
        assert classes_of_names("x", named, level, ordered=True) == classes_of_names("x", named, level)


def test_a_set_knows_its_fingerprint_through_caches_and_parts(tmp_path):
    made(tmp_path, *(f"{number}.png" for number in range(4)))
    images = open_images(tmp_path)
    before = images.fingerprint()
    assert open_images(str(tmp_path)).fingerprint() == before
    assert CachedImages(images, 10**6).fingerprint() == before
    part = images.subset([0, 2])
    assert CachedImages(part, 10**6).fingerprint() == part.fingerprint() != before
    PICTURE.resize((5, 5)).save(tmp_path / "1.png")
    assert open_images(tmp_path).fingerprint() != before
    array = ArrayImages(np.zeros((2, 3, 3, 3), np.uint8), ["a", "b"])
    assert array.fingerprint() != ArrayImages(np.ones((2, 3, 3, 3), np.uint8), ["a", "b"]).fingerprint()
    assert array.fingerprint() != ArrayImages(np.zeros((2, 3, 3, 3), np.uint8), ["a", "c"]).fingerprint()
