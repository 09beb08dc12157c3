"""Grey pictures from the file to the reconstruction: nothing between takes three channels for granted."""

import numpy as np
import pytest
from PIL import Image

from lexel.codec import Codec
from lexel.data import to_display
from lexel.errors import UsageError
from lexel.loading import load_tokenizer
from lexel.runtime import runtime
from lexel.train import load_recipe, train

pytestmark = pytest.mark.usefixtures("undrawn_charts")


def test_a_tokenizer_of_grey_pictures_is_trained_and_used_by_the_same_commands(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (12, 20, 20), np.uint8)
    np.savez(tmp_path / "grey.npz", images=array, labels=np.arange(12) % 2)
    source = f"npz:{tmp_path / 'grey.npz'}"
    grey = ["data.channels=1", "model.autoencoder.channels=1", "data.size=16", "train.steps=2"]
    train(load_recipe("tiny", [f"data.source={source}", *grey]), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "report.html").is_file()
    recipe = load_recipe("tiny", grey)
    codec = Codec(load_tokenizer(tmp_path / "run"), runtime("cpu"), recipe.data.make_transform())
    assert codec.reconstruct([source], tmp_path / "out").written == 12
    assert Image.open(tmp_path / "out" / "03.png").size == (16, 16)
    tokens = codec.encode(source, tmp_path / "tokens")
    assert (len(tokens), tokens.labels.tolist()) == (12, [0, 1] * 6)


def test_channels_that_differ_between_data_and_network_are_refused():
    with pytest.raises(UsageError, match=r"data.channels = 1 and model.autoencoder.channels = 3 must be equal"):
        load_recipe("tiny", ["data.channels=1"])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pixels_of_any_channels_can_be_shown(channels):
    pixels = np.full((2, 4, 5, channels), 200, np.uint8)
    assert to_display(pixels).shape == (2, 4, 5, 3)
