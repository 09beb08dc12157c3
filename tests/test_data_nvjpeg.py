"""JPEG on a GPU through torchcodec: what is asked of it, what is refused, and how far its pixels are from Pillow's."""

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from lexel.data import UnreadableImage, open_images
from lexel.data.batches import ordered_batches, training_batches
from lexel.data.config import DataConfig, open_data
from lexel.data.transforms import TRANSFORMS
from lexel.errors import UsageError

STAND_IN = '''
import io
import os
import numpy as np
import torch
from PIL import Image, ImageFile

PROCESS = os.getpid()

def decode_jpeg(data, mode, device):
    """Pillow's pixels, the last channel inverted so as to be seen; turned by EXIF; what is missing is grey."""
    assert device == "cuda:0"
    assert os.getpid() == PROCESS, "CUDA does not work in a fork"
    image = Image.open(io.BytesIO(data))
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    image.load()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if image.getexif().get(0x0112) == 6:
        image = image.transpose(Image.Transpose.ROTATE_270)
    pixels = np.array(image.convert({"GRAY": "L", "RGB": "RGB"}[mode]))
    pixels = pixels[None] if mode == "GRAY" else pixels.transpose(2, 0, 1)
    pixels[-1] = 255 - pixels[-1]
    return torch.from_numpy(pixels)
'''
ROWS, COLUMNS = np.mgrid[0:32, 0:48]
RAMP = np.stack([5 * COLUMNS, 7 * ROWS, 0 * ROWS + 100], -1).astype(np.uint8)


def data_of(folder, **options):
    return DataConfig(source=str(folder), size=16, jpeg_decoder="nvjpeg", **options)


def jpeg(**options):
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU and a torchcodec for it, also in processes that are started from here."""
    package = tmp_path / "packages" / "torchcodec"
    (package / "decoders").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "decoders" / "__init__.py").write_text(STAND_IN)
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)  # and back to what it was
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Three equal JPEG files, the second and third with an orientation of EXIF, the third with bytes that fill."""
    place = tmp_path / "pictures"
    place.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (place / "0.jpg").write_bytes(jpeg())
    (place / "1.jpg").write_bytes(jpeg(exif=exif))
    (place / "1b.jpg").write_bytes(jpeg(exif=exif).replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1))
    return place


def test_jpegs_are_decoded_on_the_gpu_and_turned_once(folder, gpu):
    plain = open_images(folder)
    images = open_data(data_of(folder, validation=str(folder)))[0]
    for number in range(3):
        inverted = plain.read(number).copy()
        inverted[..., 2] = 255 - inverted[..., 2]
        assert np.array_equal(images.read(number), inverted)
    assert images.as_stored().read(1).shape == (32, 48, 3)
    grey = open_data(data_of(folder, channels=1, depth=16, validation=str(folder)))[0].read(1)
    assert (grey.shape, grey.dtype) == ((48, 32, 1), np.uint16)


def test_other_files_and_those_that_nvjpeg_would_not_refuse_stay_with_pillow(folder, gpu):
    (folder / "0.jpg").write_bytes(jpeg()[:-100])  # nvJPEG is not asked to guess the rest
    Image.fromarray(RAMP).save(folder / "2.png")
    Image.fromarray(RAMP).convert("CMYK").save(folder / "3.jpg")
    Image.fromarray(RAMP[..., 0]).save(folder / "4.jpg", quality=95)
    plain = open_images(folder)
    images = open_data(data_of(folder, validation=str(folder), memory=0))[0]
    for number in (3, 4):
        assert np.array_equal(images.read(number), plain.read(number))
    assert np.array_equal(images.read(5), 255 - plain.read(5))
    for reader in (plain, images):
        with pytest.raises(UnreadableImage, match=r"0\.jpg cannot be read as an image: image file is truncated"):
            reader.read(0)


def test_a_picture_of_another_size_than_its_header_says_is_unreadable(folder, gpu, monkeypatch):
    images = open_data(data_of(folder, validation=str(folder), memory=0))[0]
    images.read(0)
    small = torch.zeros(3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(sys.modules["torchcodec.decoders"], "decode_jpeg", lambda *_, **__: small)
    with pytest.raises(UnreadableImage, match=r"nvJPEG gave an array of \(8, 8, 3\) for 48 x 32 pixels"):
        images.read(0)


@pytest.mark.slow
def test_reading_processes_are_started_anew_and_give_the_same_batches(folder, gpu):
    transform = TRANSFORMS["titok"](16)
    for source in (str(folder), f"mixture:0.5*{folder} + 0.5*{folder}"):
        images = open_data(data_of(source, validation=str(folder), workers=1))[0]
        assert images.subset([0]).decoded_on_gpu
        here, there = (next(training_batches(images, transform, 4, 0, workers=workers)).images for workers in (0, 1))
        assert torch.equal(here, there)
    assert not open_images(folder).decoded_on_gpu


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "needs torchcodec 0.16 or later"),
        (types.ModuleType("torchcodec.decoders"), "needs torchcodec 0.16 or later"),  # 0.15 has no decode_jpeg
        (OSError("no libnvrtc.so.13\nhere"), r"needs torchcodec, which does not load \(no libnvrtc.so.13 here\)"),
    ],
    ids=["missing", "old", "does not load"],
)
def test_what_decoding_on_a_gpu_lacks_is_said_in_a_line(folder, gpu, monkeypatch, found, says):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise found

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    found_here = Broken("torchcodec.decoders") if isinstance(found, OSError) else found
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", found_here)
    with pytest.raises(UsageError, match=f"data.jpeg_decoder = 'nvjpeg' {says}.*leave it out, and Pillow decodes$"):
        open_data(data_of(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"needs a CUDA device; leave it out, and Pillow decodes$"):
        open_data(data_of(folder))
    with pytest.raises(ValueError, match="jpeg_scaling is Pillow's and does not go with jpeg_decoder 'nvjpeg'"):
        data_of(folder, transform="titok", jpeg_scaling=True)


@pytest.mark.gpu
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_nvjpeg_is_within_two_levels_of_pillow_where_chroma_is_whole_and_near_it_elsewhere(
    tmp_path, subsampling, progressive
):
    pytest.importorskip("torchcodec")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))
    for number, size in enumerate([(130, 91), (64, 64), (640, 480)]):
        smooth = noise.resize(size, Image.Resampling.BICUBIC)
        path = tmp_path / f"{number}.jpg"
        smooth.save(path, quality=90, subsampling=subsampling, progressive=progressive)
    plain = open_images(tmp_path)
    images = open_data(data_of(tmp_path, validation=str(tmp_path), memory=0))[0]
    for number in range(3):
        difference = np.abs(images.read(number).astype(int) - plain.read(number))
        print(subsampling, progressive, number, difference.max(), difference.mean())
        assert difference.max() <= 2 if subsampling == 0 else difference.mean() <= 2
    transform = TRANSFORMS["titok"](32)
    alone = [batch.images for batch in ordered_batches(images, transform, 1)]
    assert torch.equal(torch.cat(alone), next(iter(ordered_batches(images, transform, 3, workers=1))).images)
