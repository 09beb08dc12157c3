"""PSNR and SSIM against scikit-image, and how far published conventions lie apart on the same pictures."""

import math

import numpy as np
import pytest
import skimage  # which imports its parts when they are used
import torch
from torch import Tensor
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.metrics import psnr, psnr_of, squared_error, ssim
from lexel.metrics.pixels import on_unit_scale


def crops(size: int = 64) -> Tensor:
    """Crops of photographs, as images in [-1, 1]."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    places = [(0, 0), (100, 150), (200, 300)]
    arrays = [picture[top : top + size, left : left + size] for picture in pictures for top, left in places]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 127.5 - 1


def reconstructions(images: Tensor) -> Tensor:
    """What a tokenizer of low quality might make of images: blurred, a little noisy, and beyond [-1, 1] in places."""
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    return blurred + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def on_unit_arrays(images: Tensor, rounding: str = "float") -> list[np.ndarray]:
    return list(on_unit_scale(images.double(), rounding).movedim(1, -1).numpy())


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    images = crops()
    return images, reconstructions(images)


@pytest.mark.parametrize("rounding", ["float", "truncate", "round"])
def test_psnr_is_scikit_images(pair, rounding):
    images, made = pair[0].double(), pair[1].double()
    expected = [
        skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
        for a, b in zip(on_unit_arrays(images, rounding), on_unit_arrays(made, rounding), strict=True)
    ]
    np.testing.assert_allclose(psnr(images, made, rounding), expected, atol=1e-6)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_ssim_is_scikit_images(pair, window, data_range):
    options = (
        {"win_size": 7}
        if window == "uniform"
        else {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    )
    images, made = pair[0].double(), pair[1].double()
    expected = [
        skimage.metrics.structural_similarity(a, b, data_range=data_range, channel_axis=-1, **options)
        for a, b in zip(on_unit_arrays(images), on_unit_arrays(made), strict=True)
    ]
    np.testing.assert_allclose(ssim(images, made, window=window, data_range=data_range), expected, atol=1e-6)


def test_gaussian_ssim_is_torchmetrics_without_its_mirrored_borders(pair):
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (on_unit_scale(side.double()) for side in pair)
    mean, full = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    own = ssim(pair[0].double(), pair[1].double(), window="gaussian")
    torch.testing.assert_close(own, full[..., 5:-5, 5:-5].flatten(1).mean(1), atol=1e-6, rtol=0)
    assert abs(mean.mean() - own.mean()) > 0.005  # a trap of its own on small pictures


def test_luma_is_the_y_of_studio_range():
    white, black = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)
    contrast = (235 - 16) / 255  # of the Y channel between white and black
    assert squared_error(white, black, channels="luma").item() == pytest.approx(contrast**2, abs=1e-12)


def test_a_known_shift_has_a_known_psnr():
    images = torch.zeros(2, 3, 8, 8)
    shifted = images + 0.2  # 0.1 on the scale [0, 1]: 20 dB
    torch.testing.assert_close(psnr(images, shifted), torch.full((2,), 20.0).double(), atol=1e-5, rtol=0)


def test_equal_images_have_infinite_psnr_and_ssim_one(pair):
    images, _ = pair
    assert psnr(images, images).isinf().all()
    torch.testing.assert_close(ssim(images, images), torch.ones(len(images)).double())


def test_values_beyond_the_range_are_clamped(pair):
    images, made = pair
    assert (made.abs() > 1).any()
    torch.testing.assert_close(psnr(images, made), psnr(images, made.clamp(-1, 1)))


def test_metrics_of_an_image_do_not_depend_on_its_batch(pair):
    images, made = pair
    for metric in (psnr, ssim):
        alone = torch.cat([metric(images[i : i + 1], made[i : i + 1]) for i in range(len(images))])
        torch.testing.assert_close(metric(images, made), alone, atol=1e-12, rtol=0)


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), window="gaussian")


@pytest.mark.parametrize("option", [{"rounding": "floor"}, {"channels": "y"}])
def test_an_unknown_convention_is_refused_with_the_choices(pair, option):
    with pytest.raises(UsageError, match="choose from"):
        psnr(*pair, **option)


# ------------------------------------------------- the same pictures under the conventions of different papers


def test_trap_ssim_with_range_2_is_far_above_range_1(pair):
    honest, inflated = (ssim(*pair, window="uniform", data_range=value).mean() for value in (1.0, 2.0))
    assert inflated - honest == pytest.approx(0.172, abs=0.001)


def test_trap_ssim_of_luma_is_above_ssim_of_rgb(pair):
    rgb, luma = (ssim(*pair, window="gaussian", channels=channels).mean() for channels in ("rgb", "luma"))
    assert luma - rgb == pytest.approx(0.144, abs=0.001)


def test_trap_the_ssim_window_matters_less_than_the_range(pair):
    uniform, gaussian = (ssim(*pair, window=window).mean() for window in ("uniform", "gaussian"))
    assert uniform - gaussian == pytest.approx(0.015, abs=0.001)


def test_trap_the_pooled_psnr_is_below_the_mean_of_psnrs(pair):
    errors = squared_error(*pair)
    gap = psnr_of(errors).mean() - psnr_of(errors.mean())
    assert gap == pytest.approx(1.19, abs=0.01)  # dB


def test_trap_truncation_darkens_by_half_a_level_and_costs_little_psnr(pair):
    images, made = pair
    truncated, rounded = on_unit_scale(made, "truncate"), on_unit_scale(made, "round")
    inside = (made > -0.98) & (made < 0.98)
    assert ((rounded - truncated)[inside].mean() * 255).item() == pytest.approx(0.5, abs=0.02)
    cost = psnr(images, made, "float").mean() - psnr(images, made, "truncate").mean()
    assert cost == pytest.approx(0.065, abs=0.001)  # dB
    assert psnr(images, made, "float").mean() - psnr(images, made, "round").mean() < 0.01


def test_trap_truncation_in_float32_changes_originals_that_were_8_bit_already():
    levels = torch.arange(256).float()
    originals = (levels / 127.5 - 1).view(1, 1, 16, 16)
    returned = (on_unit_scale(originals, "truncate") * 255).round().flatten()
    fallen = int((returned != levels).sum())
    assert torch.equal((on_unit_scale(originals, "round") * 255).round().flatten(), levels)
    assert fallen == 63
    assert math.isclose((levels - returned).max().item(), 1)
