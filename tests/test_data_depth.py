"""Pixels at the depth and with the channels that a file stores, and those that are asked for."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lexel.data import UnreadableImage, open_images, read_image
from lexel.data.depth import to_channels, to_depth

VALUES = np.array([0, 128, 129, 255, 256, 511, 32767, 65025, 65279, 65535], np.uint16)
ROUNDED = np.round(VALUES / 257).astype(int).tolist()  # [0, 0, 1, 1, 1, 2, 127, 253, 254, 255]
COLOURS = {1: 0, 3: 2, 2: 4, 4: 6}  # channels of a PNG to its colour type


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG of uint16 (H, W, C) samples, which Pillow cannot write; every row by another filter."""
    height, width, channels = samples.shape
    passes = [samples]
    if interlaced:  # Adam7: first row, first column, steps down and right
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        passes = [samples[y::dy, x::dx] for y, x, dy, dx in starts]
    rows, step = [], 2 * channels
    for part in (part for part in passes if part.size):
        above = bytes(part.shape[1] * step)
        for number, row in enumerate(part.astype(">u2")):
            raw = row.tobytes()
            if number % 2:  # filter 2: the difference to the row above
                rows.append(b"\2" + bytes((a - b) % 256 for a, b in zip(raw, above, strict=True)))
            else:  # filter 1: the difference to the pixel at the left
                left = bytes(step) + raw
                rows.append(b"\1" + bytes((a - b) % 256 for a, b in zip(raw, left, strict=False)))
            above = raw
    header = struct.pack(">IIBBBBB", width, height, 16, COLOURS[channels], 0, 0, int(interlaced))
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


def noise(channels: int, height: int = 5, width: int = 11) -> np.ndarray:
    samples = np.random.default_rng(channels).integers(0, 65536, (height, width, channels), dtype=np.uint16)
    if channels in (2, 4):
        samples[..., -1] = 65535
    return samples


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", COLOURS)
def test_sixteen_bit_pngs_are_rounded_and_can_be_had_whole(tmp_path, channels, interlaced):
    samples = noise(channels)
    samples[0, : len(VALUES), 0] = VALUES
    (tmp_path / "a.png").write_bytes(png(samples, interlaced=interlaced))
    colour = np.repeat(samples[..., :1], 3, -1) if channels < 3 else samples[..., :3]
    assert read_image(tmp_path / "a.png")[0, : len(VALUES), 0].tolist() == ROUNDED
    assert np.array_equal(read_image(tmp_path / "a.png"), np.round(colour / 257).astype(np.uint8))
    assert np.array_equal(read_image(tmp_path / "a.png", depth=16), colour)
    whole = read_image(tmp_path / "a.png", channels=4, depth=16)
    assert np.array_equal(whole, np.concatenate([colour, np.full_like(colour[..., :1], 65535)], -1))


def test_stored_pixels_of_sixteen_bits_are_not_laid_on_white(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (5, 11, 4)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png(samples))
    assert np.array_equal(read_image(tmp_path / "a.png", depth=16, stored=True), samples[..., :3])
    assert not np.array_equal(read_image(tmp_path / "a.png", depth=16), samples[..., :3])


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_tiffs_are_rounded_whatever_their_byte_order(tmp_path, channels, order, compression):
    tifffile = pytest.importorskip("tifffile")
    samples = noise(channels)
    kind = "minisblack" if channels == 1 else "rgb"
    given = samples[..., 0] if channels == 1 else samples
    options = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", given, photometric=kind, byteorder=order, compression=compression, **options)
    colour = np.repeat(samples, 3, -1) if channels == 1 else samples[..., :3]
    assert np.array_equal(read_image(tmp_path / "a.tif", depth=16), colour)
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.round(colour / 257).astype(np.uint8))


def test_tiffs_that_pillow_would_decode_to_other_pixels_are_refused_or_right(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    samples = noise(3)
    for compression in (None, "deflate"):
        options = {"photometric": "rgb", "planarconfig": "separate", "compression": compression}
        tifffile.imwrite(tmp_path / "apart.tif", samples.transpose(2, 0, 1), **options)
        with pytest.raises(UnreadableImage, match="separate planes of 16 bits"):
            read_image(tmp_path / "apart.tif")
    tifffile.imwrite(
        tmp_path / "bands.tif",
        noise(5).transpose(2, 0, 1),
        photometric="minisblack",
        planarconfig="separate",
        compression="deflate",
    )
    with pytest.raises(UnreadableImage, match="5 channels"):
        read_image(tmp_path / "bands.tif")
    tifffile.imwrite(tmp_path / "negative.tif", VALUES[None], photometric="miniswhite")
    assert read_image(tmp_path / "negative.tif")[0, :, 0].tolist() == [255 - value for value in ROUNDED]
    tifffile.imwrite(tmp_path / "signed.tif", VALUES[None].astype(np.int16), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="which value is white"):
        read_image(tmp_path / "signed.tif")


def test_twelve_bit_grey_reaches_white(tmp_path):
    values = [0, 2048, 4095, 1000]
    packed = bytes([0, 0x08, 0, 0xFF, 0xF3, 0xE8])  # 12 bits each: 000 800 FFF 3E8
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: len(packed)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + packed)
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [round(value * 255 / 4095) for value in values]
    assert read_image(tmp_path / "a.tif", depth=16)[0, 2].tolist() == [65535] * 3


def test_one_transparent_colour_of_sixteen_bits_is_white(tmp_path):
    grey = np.array([[[300], [301]]], np.uint16)
    (tmp_path / "a.png").write_bytes(png(grey, chunk(b"tRNS", struct.pack(">H", 300))))
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 1]
    colour = np.array([[[300, 5, 6], [300, 5, 7]]], np.uint16)
    (tmp_path / "b.png").write_bytes(png(colour, chunk(b"tRNS", struct.pack(">HHH", 300, 5, 6))))
    assert read_image(tmp_path / "b.png").tolist() == [[[255, 255, 255], [1, 0, 0]]]


def test_orientation_turns_sixteen_bits_as_it_turns_eight(tmp_path):
    samples = noise(3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        (tmp_path / "a.png").write_bytes(png(samples, data))
        Image.fromarray(to_depth(samples, 8)).save(tmp_path / "b.png", exif=exif)
        assert np.array_equal(to_depth(read_image(tmp_path / "a.png", depth=16), 8), read_image(tmp_path / "b.png"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK"])
def test_channels_are_what_was_asked_for(tmp_path, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)).convert(mode)
    picture.save(tmp_path / "a.tif")
    colour = read_image(tmp_path / "a.tif")
    for channels, name in ((1, "L"), (4, "RGBA")):
        array = read_image(tmp_path / "a.tif", channels=channels)
        assert array.shape == (6, 7, channels)
        if "A" not in mode:
            expected = np.asarray(Image.fromarray(colour).convert(name)).reshape(6, 7, channels)
            assert np.array_equal(array, expected)
    assert np.array_equal(read_image(tmp_path / "a.tif", depth=16), colour.astype(np.uint16) * 257)
    images = open_images(tmp_path, channels=4, depth=16)
    assert (images.channels, images.depth, images.read(0).shape) == (4, 16, (6, 7, 4))
    assert images.read(0).dtype == np.uint16


def test_grey_is_weighed_as_pillow_weighs_it():
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert np.array_equal(to_channels(colours, 1)[..., 0], np.asarray(Image.fromarray(colours).convert("L")))
    with pytest.raises(ValueError, match="5 channels"):
        to_channels(np.zeros((2, 2, 5), np.uint8), 3)


def test_the_text_of_a_png_is_no_reason_to_refuse_it(tmp_path):
    picture = Image.fromarray(np.full((3, 4, 3), 9, np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data, head = buffer.getvalue(), 8 + 25  # behind the header
    for name, extra in {
        "text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**22))),
        "international": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"a" * 2**22)),
        "profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**22))),
        "broken profile": chunk(b"iCCP", b"p\0\0nonsense"),
        "short gamma": chunk(b"gAMA", b"\0"),
        "long exif": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**22))),
    }.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data[:head] + extra + data[head:])
        assert (read_image(path) == 9).all(), name


def test_orientation_is_found_in_a_pngs_text_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    packed = exif.tobytes().hex()
    text = f"\nexif\n{len(packed) // 2:8}\n{packed}\n".encode()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "PNG")
    data = buffer.getvalue()
    extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    (tmp_path / "a.png").write_bytes(data[:33] + extra + data[33:])
    assert read_image(tmp_path / "a.png").shape == (4, 2, 3)
