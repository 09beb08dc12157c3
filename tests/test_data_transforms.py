"""Named transforms against float64 oracles, and the way between arrays and images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lexel.data import TRANSFORMS, crop_back, pad_to_multiple, to_images, to_uint8
from lexel.errors import UsageError

SHAPES = [(40, 64), (64, 40), (32, 32), (33, 47), (7, 100), (100, 7), (1, 1), (200, 150), (31, 33)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_transform_makes_a_square_of_every_shape(name, shape):
    array = noise(*shape)
    before = array.copy()
    for generator in (None, stream()):
        square = TRANSFORMS[name](32)(array, generator)
        assert square.shape == (32, 32, 3)
        assert square.dtype == np.uint8
    assert np.array_equal(array, before)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_a_function_of_the_picture_and_the_stream(name):
    array, transform = noise(50, 70), TRANSFORMS[name](32)
    assert np.array_equal(transform(array, None), transform(array, None))
    assert np.array_equal(transform(array, stream(3)), transform(array, stream(3)))


def bilinear_oracle(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel bilinear in float64, written out pixel by pixel."""
    result = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * array.shape[0] / height - 0.5, 0), array.shape[0] - 1)
            u = min(max((x + 0.5) * array.shape[1] / width - 0.5, 0), array.shape[1] - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, array.shape[0] - 1), min(x0 + 1, array.shape[1] - 1)
            top = array[y0, x0] * (1 - (u - x0)) + array[y0, x1] * (u - x0)
            bottom = array[y1, x0] * (1 - (u - x0)) + array[y1, x1] * (u - x0)
            result[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return result


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 47), (7, 30), (1, 1), (90, 61)])
def test_published_is_bilinear_without_antialiasing_in_the_centre(shape):
    array, size = noise(*shape), 16
    scale = size / min(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    top, left = (height - size) // 2, (width - size) // 2
    oracle = bilinear_oracle(array, height, width)[top : top + size, left : left + size]
    error = np.abs(TRANSFORMS["published"](size)(array).astype(float) - oracle)
    assert error.max() <= 0.75  # half a level of rounding, and what weights of 11 bits cost


OPENCV = [
    [[44, 81, 119], [207, 20, 57], [177, 214, 27]],
    [[60, 97, 134], [222, 35, 72], [192, 229, 42]],
    [[74, 111, 149], [87, 50, 87], [207, 95, 57]],
]


def test_published_equals_opencv_to_the_bit():
    """Pixels that OpenCV 4.14 and 5.0 gave for this picture; the oracle above rounds some of them differently."""
    array = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 37 % 256).astype(np.uint8)
    square = TRANSFORMS["published"](3)(array)
    assert square.tolist() == OPENCV
    assert np.rint(bilinear_oracle(array, 3, 4)[:, :3]).tolist() != OPENCV


def test_adm_and_titok_are_pillows_bicubic_with_their_own_rounding():
    array = noise(97, 61)
    image = Image.fromarray(array)
    whole = np.asarray(image.resize((32, 50), Image.Resampling.BICUBIC))  # 97 * 32 / 61 = 50.9, rounded down
    assert np.array_equal(TRANSFORMS["titok"](32)(array), whole[9:41])
    halved = image.resize((30, 48), Image.Resampling.BOX).resize((15, 24), Image.Resampling.BOX)  # 15 < 2 * 8
    whole = np.asarray(halved.resize((8, 13), Image.Resampling.BICUBIC))  # 24 * 8 / 15 = 12.8, rounded
    assert np.array_equal(TRANSFORMS["adm"](8)(array), whole[2:10])


@pytest.mark.parametrize("name", ["titok", "adm"])
def test_the_crop_of_a_long_strip_is_the_crop_of_the_whole(name):
    array = noise(300, 20)
    whole = np.asarray(Image.fromarray(array).resize((16, 240), Image.Resampling.BICUBIC))[112:128].astype(int)
    assert np.abs(TRANSFORMS[name](16)(array) - whole).max() <= 1


@pytest.mark.parametrize("name", ["published", "flip", "adm", "titok", "crop"])
def test_random_crops_reach_every_place_and_only_those(name):
    ramp = np.broadcast_to(np.arange(36, dtype=np.uint8)[None, :, None], (32, 36, 3))
    transform = TRANSFORMS[name](32)
    starts = {int(square.min()) for square in (transform(np.ascontiguousarray(ramp), stream(s)) for s in range(100))}
    assert starts == {0, 1, 2, 3, 4}
    assert int(transform(np.ascontiguousarray(ramp)).min()) == 2
    upright = np.ascontiguousarray(ramp.swapaxes(0, 1))
    assert {int(transform(upright, stream(s)).min()) for s in range(100)} == {0, 1, 2, 3, 4}
    assert int(transform(upright).min()) == 2


def test_only_flip_and_random_resized_mirror():
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (32, 32, 3)))
    for name, transform in TRANSFORMS.items():
        mirrored = [
            bool(transform(32)(ramp, stream(s))[0, 0, 0] > transform(32)(ramp, stream(s))[0, -1, 0]) for s in range(60)
        ]
        if name in ("flip", "random_resized"):
            assert 15 < sum(mirrored) < 45, name
        else:
            assert not any(mirrored), name


def test_adm_averages_where_published_aliases():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    assert set(np.unique(TRANSFORMS["adm"](32)(stripes))) <= {127, 128}
    lines = np.zeros((128, 128, 3), np.uint8)
    lines[:, ::4] = 255  # seen by no pixel of the resized picture
    assert TRANSFORMS["published"](32)(lines).max() == 0
    assert TRANSFORMS["titok"](32)(lines).mean() == pytest.approx(255 / 4, abs=2)


def test_adm_halves_a_picture_of_twice_the_size_by_averaging_alone():
    array = noise(16, 16)
    means = array.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(TRANSFORMS["adm"](8)(array) - means).max() <= 1  # Pillow rounds once a direction


def test_crop_keeps_the_pixels_and_pad_keeps_the_whole():
    array = noise(50, 70)
    assert np.array_equal(TRANSFORMS["crop"](32)(array), array[9:41, 19:51])
    padded = TRANSFORMS["pad"](35)(np.zeros((50, 70, 3), np.uint8))
    assert (padded[5:30] == 0).all()
    assert (padded[:5] == 255).all()
    assert (padded[30:] == 255).all()


def test_long_strips_cost_no_memory():
    for name in TRANSFORMS:
        assert TRANSFORMS[name](256)(noise(1, 30000)).shape == (256, 256, 3)  # 7.7 million columns if resized whole


def test_a_size_must_be_positive():
    with pytest.raises(UsageError, match="at least 1"):
        TRANSFORMS["published"](0)


def test_arrays_and_images_hold_the_same():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 16, 8, 3)
    images = to_images(array)
    assert images.shape == (2, 3, 16, 8)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-6)
    assert np.array_equal(to_uint8(images), array)
    assert np.array_equal(to_uint8(to_images(array[0])), array[0])
    assert to_uint8(torch.tensor([-3.0, -1.0, -0.9961, 0.0, 1.0, 7.0]).view(2, 3, 1, 1)).ravel().tolist() == [
        *(0, 0, 0),
        *(128, 255, 255),
    ]
    with pytest.raises(UsageError, match="uint8"):
        to_images(array.astype(np.float32))
    frozen = array.copy()
    frozen.setflags(write=False)
    to_images(frozen)
    assert np.array_equal(frozen, array)


@pytest.mark.parametrize("mode", ["edge", "reflect"])
@pytest.mark.parametrize("side", [(16, 16), (17, 30), (31, 9)])
def test_padding_fits_the_factor_and_comes_off_again(mode, side):
    images = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0))
    padded = pad_to_multiple(images, 16, mode)
    assert all(length % 16 == 0 and length - old < 16 for length, old in zip(padded.shape[-2:], side, strict=True))
    assert torch.equal(crop_back(padded, *side), images)
    if side == (17, 30):
        bottom, right = padded[..., 17:, :30], padded[..., :17, 30:]
        if mode == "edge":
            assert torch.equal(bottom, images[..., 16:, :].expand_as(bottom))
            assert torch.equal(right, images[..., :, 29:].expand_as(right))
        else:
            assert torch.equal(bottom, images[..., 1:16, :].flip(-2))
            assert torch.equal(right, F.pad(images, (0, 2, 0, 0), mode="reflect")[..., 30:])


def test_a_picture_smaller_than_the_padding_cannot_be_reflected():
    with pytest.raises(UsageError, match="use 'edge'"):
        pad_to_multiple(torch.zeros(1, 3, 3, 16), 16, "reflect")
    assert pad_to_multiple(torch.zeros(1, 3, 3, 16), 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("height, width", [(20, 20), (20, 23), (21, 19), (9, 30), (8, 7), (15, 16)])
def test_center_crop_is_torchvisions(height, width):
    """Its offset is round((side - size) / 2), ties to even; what is missing is black, the odd pixel at the end."""
    array, size = noise(height, width), 16
    square = TRANSFORMS["center_crop"](size)(array)
    for row in range(size):
        for column in range(size):
            at = []
            for position, side in ((row, height), (column, width)):
                at.append(position + round((side - size) / 2) if side >= size else position - (size - side) // 2)
            inside = 0 <= at[0] < height and 0 <= at[1] < width
            assert square[row, column].tolist() == (array[at[0], at[1]].tolist() if inside else [0, 0, 0])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(20, 31), (40, 33), (64, 64), (9, 12)])
def test_every_transform_carries_channels_and_depth(name, shape):
    """Three equal channels of 8 bits give the same as one, and 16 bits the same to a level of 8."""
    transform = TRANSFORMS[name](16)
    colour = np.random.default_rng(0).integers(90, 160, (*shape, 3), np.uint8)  # no overshoot that 8 bits would clip
    for seed in (None, 3):
        draw = lambda: None if seed is None else np.random.default_rng(seed)  # noqa: B023, E731
        expected = transform(colour, draw())
        bands = transform(np.concatenate([colour, colour[..., :2]], -1), draw())
        assert bands.shape == (16, 16, 5)
        assert np.array_equal(bands, np.concatenate([expected, expected[..., :2]], -1))
        deep = transform(colour.astype(np.uint16) * 257, draw())
        assert deep.dtype == np.uint16
        assert np.abs(deep / 257 - expected).max() <= 2.1  # 8 bits are rounded between the passes


def test_images_keep_channels_and_depth():
    deep = np.random.default_rng(0).integers(0, 65536, (2, 4, 5, 7), dtype=np.uint16)
    images = to_images(deep)
    assert images.shape == (2, 7, 4, 5)
    assert np.array_equal(((images.double() + 1) * 32767.5).round().numpy().transpose(0, 2, 3, 1), deep)


def test_truncated_pixels_are_those_of_the_published_sampler():
    """(255 * (x + 1) / 2).astype(uint8) on clamped floats; on average half a level below the rounded ones."""
    images = torch.rand(2, 3, 8, 8) * 2.4 - 1.2
    published = (255 * ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()).astype(np.uint8)
    assert np.array_equal(to_uint8(images, "truncate"), published)
    assert 0.3 < (to_uint8(images).astype(int) - published).mean() < 0.7
