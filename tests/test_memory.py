"""What images of a size need in memory, told before it is allocated."""

import contextlib

import pytest
import torch

from lexel import memory
from lexel.autoencoders import VQGANConfig
from lexel.codec import Codec
from lexel.data import TRANSFORMS
from lexel.errors import UsageError
from lexel.memory import check_memory, needed_bytes
from lexel.runtime import runtime, without_weights
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train import load_recipe
from lexel.train import plan as planning
from lexel.train.plan import plan
from lexel.train.recipes import TokenizerRecipe


def tokenizer(attention: bool = False) -> Tokenizer:
    network = VQGANConfig(
        width=8,
        multipliers=[1, 1],
        residual_blocks=1,
        attention_levels=[1] if attention else [],
        middle_attention=attention,
        z_channels=4,
        groups=4,
    )
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    return Tokenizer(TokenizerConfig(autoencoder=network, quantizer=quantizer)).eval()


@pytest.mark.parametrize("attention", [False, True])
def test_memory_grows_with_the_pixels_and_not_with_their_square(attention):
    one = needed_bytes(tokenizer(attention), 64, 64, 1)
    assert needed_bytes(tokenizer(attention), 128, 64, 1) == pytest.approx(2 * one, rel=0.01)
    assert needed_bytes(tokenizer(attention), 64, 64, 2) == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "vqvae2_openmoji", "vit_openmoji", "folder_64", "generator_tiny"])
def test_estimates_follow_from_the_shapes_that_pytorch_gives(name, monkeypatch):
    def estimates():
        found = plan(recipe).memory
        if isinstance(recipe, TokenizerRecipe):
            with without_weights():
                found["working"] = needed_bytes(Tokenizer(recipe.model), 64, 64, 2)
        return found

    recipe = load_recipe(name)
    ours = estimates()
    for module in (memory, planning):
        monkeypatch.setattr(module, "Shapes", contextlib.nullcontext)
    assert ours == estimates()


def test_an_estimate_is_between_one_feature_map_and_all_of_them():
    feature_map = 8 * 64 * 64 * 4  # channels, pixels, bytes
    assert 2 * feature_map <= needed_bytes(tokenizer(), 64, 64, 1) <= 8 * feature_map


def test_what_cannot_fit_is_refused_before_anything_is_allocated(tmp_path):
    with pytest.raises(UsageError, match=r"32 images of 1,000,000 x 1,000,000 pixels at a time need at least .* GiB"):
        Codec(tokenizer(), runtime("cpu"), TRANSFORMS["published"](1_000_000), batch_size=32)


def test_what_fits_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "UNQUESTIONED", 0)
    needed = needed_bytes(tokenizer(), 64, 64, 1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    check_memory(tokenizer(), runtime("cpu"), 64, 64, 1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(UsageError, match="lower the size or the batch size"):
        check_memory(tokenizer(), runtime("cpu"), 64, 64, 1)


def test_the_memory_of_this_machine_is_known_where_the_system_tells():
    there = memory.available_bytes(torch.device("cpu"))
    assert there is None or there > 0
