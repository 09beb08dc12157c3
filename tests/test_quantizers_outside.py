"""A quantizer of another package is known by its name everywhere; and the newer ones train in a tokenizer."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import lexel
from lexel.compare.plan import expand
from lexel.config import check
from lexel.errors import UsageError
from lexel.quantizers import build, names, outline
from lexel.tables import entries
from lexel.tokenizer import Tokenizer
from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer

MODULE = '''
"""A quantizer from outside."""

import torch
from lexel.quantizers.base import GRADIENTS, Quantized, Quantizer, full_precision, vq_terms


class Mine(Quantizer):
    """A table of which every code has a factor."""

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}
    gradient = "straight_through"
    straight_through = True

    def __init__(self, codebook_size: int, codebook_dim: int, factor: float = 1.0) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.factor = factor
        self.weight = torch.nn.Parameter(torch.randn(codebook_size, codebook_dim))

    @property
    def codebook(self):
        return self.factor * self.weight

    @full_precision
    def forward(self, z):
        indices = self.assign(z)
        z_q = self.indices_to_codes(indices)
        return Quantized(GRADIENTS[self.gradient](z, z_q), indices, vq_terms(z, z_q))
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with the entry point `lexel.quantizers: mine`, as pip would install it."""
    site = tmp_path / "site"
    info = site / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "outside.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lexel.quantizers]\nmine = outside:Mine\nbroken = outside:Nothing\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("outside", None)


def recipe(folder, quantizer) -> TokenizerRecipe:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    network = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    tables = {
        "model": {"quantizer": quantizer, "autoencoder": {**network, "middle_attention": False, "groups": 2}},
        "data": {"source": str(folder), "size": 16, "validation": 0.3},
        "train": {
            "steps": 3,
            "lr": 1e-3,
            "batch_size": 2,
            "weights": {"l1": 1.0},
            "validate_every": 2,
            "save_every": 2,
        },
    }
    return check(tables, TokenizerRecipe, "test")


def test_a_quantizer_of_another_package_is_built_listed_and_compared_by_its_name(installed, tmp_path):
    assert "mine" in names()
    assert ("mine", "A table of which every code has a factor.") in entries("quantizers")
    assert build("mine", {"codebook_size": 16, "codebook_dim": 4, "factor": 2.0}).factor == 2.0
    assert outline({"kind": "mine", "codebook_size": 16, "codebook_dim": 4}).weight.is_meta
    with pytest.raises(UsageError, match="quantizer 'mine' has no option 'scale'; its options are codebook_size"):
        build("mine", {"codebook_size": 16, "codebook_dim": 4, "scale": 2.0})
    with pytest.raises(UsageError, match="quantizer 'broken': outside:Nothing cannot be loaded"):
        build("broken", {})
    with pytest.raises(UsageError, match=r"unknown quantizer 'nobody'; choose from .*mine"):
        build("nobody", {})
    base = recipe(tmp_path / "pictures", {"kind": "vq", "codebook_size": 16, "codebook_dim": 4})
    assert [run.recipe.model.quantizer["kind"] for run in expand(base, ["vq", "mine"])] == ["vq", "mine"]
    inside = build("residual", {"codebook_size": 16, "codebook_dim": 4, "base": "mine"})
    assert inside(torch.randn(2, 4, 3)).indices.shape == (2, 4, 3)


@pytest.mark.parametrize("kind", ["mine", "multiscale", "nested"])
def test_it_trains_a_tokenizer_that_encodes_and_decodes(installed, tmp_path, kind):
    options = {"scales": [1, 2, 4, 8]} if kind == "multiscale" else {}
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4, **options}
    train_tokenizer(recipe(tmp_path / "pictures", quantizer), tmp_path / "run", device="cpu")
    tokenizer = lexel.load(tmp_path / "run")
    assert isinstance(tokenizer, Tokenizer)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    indices = tokenizer.encode(images)
    spec = tokenizer.token_spec(16, 16)
    assert tuple(indices.shape[1:]) == spec.shape
    if kind == "multiscale":
        assert spec.grids == ((1, 1), (2, 2), (4, 4), (8, 8))
    fresh = lexel.load(tmp_path / "run")  # one that has not seen a grid
    torch.testing.assert_close(fresh.decode(indices), tokenizer(images).images.clamp(-1, 1), rtol=0, atol=1e-6)
    if kind == "nested":
        assert fresh.decode(indices[:, :2]).shape == images.shape
