"""The contract of metrics: new ones by one class, one impossible metric ends nothing, every file read is checked."""

import dataclasses
import json
import math
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from test_evaluate import QUICK, Stopped, image_set, pictures, stop_after
from torch import Tensor, nn
from toys import Grey

from lexel import networks
from lexel.data import to_images
from lexel.errors import UsageError
from lexel.evaluate import (
    METRICS,
    Metric,
    Options,
    Values,
    evaluate_samples,
    evaluate_tokenizer,
    read_result,
    write_result,
)
from lexel.evaluate.measure import check_alike
from lexel.metrics import MeanState, frechet_distance_of_features, gaussian_mmd
from lexel.networks import FEATURE_NETWORKS, FeatureNetwork
from lexel.train.evaluations import EvaluationConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Brightness(Metric):
    """Mean of the images' pixels."""

    def __init__(self, context) -> None:
        super().__init__(context)
        self.states = {"mean": MeanState()}

    def update(self, batch) -> None:
        self.states["mean"].add(batch.images.mean((1, 2, 3)))

    def compute(self) -> Values:
        return Values({"brightness": self.states["mean"].mean})


class Plain(FeatureNetwork):
    """A network without class scores and without a map: the mean of 4 x 4 patches."""

    name = "plain"
    side = 16
    dims = 4

    @classmethod
    def load(cls, weights=None) -> dict[str, Tensor]:
        return {"weight": torch.randn(4, 48, generator=torch.Generator().manual_seed(0))}

    @classmethod
    def _network(cls) -> nn.Module:
        return Patches()

    def _normalise(self, images: Tensor) -> Tensor:
        return images


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 48))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight.T, None


@pytest.fixture
def plain(monkeypatch) -> type[FeatureNetwork]:
    monkeypatch.setitem(FEATURE_NETWORKS, "plain", Plain)
    return Plain


# ---------------------------------------------------------------------------------------------- new ones


def test_a_metric_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", Brightness)
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["brightness", "psnr"], batch_size=4)
    originals = to_images(pictures())
    expected = float(Grey().decode(Grey().encode(originals)).mean())
    assert result["metrics"].keys() == {"brightness", "psnr"}
    assert result["metrics"]["brightness"] == pytest.approx(expected, abs=1e-6)


def test_a_metric_of_another_package_is_found_by_its_entry_point(monkeypatch):
    point = EntryPoint("brightness", f"{__name__}:Brightness", "lexel.metrics")
    monkeypatch.setattr("lexel.registry.entry_points", lambda group: [point] if group == "lexel.metrics" else [])
    assert "brightness" in evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["brightness"])["metrics"]
    with pytest.raises(UsageError, match=r"unknown metric 'fid'; choose from brightness, .*frechet"):
        evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["fid"])


def test_a_metric_may_be_defined_over_a_network_of_its_own(plain, monkeypatch):
    class PlainFrechet(METRICS["frechet"]):
        network = "plain"

    monkeypatch.setitem(METRICS, "frechet_plain", PlainFrechet)
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["frechet", "frechet_plain"], batch_size=5)
    originals = to_images(pictures())
    rounded = ((Grey().decode(Grey().encode(originals)) + 1) / 2 * 255).round() / 255 * 2 - 1
    network = networks.build("plain")
    expected = frechet_distance_of_features(network(originals).pooled, network(rounded).pooled)
    assert result["metrics"].keys() == {"fd_random", "fd_plain"}
    assert result["metrics"]["fd_plain"] == pytest.approx(expected, rel=1e-5)
    assert result["network"]["name"] == "random"
    made = evaluate_samples(image_set(21, seed=5), image_set(), QUICK, metrics=["frechet", "frechet_plain", "mmd"])
    assert made["metrics"].keys() == {"fd_random", "fd_plain", "mmd_random"}


def test_a_network_without_class_scores_gives_what_needs_none(plain):
    quick = dataclasses.replace(QUICK, network="plain")
    result = evaluate_samples(image_set(21, seed=5), image_set(), quick)
    assert result["metrics"].keys() == {"fd_plain", "precision_plain", "recall_plain", "kid_plain"}
    left_out = [warning for warning in result["warnings"] if "is left out" in warning]
    assert left_out == [
        "spatial_frechet is left out: plain has no spatial map",
        "inception_score is left out: plain has no class scores",
    ]


def test_a_gaussian_kernel_distance_is_cmmds_formula():
    a, b = torch.randn(9, 5), torch.randn(7, 5) + 1
    x, y = (side.double() / side.double().norm(dim=1, keepdim=True) for side in (a, b))

    def kernel(left: Tensor, right: Tensor) -> float:
        return float(np.mean([[math.exp(-float((p - q).square().sum()) / 200) for q in right] for p in left]))

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert gaussian_mmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert gaussian_mmd(a, b, block=2) == pytest.approx(expected, rel=1e-9)
    assert gaussian_mmd(a, a) == pytest.approx(0, abs=1e-9)


def test_a_recipes_evaluation_is_that_of_the_library(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pictures(4))
    for number, picture in enumerate(pictures(4)):
        networks_folder = tmp_path / "images"
        networks_folder.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(picture).save(networks_folder / f"{number}.png")
    config = EvaluationConfig(data=str(tmp_path / "images"), every=5, metrics=["psnr"], size=32, limit=3)
    config.check()
    state = torch.random.get_rng_state()
    result = config.run(Grey(), Options(device="cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = evaluate_tokenizer(Grey(), tmp_path / "images", size=32, metrics=["psnr"], limit=3, device="cpu")
    assert result["metrics"] == expected["metrics"]
    with pytest.raises(UsageError, match="unknown metric 'fid'"):
        EvaluationConfig(data="photos", every=1, metrics=["fid"]).check()


def test_a_tokenizer_is_measured_at_the_size_it_was_trained_at():
    class Trained(Grey):
        provenance = {"size": 16}

    assert evaluate_tokenizer(Trained(), image_set(), QUICK, metrics=["psnr"])["protocol"]["size"] == 16
    assert evaluate_tokenizer(Trained(), image_set(), QUICK, size=32, metrics=["psnr"])["protocol"]["size"] == 32


# ---------------------------------------------------------------------------------------------- what cannot be


def test_images_too_small_for_one_metric_leave_the_others():
    with_both = dataclasses.replace(QUICK, size=16, lpips=("vgg", "alex"))
    result = evaluate_tokenizer(Grey(), image_set(), with_both, metrics=["psnr", "ssim", "lpips"])
    assert result["metrics"].keys() == {"psnr", "ssim", "lpips_vgg"}
    assert any(
        "lpips_alex is left out: alex needs images of at least 31 pixels a side" in w for w in result["warnings"]
    )
    tiny = dataclasses.replace(QUICK, size=8, lpips=("vgg",))
    result = evaluate_tokenizer(Grey(), image_set(), tiny, metrics=["psnr", "ssim", "lpips"])
    assert result["metrics"].keys() == {"psnr"}
    with pytest.raises(UsageError, match=r"nothing can be measured: ssim: its window needs .* lpips: vgg needs"):
        evaluate_tokenizer(Grey(), image_set(), tiny, metrics=["ssim", "lpips"])


def test_one_whole_image_that_is_too_small_leaves_the_other_metrics(tmp_path):
    from PIL import Image

    for name, side in (("a.png", 32), ("b.png", 8), ("c.png", 32)):
        Image.fromarray(pictures(1, side)[0]).save(tmp_path / name)
    with_alex = dataclasses.replace(QUICK, lpips=("alex",))
    result = evaluate_tokenizer(Grey(), tmp_path, with_alex, size="native", metrics=["psnr", "ssim", "lpips"])
    assert result["metrics"].keys() == {"psnr"}
    assert sorted(w.split(":")[0] for w in result["warnings"] if "left out" in w) == [
        "lpips_alex is left out",
        "ssim is left out",
    ]


def test_missing_weights_of_one_metric_leave_the_others(monkeypatch):
    def missing(name, *rest):
        raise UsageError(f"weights of {name} not found")

    monkeypatch.setattr("lexel.evaluate.metrics.lpips.LPIPS", missing)
    of_inception = dataclasses.replace(QUICK, network="inception", lpips=("vgg",))
    monkeypatch.setattr("lexel.evaluate.features.networks.build", missing)
    result = evaluate_tokenizer(Grey(), image_set(), of_inception)
    assert result["metrics"].keys() == {"psnr", "ssim", "usage", "perplexity"}
    assert sum("not found" in warning for warning in result["warnings"]) == 3  # frechet, inception_score, lpips
    with pytest.raises(UsageError, match="not found"):  # who asks for a network gets it or an error
        evaluate_tokenizer(Grey(), image_set(), of_inception, network="efficientnet_lite0")


def test_a_metric_that_fails_at_the_end_leaves_the_others():
    result = evaluate_samples(image_set(3, seed=5), image_set(), QUICK, metrics=["frechet", "precision_recall"])
    assert result["metrics"].keys() == {"fd_random"}
    assert any("precision_recall is left out: precision and recall need more than" in w for w in result["warnings"])


# ---------------------------------------------------------------------------------------------- the cache


def test_a_cache_that_cannot_be_written_costs_no_result(cache, monkeypatch):
    cache.write_text("a file where a folder should be")
    expected = evaluate_tokenizer(Grey(), image_set(), QUICK, cache=False)
    result = evaluate_tokenizer(Grey(), image_set(), QUICK)
    assert result["metrics"] == expected["metrics"]
    assert any("cannot be written" in warning for warning in result["warnings"])
    made = evaluate_samples(image_set(21, seed=5), image_set(), QUICK)
    assert any("cannot be written" in warning for warning in made["warnings"])
    assert "fd_random" in made["metrics"]


def test_a_cache_that_may_not_be_entered_costs_no_result(cache, monkeypatch):
    """Python asks the system whether a file is there, and PermissionError is no answer."""
    ask, write = Path.is_file, Path.mkdir

    def refuse(call):
        def refused(path, *given, **options):
            if path.is_relative_to(cache):
                raise PermissionError(13, "Permission denied")
            return call(path, *given, **options)

        return refused

    monkeypatch.setattr(Path, "is_file", refuse(ask))
    monkeypatch.setattr(Path, "mkdir", refuse(write))
    result = evaluate_tokenizer(
        Grey(), image_set(3), dataclasses.replace(QUICK, network="inception"), metrics=["frechet"]
    )
    assert "fd_efficientnet_lite0" in result["metrics"]
    assert any("cannot be written (Permission denied)" in warning for warning in result["warnings"])


def test_a_damaged_cache_is_computed_again(cache):
    first = evaluate_tokenizer(Grey(), image_set(), QUICK)
    made = evaluate_samples(image_set(21, seed=5), image_set(), QUICK)
    for file in (cache / "statistics").iterdir():
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    for again, before in (
        (evaluate_tokenizer(Grey(), image_set(), QUICK), first),
        (evaluate_samples(image_set(21, seed=5), image_set(), QUICK), made),
    ):
        assert again["metrics"] == before["metrics"]
        assert any("computed again" in warning for warning in again["warnings"])
    assert not any("computed again" in w for w in evaluate_tokenizer(Grey(), image_set(), QUICK)["warnings"])


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture
def partial(tmp_path) -> Path:
    """The partial state of an evaluation that was stopped."""
    windowed = dataclasses.replace(QUICK, usage=dataclasses.replace(QUICK.usage, window=300))
    with pytest.raises(Stopped):
        evaluate_tokenizer(Grey(), image_set(), windowed, progress=stop_after(8), **going_on(tmp_path))
    return tmp_path / "state" / "part-0.pt"


def going_on(folder: Path) -> dict:
    return {"batch_size": 4, "resume": folder / "state", "save_every": 0.0, "cache": False, "device": "cpu"}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["seen"].update(done=torch.zeros(3, dtype=torch.bool)),
        lambda state: state["seen"].update(digest="-1"),
        lambda state: state["seen"].update(digest=7),
        lambda state: state["seen"].update(unreadable=[]),
        lambda state: state.update(seen=None),
        lambda state: state["states"]["psnr"].update(states={}),
        lambda state: state["states"]["psnr"].update(left_out=3),
        lambda state: state["states"]["psnr"]["states"]["psnr"].update(sum=torch.zeros(3)),
        lambda state: state["states"]["frechet"]["states"]["fake"].update(n=torch.zeros(2)),
        lambda state: state["states"]["usage"]["states"]["window"].pop("tokens"),
        lambda state: state["states"].update(ssim=None),
    ],
)
def test_a_partial_state_that_cannot_be_is_refused(tmp_path, partial, change):
    state = torch.load(partial, weights_only=True)
    change(state)
    torch.save(state, partial)
    windowed = dataclasses.replace(QUICK, usage=dataclasses.replace(QUICK.usage, window=300))
    with pytest.raises(UsageError, match=r"part-0\.pt is damaged|partial state of another"):
        evaluate_tokenizer(Grey(), image_set(), windowed, **going_on(tmp_path))


@counts
def test_a_damaged_partial_state_is_gone_on_from_or_refused_in_one_line(tmp_path, partial, count):
    windowed = dataclasses.replace(QUICK, usage=dataclasses.replace(QUICK.usage, window=300))

    def go_on(path: Path) -> None:
        with pytest.raises(Stopped):
            evaluate_tokenizer(Grey(), image_set(), windowed, progress=stop_after(1), **going_on(tmp_path))

    survives(go_on, partial, 6, count)


@pytest.fixture(scope="module")
def result() -> dict:
    return evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["psnr", "frechet"], cache=False)


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda r: r.update(metrics=[]), "metrics"),
        (lambda r: r["metrics"].update(psnr="high"), "metrics.psnr"),
        (lambda r: r.update(kind="other"), "kind"),
        (lambda r: r.update(protocol="lexel"), "protocol"),
        (lambda r: r["data"].update(images="23"), "data.images"),
        (lambda r: r["data"].pop("fingerprint"), "data.fingerprint"),
        (lambda r: r["network"].pop("name"), "network.name"),
        (lambda r: r["intervals"].update(psnr=3), "intervals.psnr"),
        (lambda r: r.update(warnings="none"), "warnings"),
    ],
)
def test_a_result_file_is_checked_field_by_field(tmp_path, result, change, field):
    changed = json.loads(json.dumps(result))
    change(changed)
    (tmp_path / "a.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=rf"is no result of `lexel evaluate`: {field}"):
        read_result(tmp_path / "a.json")


@counts
def test_a_damaged_result_is_read_or_refused_and_compared_without_a_traceback(tmp_path, result, count):
    from lexel.evaluate import compare_results

    write_result(tmp_path / "a.json", result)
    whole = read_result(tmp_path / "a.json")
    survives(lambda path: compare_results(read_result(path), whole), tmp_path / "a.json", 5, count)


def test_what_an_earlier_version_wrote_is_still_compared(result):
    from lexel.evaluate import compare_results

    old = json.loads(json.dumps(result))
    for name in ("reading", "division", "padding", "file", "lpips_rounding"):
        del old["protocol"][name]
    old.pop("weights")
    assert compare_results(old, result)["psnr"].difference == 0
    as_stored = json.loads(json.dumps(result))
    as_stored["protocol"]["reading"] = "stored"
    with pytest.raises(UsageError, match="reading is viewer in one and stored in the other"):
        compare_results(old, as_stored)


# ---------------------------------------------------------------------------------------------- precision


def test_a_session_that_set_the_new_precision_switches_can_evaluate(monkeypatch):
    """Reading the legacy TF32 switches raises where the new ones disagree."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        evaluate_tokenizer(Grey(), image_set(4), QUICK, metrics=["psnr", "frechet"], device="cpu")
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def test_processes_that_would_measure_different_things_are_refused_in_all(monkeypatch):
    check_alike({"psnr": ["psnr"]}, {})
    elsewhere = ({"psnr": ["psnr"]}, {"lpips": "weights of lpips_vgg not found"})
    monkeypatch.setattr(sys.modules[check_alike.__module__], "gather", lambda value: [value, elsewhere])
    check_alike({"psnr": ["psnr"]}, {})
    with pytest.raises(UsageError, match=r"processes 0 and 1 cannot measure the same .*lpips_vgg not found"):
        check_alike({"psnr": ["psnr"], "lpips": ["lpips_vgg"]}, {})
