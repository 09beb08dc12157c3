"""Image files of every kind, damaged ones included."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz import counts, survives
from PIL import Image

from lexel.data import UnreadableImage, open_images, read_image
from lexel.data.images import CachedImages
from lexel.errors import UsageError

# Four corners of different colours: every turn and mirror image of it is another picture.
CORNERS = np.zeros((64, 96, 3), np.uint8)
CORNERS[:32, :48] = (200, 30, 30)
CORNERS[:32, 48:] = (30, 200, 30)
CORNERS[32:, :48] = (30, 30, 200)
CORNERS[32:, 48:] = (220, 220, 40)


def saved(path: Path, picture: np.ndarray = CORNERS, mode: str = "RGB", **options) -> Path:
    Image.fromarray(picture).convert(mode).save(path, **options)
    return path


def close(a: np.ndarray, b: np.ndarray, tolerance: int = 12) -> bool:
    inner = np.abs(a.astype(int) - b.astype(int)) <= tolerance
    return a.shape == b.shape and inner.mean() > 0.95  # compression blurs the borders between the blocks


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.tiff", "a.gif"])
def test_every_format_gives_the_picture_that_was_saved(tmp_path, name):
    array = read_image(saved(tmp_path / name))
    assert array.dtype == np.uint8
    assert close(array, CORNERS)


def test_a_file_is_read_by_its_content_not_by_its_name(tmp_path):
    saved(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), CORNERS)


# What turns the stored pixels upright, by EXIF's definition: orientation 6 means "turn 90 degrees clockwise to see it".
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_stand_upright_whatever_their_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = read_image(saved(tmp_path / f"a{suffix}", exif=exif))
    assert close(array, TURNS[orientation](CORNERS))


def test_a_bit_flipped_anywhere_in_a_png_gives_the_same_pixels_or_is_told(tmp_path):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
    path = saved(tmp_path / "a.png", np.asarray(coarse.resize((20, 18), Image.Resampling.BILINEAR)))
    whole, pixels = path.read_bytes(), read_image(path)
    told = 0
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            assert np.array_equal(read_image(path), pixels), place
        except UnreadableImage:
            told += 1
    assert told > 0.45 * len(whole)


def test_stored_pixels_are_neither_turned_nor_laid_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(tmp_path / "a.png", exif=exif)
    assert close(read_image(turned, stored=True), CORNERS)
    rgba = np.dstack([CORNERS, np.full(CORNERS.shape[:2], 100, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert close(read_image(tmp_path / "b.png", stored=True), CORNERS)
    assert not close(read_image(tmp_path / "b.png"), CORNERS)
    images = open_images(tmp_path)
    for one in (images, images.subset([0, 1]), CachedImages(images, 10**6), CachedImages(images.subset([0]), 10**6)):
        assert close(one.as_stored().read(0), CORNERS)
        assert close(one.read(0), TURNS[6](CORNERS))
    assert images.as_stored().fingerprint() == images.fingerprint()


def test_damaged_exif_does_not_hide_the_picture(tmp_path):
    path = saved(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert close(read_image(path), CORNERS)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_pictures_become_colour(tmp_path, mode):
    path = saved(tmp_path / "a.png", mode=mode)
    expected = np.asarray(Image.fromarray(CORNERS).convert(mode).convert("RGB"))
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path, mode):
    picture = Image.new(mode, (4, 4), (0,) * len(mode.removesuffix("A")) + (0,))  # black, and nothing of it visible
    picture.putpixel((1, 2), (0,) * len(mode.removesuffix("A")) + (255,))
    picture.putpixel((3, 3), (0,) * len(mode.removesuffix("A")) + (51,))
    picture.save(tmp_path / "a.png")
    array = read_image(tmp_path / "a.png")
    assert (array[0, 0] == 255).all()
    assert (array[2, 1] == 0).all()
    assert (array[3, 3] == 204).all()  # 255 * (1 - 51 / 255)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 1), 1)
    for name in ("a.gif", "a.png"):
        picture.save(tmp_path / name, transparency=0)
        array = read_image(tmp_path / name)
        assert array[0, 0].tolist() == [255, 255, 255]
        assert array[1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_is_not_read_as_a_negative(tmp_path, suffix):
    assert close(read_image(saved(tmp_path / f"a{suffix}", mode="CMYK")), CORNERS)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path, suffix):
    values = np.array([[0, 1, 128, 129], [257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    array = read_image(tmp_path / f"a{suffix}")
    assert array[..., 0].tolist() == [[0, 0, 0, 1], [100, 100, 101, 255]]
    assert (array[..., 0] == array[..., 2]).all()


def test_sixteen_bit_colour_is_scaled_not_cut(tmp_path):
    """A PNG of 16 bits a channel, which Pillow cannot write: made by hand."""
    values = np.array([[[0, 257 * 7, 65535], [257 * 200, 257, 0]]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(data)
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 7, 255], [200, 1, 0]]]


def test_pixels_without_a_white_are_refused_not_guessed(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="which value is white"):
        read_image(tmp_path / "a.tif")


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_image(tmp_path / name)[0, 0].tolist() == [255, 0, 0], name


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7])
def test_a_file_cut_short_is_named(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UnreadableImage) as error:
        read_image(path, "class/a")
    assert error.value.name == "class/a"
    assert "\n" not in str(error.value)


def test_damage_anywhere_gives_a_picture_or_a_named_error(tmp_path):
    """Random bytes overwritten in files of every format: no other exception may come out."""
    random = np.random.default_rng(0)
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"):
        original = saved(tmp_path / f"a{suffix}").read_bytes()
        outcomes = set()
        for _ in range(60):
            data = bytearray(original)
            for place in random.integers(0, min(len(data), 400), 4):
                data[place] = random.integers(256)
            (tmp_path / f"b{suffix}").write_bytes(data)
            try:
                outcomes.add(read_image(tmp_path / f"b{suffix}", pixel_limit=10**6).ndim)
            except UnreadableImage:
                outcomes.add("unreadable")
        assert "unreadable" in outcomes, suffix


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # 3.6 gigapixels in a hundred bytes
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    (tmp_path / "bomb.png").write_bytes(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(UnreadableImage, match="60000 x 60000"):
        read_image(tmp_path / "bomb.png")
    path = saved(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"96 x 64 pixels are more than the limit of 6,143"):
        read_image(path, pixel_limit=64 * 96 - 1)
    assert read_image(path, pixel_limit=64 * 96).shape == (64, 96, 3)
    assert open_images(tmp_path, pixel_limit=64 * 96).read(0).shape == (64, 96, 3)


def test_an_own_limit_may_exceed_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a warning above, an error above twice that
    assert read_image(saved(tmp_path / "a.png")).shape == (64, 96, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_reasons_say_what_is_wrong(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    reasons = {"empty.jpg": "empty", "text.png": "known kind", "phone.heic": "HEIC", "missing.png": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)


def test_a_flat_folder_has_names_in_order_and_no_labels(tmp_path):
    for name in ("b.png", "a.png", "c.PNG"):
        saved(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    images = open_images(tmp_path)
    assert images.names == ["a.png", "b.png", "c.PNG"]
    assert images.labels is None
    assert images.classes == []


def test_subfolders_name_the_classes(tmp_path):
    for name in ("dog/1.png", "dog/old/2.png", "cat/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / name)
    images = open_images(tmp_path)
    assert images.names == ["cat/3.png", "dog/1.png", "dog/old/2.png"]
    assert images.classes == ["cat", "dog"]
    assert images.labels == [0, 1, 1]
    assert images.subset([2, 0]).labels == [1, 0]
    saved(tmp_path / "stray.png")
    with pytest.warns(UserWarning, match="stray.png"):
        assert open_images(tmp_path).labels is None  # one picture without a class: these are no classes


def test_train_and_val_are_splits_not_classes(tmp_path):
    for name in ("train/dog/1.png", "train/cat/2.png", "val/dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / name)
    assert open_images(tmp_path, "train").names == ["cat/2.png", "dog/1.png"]
    assert open_images(tmp_path, "validation").names == ["dog/3.png"]
    assert open_images(tmp_path).classes == ["cat", "dog"]
    with pytest.raises(UsageError, match="no split 'test'"):
        open_images(tmp_path, "test")


def test_hidden_files_links_and_loops_are_harmless(tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    (outside / "b").mkdir(parents=True)
    (inside / "a" / ".thumbnails").mkdir(parents=True)
    saved(inside / "a" / "1.png")
    saved(outside / "b" / "2.png")
    saved(inside / "a" / "._1.png")
    saved(inside / "a" / ".thumbnails" / "1.png")
    (inside / "a" / "up").symlink_to(inside)  # a loop
    (inside / "a" / "self.png").symlink_to(inside / "a" / "self.png")  # a link to itself
    (inside / "linked").symlink_to(outside)
    (inside / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")  # reading it would wait for ever
    with pytest.warns(UserWarning, match="named pipe"), pytest.warns(UserWarning, match="no classes are used"):
        images = open_images(inside)
    assert images.names == ["a/1.png", "a/self.png", "gone.png", "linked/b/2.png"]
    assert images.read(0).shape == images.read(3).shape == (64, 96, 3)
    for number in (1, 2):
        with pytest.raises(UnreadableImage):
            images.read(number)


def test_a_single_file_is_a_set_of_one(tmp_path):
    images = open_images(saved(tmp_path / "a.png"))
    assert images.names == ["a.png"]
    assert np.array_equal(images.read(0), CORNERS)


def test_mistakes_get_one_line_that_helps(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    cases = {
        str(tmp_path / "missing"): "no file or folder",
        str(tmp_path / "empty"): "no images in",
        str(tmp_path / "notes.txt"): "is no image",
        "openmojis": "openmoji, openmoji-subcategories, photo-crops, photos",
    }
    for source, words in cases.items():
        with pytest.raises(UsageError, match=words) as error:
            open_images(source)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="choose from train, validation, test"):
        open_images(tmp_path, "val")


def test_holding_out_is_a_partition_that_depends_on_names_alone(tmp_path):
    for number in range(20):
        saved(tmp_path / f"{number}.png")
    images = open_images(tmp_path)
    rest, held = images.hold_out(0.2)
    assert len(held) == 4
    assert sorted(rest.names + held.names) == images.names
    backwards = images.subset(range(19, -1, -1))
    assert backwards.hold_out(0.2)[1].names == held.names[::-1]
    assert len(images.hold_out(0.001)[1]) == 1
    with pytest.raises(UsageError, match="at least 2"):
        images.subset([0]).hold_out(0.5)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "avif"])
@counts
def test_a_mutated_picture_is_read_or_named_in_one_line(tmp_path, suffix, count):
    path = tmp_path / f"a.{suffix}"
    try:
        saved(path, CORNERS[16:48, 32:64])
    except (KeyError, ValueError):
        pytest.skip("this Pillow writes no AVIF")

    def right(array: np.ndarray) -> None:
        assert (array.ndim, array.shape[-1], array.dtype) == (3, 3, np.uint8)

    survives(lambda path: read_image(path, pixel_limit=10**6), path, seed=16, count=count, check=right)
