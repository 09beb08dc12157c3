"""HEIC through torchcodec: what it holds, what is missing, and how far torchcodec's pixels are from Pillow's."""

import base64
import io
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.data import UnreadableImage, open_images, read_image
from lexel.data.files import FORMATS

# RAMP through libheif 1.15.1 and x265 at quality 90.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAa1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAAA5waXRtAA"
    "AAAAACAAAAEGlkYXQAAAAAADAAIAAAADhpbG9jAQAAAERAAAIAAQAAAAAAAAHRAAEAAAAAAAABAwACAAEAAAAAAAAAAQAAAAAAAAAIAAAAOGlp"
    "bmYAAAAAAAIAAAAVaW5mZQIAAAEAAQAAaHZjMQAAAAAVaW5mZQIAAAAAAgAAZ3JpZAAAAADYaXBycAAAALZpcGNvAAAAdmh2Y0MBA3AAAAAAAA"
    "AAAAAe8AD8/fj4AAAPAyAAAQAYQAEMAf//A3AAAAMAkAAAAwAAAwAeugJAIQABACpCAQEDcAAAAwCQAAADAAADAB6gIIEFlurkprm4EBAwIAAA"
    "AwAgAAADACEiAAEABkQBwXPAiQAAABRpc3BlAAAAAAAAAEAAAABAAAAAFGlzcGUAAAAAAAAAMAAAACAAAAAQcGl4aQAAAAADCAgIAAAAGmlwbW"
    "EAAAAAAAAAAgABAoECAAICA4QAAAAaaXJlZgAAAAAAAAAOZGltZwACAAEAAQAAAQttZGF0AAAA/ygBrwY45cWD7qYjewdBzADqwE2onT8hClxT"
    "bnCka75ZKvpB1Wu0j6DhkBqKzymAWpM32/gn2/2wma14KG65Bl75ZQP/AIPPQExRThMuOsiJhqlx++7NXGaWcsAcQPAIr7UPUY+8I/+RtriPyk"
    "+C38jdVcroUbmGFYwgN95kKXLlU5gNGzSlMW4tX1a6k+vKv3CNHQlzA2oXgsK1dk7iKk3b7bEebRVQlfddaWPtziNpalMPXpjxM/TdWE6liw6j"
    "dbB7anYJ56EWZ8OC2Bm1sxSxwsjeVK4dM3aqtCDm85Jt476W1iCGQa9wo47ODvElD7PCn2G20oPYePMGHc5xgA=="
)
ROWS, COLUMNS = np.mgrid[0:32, 0:48]
RAMP = np.stack([5 * COLUMNS, 7 * ROWS, 0 * ROWS + 128], -1).astype(np.uint8)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(HEIC)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    """A torchcodec that decodes anything to RAMP, a quarter of it transparent, at the depth that is asked for."""

    def decode_heic(data, mode, output_dtype):
        assert (data, mode) == (HEIC, "RGB_ALPHA")
        alpha = np.where((ROWS < 16) & (COLUMNS < 24), 0, 255)[..., None]
        pixels = torch.from_numpy(np.concatenate([RAMP, alpha], -1)).movedim(-1, 0)
        return pixels.to(torch.uint8) if output_dtype == torch.uint8 else (257 * pixels).to(torch.uint16)

    decoders = types.SimpleNamespace(decode_heic=decode_heic)
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(decoders=decoders))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def decoders():
    """torchcodec's own; a CPU build of PyTorch lacks libraries that they need."""
    try:
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec does not load: {str(error)[:80]}")
    return torchcodec.decoders


def test_a_heic_file_gives_the_channels_and_bits_that_are_asked_for(file, stand_in):
    picture = read_image(file)
    assert (picture[:16, :24] == 255).all()  # transparency lies on white
    assert np.array_equal(picture[16:], RAMP[16:])
    assert np.array_equal(read_image(file, stored=True), RAMP)
    assert read_image(file, channels=4).shape == (32, 48, 4)
    deep = read_image(file, depth=16)
    assert np.array_equal(deep, 257 * picture.astype(np.uint16))
    assert read_image(file, channels=1, depth=16).shape == (32, 48, 1)
    assert np.array_equal(open_images(file.parent).read(0), picture)


def test_a_heic_file_beyond_the_limit_is_refused_before_it_is_decoded(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UnreadableImage, match="64 x 64 pixels are more than the limit of 4,095"):  # x265's blocks
        read_image(file, pixel_limit=4095)
    size = struct.pack(">4xII", 64, 64)
    assert HEIC.count(size) == 1
    file.write_bytes(HEIC.replace(size, struct.pack(">4xII", 60000, 60000)))
    with pytest.raises(UnreadableImage, match="60000 x 60000 pixels are more"):
        read_image(file)
    file.write_bytes(HEIC.replace(b"ispe", b"ipse"))
    with pytest.raises(UnreadableImage, match="does not say its size"):
        read_image(file)


@pytest.mark.parametrize("how", [None, OSError("no libnvrtc.so.13\nhere")], ids=["missing", "does not load"])
def test_heic_without_torchcodec_is_named_with_what_would_read_it(file, monkeypatch, how):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise how

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", how and Broken("torchcodec.decoders"))
    why = r"does not load \(no libnvrtc.so.13 here\)" if how else "needs torchcodec 0.16 or later and libheif"
    with pytest.raises(UnreadableImage, match=f"{why}.*or convert it to JPEG or PNG$"):
        read_image(file)


def test_torchcodec_gives_the_picture_that_was_encoded(file):
    decoders()
    assert np.abs(read_image(file).astype(int) - RAMP).max() <= 6
    assert np.abs(read_image(file, depth=16).astype(int) - 257 * RAMP.astype(int)).max() <= 6 * 257


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 50, "subsampling": 0}),
        ("JPEG", {"quality": 75, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
        ("AVIF", {"quality": 80}),
    ],
)
def test_the_pixels_of_torchcodec_are_those_of_pillow(tmp_path, kind, options):
    decode = decoders().decode_image
    if kind not in FORMATS:
        pytest.skip("Pillow 11.3 and later decode AVIF")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))
    for shape in [(130, 91), (64, 64), (17, 5)]:
        buffer = io.BytesIO()
        noise.resize(shape, Image.Resampling.BICUBIC).save(buffer, kind, **options)
        (tmp_path / "a").write_bytes(buffer.getvalue())
        pixels = decode(buffer.getvalue(), mode="RGB").permute(1, 2, 0).numpy()
        assert np.array_equal(read_image(tmp_path / "a"), pixels)
