"""Protocols measure what the released evaluations measure: each convention against the facts of that code."""

import dataclasses
import io
import math

import numpy as np
import pytest
import skimage  # which imports its parts when they are used
import torch
from PIL import Image
from torch import Tensor
from toys import Grey, Palette

from lexel.data import ArrayImages, to_images
from lexel.errors import UsageError
from lexel.evaluate import PROTOCOLS, evaluate_samples, evaluate_tokenizer
from lexel.evaluate.metric import preprocess
from lexel.evaluate.reconstructions import pad
from lexel.losses import LPIPS
from lexel.metrics import contiguous_splits
from lexel.metrics.pixels import divided_in_float64, on_unit_scale
from lexel.metrics.protocols import SSIMRule, protocol

LEVELS = np.arange(256, dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))


def photos(count: int = 3, size: int = 64) -> np.ndarray:
    array = skimage.data.astronaut()
    places = [(50 * n % 400, 60 * n % 420) for n in range(count)]
    return np.stack([array[top : top + size, left : left + size] for top, left in places])


def image_set(array: np.ndarray) -> ArrayImages:
    return ArrayImages(array, [str(number) for number in range(len(array))])


def levels_of(images: Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().to(torch.uint8).numpy()


# --------------------------------------------------------------------------------------------- titok


def test_titok_shows_the_network_originals_as_they_are_and_reconstructions_rounded():
    """The released evaluator rounds reconstructions to levels before it casts them to bytes; originals are exact."""
    originals = to_images(np.broadcast_to(LEVELS[:, None, None], (256, 1, 3)).copy())[None]
    assert (levels_of(preprocess(originals, PROTOCOLS["titok"]))[0, 0, :, 0] == LEVELS).all()
    between = originals + 0.7 / 127.5  # nearer to the next level
    rounded = levels_of(preprocess(between, PROTOCOLS["titok"]))[0, 0, :, 0]
    assert (rounded == np.minimum(LEVELS.astype(int) + 1, 255)).all()


def test_titok_and_fvq_take_the_inception_score_of_logits_without_bias():
    for name in ("titok", "fvq", "adm", "llamagen"):
        assert not PROTOCOLS[name].score.bias, name
    assert (PROTOCOLS["titok"].score.splits, PROTOCOLS["titok"].score.shuffle) == (1, False)


# --------------------------------------------------------------------------------------------- fvq


def test_fvq_shows_the_network_both_sides_as_jpeg_files_of_quality_75():
    array = photos(2)
    shown = preprocess(to_images(array), PROTOCOLS["fvq"])
    for picture, image in zip(array, shown, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG")  # Pillow's default quality, as the released script
        np.testing.assert_array_equal(levels_of(image).transpose(1, 2, 0), np.asarray(Image.open(buffer)))
    assert (levels_of(shown) != array.transpose(0, 3, 1, 2)).mean() > 0.3


def test_fvqs_numbers_are_pyiqas_and_piqs_on_rounded_images():
    array = photos()
    result = evaluate_tokenizer(
        Palette(), image_set(array), "fvq", size=64, metrics=["psnr", "ssim", "lpips"], device="cpu"
    )
    a = to_images(array)
    b = on_unit_scale(Palette().decode(Palette().encode(a)), "round").double()
    a = ((a + 1) / 2).double()
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1)
    y_a, y_b = (((weights * side).sum(1) + 16) / 255 for side in (a, b))
    psnr = (-10 * (y_a - y_b).square().mean((1, 2)).log10()).mean()
    assert result["metrics"]["psnr"] == pytest.approx(float(psnr), abs=1e-4)
    assert result["metrics"]["ssim"] == pytest.approx(float(ssim_of_piq(a, b).mean()), abs=1e-5)
    lpips = LPIPS("alex")((a * 2 - 1).float(), (b * 2 - 1).float()).mean()
    assert result["metrics"].keys() == {"psnr", "ssim", "lpips_alex"}
    assert result["metrics"]["lpips_alex"] == pytest.approx(float(lpips), rel=1e-5)


def ssim_of_piq(a: Tensor, b: Tensor) -> Tensor:
    """piq's formula with data_range=2: both sides are halved, the constants stay; 11 x 11 Gaussian, no borders."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = (-(offsets**2) / (2 * 1.5**2)).exp()
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum()).expand(3, 1, 11, 11)
    mean = lambda x: torch.nn.functional.conv2d(x, kernel, groups=3)  # noqa: E731
    x, y = a / 2, b / 2
    mx, my = mean(x), mean(y)
    cov, vx, vy = mean(x * y) - mx * my, mean(x * x) - mx**2, mean(y * y) - my**2
    value = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2) * (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
    return value.mean((1, 2, 3))


# --------------------------------------------------------------------------------------------- ibq


def test_ibq_divides_bytes_in_float64_as_numpy_does():
    """x / 127.5 - 1 in float64, then float32; truncated to bytes, 95 of the 256 levels fall by one."""
    published = (LEVELS / 127.5 - 1.0).astype(np.float32)
    ours = divided_in_float64(to_images(np.broadcast_to(LEVELS[:, None, None], (256, 1, 3)).copy()))[0, :, 0]
    np.testing.assert_array_equal(ours.numpy(), published)
    truncated = (on_unit_scale(ours, "truncate") * 255).round().numpy()
    assert (truncated != LEVELS).sum() == 95


def test_ibqs_psnr_is_scikit_images_on_the_released_bytes():
    array = photos()
    result = evaluate_tokenizer(Palette(), image_set(array), "ibq", size=64, metrics=["psnr"], device="cpu")
    images = torch.from_numpy((array / 127.5 - 1.0).astype(np.float32)).permute(0, 3, 1, 2)
    decoded = Palette().decode(Palette().encode(images)).clamp(-1, 1)
    sides = [(((side + 1) / 2 * 255.0).to(torch.uint8).float() / 255).double() for side in (images, decoded)]
    expected = (-10 * (sides[0] - sides[1]).square().mean((1, 2, 3)).log10()).mean()
    assert result["metrics"]["psnr"] == pytest.approx(float(expected), abs=1e-4)
    in_float32 = dataclasses.replace(PROTOCOLS["ibq"], division="float32")
    other = evaluate_tokenizer(Palette(), image_set(array), in_float32, size=64, metrics=["psnr"], device="cpu")
    assert other["metrics"]["psnr"] - result["metrics"]["psnr"] > 0.003


class Recorder(Grey):
    """Keeps what it is given to encode."""

    factor = 16

    def encode(self, images: Tensor) -> Tensor:
        self.given = images
        return super().encode(images)


def test_whole_images_are_padded_grey_on_all_sides_under_ibq_and_by_their_edge_under_lexel():
    """The released script pads with zeros, half of it above and left, and crops back."""
    image = to_images(photos(1, 64)[:, :45, :50])
    padded, top, left = pad(Recorder(), image, "grey")
    assert padded.shape == (1, 3, 48, 64)
    assert (top, left) == (1, 7)
    assert torch.equal(padded[..., 1:46, 7:57], image)
    assert padded.count_nonzero() == image.count_nonzero()
    padded, top, left = pad(Recorder(), image, "edge")
    assert (top, left) == (0, 0)
    assert torch.equal(padded[..., 47, :50], image[..., -1, :])
    for name in ("ibq", "lexel"):
        tokenizer = Recorder()
        array = photos(2, 64)[:, :45, :50]
        result = evaluate_tokenizer(
            tokenizer, image_set(array), name, size="native", metrics=["psnr"], batch_size=1, device="cpu"
        )
        first = tokenizer.given[0, :, 0, 0]
        assert bool((first == 0).all()) == (name == "ibq")
        assert math.isfinite(result["metrics"]["psnr"])


# --------------------------------------------------------------------------------------------- files


def test_published_protocols_read_files_as_stored_and_ours_as_a_viewer_shows_them(tmp_path):
    picture = photos(1, 64)[0]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name in ("a.png", "b.png"):
        Image.fromarray(picture).save(tmp_path / name, exif=exif)
    stored, viewer = (image_set(np.stack([side, side])) for side in (picture, picture[::-1, ::-1]))
    options = {"size": 64, "metrics": ["usage"], "device": "cpu"}
    for name in PROTOCOLS:
        result = evaluate_tokenizer(Palette(), tmp_path, name, **options)
        expected = evaluate_tokenizer(Palette(), viewer if name == "lexel" else stored, name, **options)
        assert result["data"]["fingerprint"] == expected["data"]["fingerprint"], name


# --------------------------------------------------------------------------------------------- inception score


@pytest.mark.parametrize("count, splits", [(23, 10), (101, 10), (7, 3), (10, 10), (4, 10)])
def test_splits_are_cut_as_torch_fidelity_cuts(count, splits):
    expected = torch.zeros(count, dtype=torch.int64)
    for split in range(splits):
        expected[split * count // splits : (split + 1) * count // splits] = split
    assert torch.equal(contiguous_splits(count, splits), expected)


def test_a_score_in_the_order_of_files_warns_of_images_sorted_by_class(tmp_path):
    """Known by labels, or seen in the score itself, which the same blocks dealt at random show."""
    quick = dataclasses.replace(
        PROTOCOLS["adm"], network="random", size=32, samples=20, generation=("inception_score",)
    )
    quick = dataclasses.replace(quick, score=dataclasses.replace(quick.score, split_size=25))
    kinds = np.repeat(np.stack([photos(4)[n, :32, :32] for n in range(4)]), 25, axis=0)
    order = np.random.default_rng(0).permutation(100)
    cases = {
        "sorted.npz": {"arr_0": kinds},
        "labelled.npz": {"arr_0": kinds[order], "arr_1": np.repeat(np.arange(4), 25)},
        "shuffled.npz": {"arr_0": kinds[order], "arr_1": np.repeat(np.arange(4), 25)[order]},
    }
    for name, arrays in cases.items():
        np.savez(tmp_path / name, **arrays)
        result = evaluate_samples(tmp_path / name, image_set(photos(20, 32)[:, :32, :32]), quick, device="cpu")
        warned = [warning for warning in result["warnings"] if "sorted by class; shuffle them" in warning]
        assert len(warned) == (name != "shuffled.npz"), name


# --------------------------------------------------------------------------------------------- one's own


def test_every_choice_of_ones_own_protocol_is_checked():
    for change, message in (
        ({"division": "float16"}, "unknown division 'float16'; choose from float32, float64"),
        ({"file": "webp"}, "unknown file 'webp'"),
        ({"reading": "raw"}, "unknown reading 'raw'"),
        ({"padding": "mirror"}, "unknown padding 'mirror'"),
        ({"lpips_rounding": "floor"}, "unknown rounding 'floor'"),
        ({"ssim": SSIMRule(window="flat")}, "unknown SSIM window 'flat'"),
    ):
        with pytest.raises(UsageError, match=message):
            protocol(dataclasses.replace(PROTOCOLS["lexel"], **change))
    for change, message in (
        ({"transform": "squash"}, "unknown transform 'squash'"),
        ({"network": "resnet"}, "unknown feature network 'resnet'"),
        ({"network": "random", "resize": "nearest"}, "unknown resize rule 'nearest'"),
        ({"lpips": ("squeeze",)}, "unknown LPIPS network 'squeeze'"),
        ({"reconstruction": ("rfid",)}, "unknown metric 'rfid'"),
        ({"generation": ("rfid",)}, "unknown metric 'rfid'"),  # though generated images are not what is measured
    ):
        with pytest.raises(UsageError, match=message):  # before images are looked for
            evaluate_tokenizer(Grey(), "nowhere", dataclasses.replace(PROTOCOLS["lexel"], size=32, **change))
