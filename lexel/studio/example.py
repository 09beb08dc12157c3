"""The tokenizer a studio makes for itself where it is given none: small, of made-up drawings, in seconds."""

from pathlib import Path

import numpy as np

from lexel.checkpoint import atomic
from lexel.config import check
from lexel.loading import find_run
from lexel.runtime import cache_folder, one_thread
from lexel.studio.pictures import drawings
from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer

SIZE = 32  # pixels a side
PICTURES = 512
STEPS = 120


def example_run(folder: Path | None = None, steps: int = STEPS) -> Path:
    """A run folder with a tokenizer of 256 codes at 32 x 32 pixels; made once, kept in the cache.

    Args:
        folder: where it lies; in Lexel's cache by default.
        steps: of its training.
    """
    folder = folder or cache_folder() / "studio" / "example"
    run = find_run(folder)
    if run is not None and run.steps()[-1] >= steps:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "drawings.npz"
    if not data.is_file():
        with atomic(data) as partial, partial.open("wb") as file:
            np.savez_compressed(file, arr_0=drawings(PICTURES, SIZE))
    with one_thread():  # the networks are too small for more
        train_tokenizer(check(recipe(data, steps), TokenizerRecipe, "the studio's example"), folder, device="cpu")
    return folder


def recipe(data: Path, steps: int) -> dict[str, object]:
    """The recipe of the example."""
    network = {"width": 32, "multipliers": [1], "patch": 4, "residual_blocks": 1, "attention_levels": []}
    network |= {"middle_attention": False, "z_channels": 32, "groups": 8}
    every = max(1, steps // 4)
    return {
        "model": {
            "quantizer": {"kind": "ibq", "codebook_size": 256, "codebook_dim": 16},
            "autoencoder": network,
        },
        "data": {"source": f"npz:{data}", "size": SIZE},
        "train": {
            "steps": steps,
            "batch_size": 8,
            "lr": 4e-3,
            "weights": {"l2": 15.0},
            "average_decay": 0.95,
            "average_warm_up": True,
            "log_every": 5,
            "validate_every": every,
            "save_every": steps,
            "validation_images": 32,
            "schedule": {"kind": "cosine", "warm_up": 10, "end": 0.05},
        },
    }
