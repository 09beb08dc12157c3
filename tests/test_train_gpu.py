"""Training steps on a GPU: what they may wait for."""

import warnings

import pytest
import torch

from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.processes import Processes
from lexel.train.tokenizer import Learner


@pytest.mark.gpu
def test_a_training_step_waits_for_the_device_once_and_only_in_the_search():
    changes = [
        "model.quantizer.codebook_size=65536",
        "model.quantizer.codebook_dim=32",
        "train.precision=bf16",
        "train.weights.adversarial=0.1",
    ]
    changes += ["train.discriminator.layers=1", "train.discriminator.lecam=0.05", "train.clip=1.0"]
    changes += ["model.quantizer.entropy_temperature=1e-4"]  # no row has more codes in play than a list holds
    recipe = load_recipe("tiny", changes)
    learner = Learner(recipe, Tokenizer(recipe.model), Processes("cuda", "bf16"))
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    learner.step(images, True, 1.0)  # compiles kernels, makes the optimizers' states
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            learner.step(images, True, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{entry.filename}:{entry.lineno}" for entry in seen if "called a synchronizing" in str(entry.message)]
    assert len(waits) == 1, waits
    assert "triton_search.py" in waits[0]
