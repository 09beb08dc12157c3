"""DISTS against the published implementation's numbers, and as a metric."""

from importlib.util import find_spec

import pytest
import skimage  # which imports its parts when they are used
import torch
from test_evaluate import QUICK, image_set
from toys import Grey

from lexel.data import to_images
from lexel.errors import UsageError
from lexel.evaluate import evaluate_tokenizer

needs_weights = pytest.mark.skipif(
    find_spec("DISTS_pytorch") is None, reason="pip install --no-deps DISTS-pytorch==0.1"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))


def images() -> torch.Tensor:
    return to_images(skimage.data.astronaut()[:128, 100:228][None].copy())


@needs_weights
def test_the_published_numbers_come_out():
    """The values are of the package's own code (0.1) with torchvision's VGG16, in [0, 1]."""
    from lexel.networks.dists import DISTS

    metric, a = DISTS(), images()
    assert metric(a, a).item() == pytest.approx(0, abs=1e-5)
    values = [metric(a, b).item() for b in (a.flip(3), Grey().decode(Grey().encode(a)), (a * 0.5))]
    assert values == pytest.approx([0.224308, 0.393240, 0.149861], abs=2e-5)


@needs_weights
def test_the_metric_is_the_mean_over_images_and_names_its_weights():
    result = evaluate_tokenizer(Grey(), image_set(3), QUICK, metrics=["dists"], batch_size=2, device="cpu")
    assert 0 < result["metrics"]["dists"] < 1
    assert len(result["weights"]["dists"]["dists"]) == 64


def test_without_its_weights_it_is_left_out_and_the_others_stay(monkeypatch):
    def missing(name, *rest):
        raise UsageError(f"weights of {name} not found")

    monkeypatch.setattr("lexel.networks.dists.pretrained.load", missing)
    result = evaluate_tokenizer(Grey(), image_set(3), QUICK, metrics=["dists", "psnr"], device="cpu")
    assert result["metrics"].keys() == {"psnr"}
    assert "dists is left out: weights of lpips_vgg not found" in result["warnings"]
