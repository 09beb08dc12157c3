"""Shared by all tests: one thread per process (tiny tensors), and where the published fixtures lie."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from random_network import Random, RandomBackbone

from lexel.networks import FEATURE_NETWORKS
from lexel.networks.backbones import BACKBONES

torch.set_num_threads(1)

BACKBONES["random"] = RandomBackbone
FEATURE_NETWORKS["random"] = Random  # costs nothing and needs no file

PARITY = Path(os.environ.get("LEXEL_PARITY", Path(__file__).parents[2] / "shared" / "parity"))


@pytest.fixture
def parity() -> Path:
    """The folder of fixtures made with the published implementation; tests that need it are skipped without it."""
    if not PARITY.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY}; set LEXEL_PARITY")
    return PARITY
