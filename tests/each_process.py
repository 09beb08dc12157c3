"""What every process that runs tests sets: one thread (tiny tensors), seeds, networks that need no file."""

import atexit
import functools
import gc
import os
import zlib

import pytest

gc.disable()  # while everything is imported and collected: nearly nothing of it is garbage

import torch
import typer.main
from processes import SERVERS, Server
from random_network import Random, RandomBackbone

from lexel.networks import FEATURE_NETWORKS
from lexel.networks.backbones import BACKBONES

if "PYTEST_XDIST_WORKER" in os.environ:  # what most tests come to import, and so do the processes that they start
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch._dynamo

torch.set_num_threads(1)
if not torch.cuda.is_available():  # every seed keeps a stack trace for each device that may still come: 0.4 ms
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        kind.manual_seed_all = lambda seed: None

typer.main.get_command = functools.cache(typer.main.get_command)  # 20 ms for each use of the whole program

BACKBONES["random"] = RandomBackbone
FEATURE_NETWORKS["random"] = Random  # costs nothing and needs no file


def pytest_collection_finish() -> None:
    """What was imported and collected lives to the end: the garbage collector looks through it no more, and seldom."""
    SERVERS["tests"] = Server()  # while nothing has run: no thread, no device
    gc.freeze()
    atexit.register(gc.unfreeze)  # extension modules count what is not freed at the end, and tell
    gc.enable()
    gc.set_threshold(50_000, 50, 50)  # it took 22 of 417 s


# Every test and every fixture draws weights of its own, the same ones whichever tests ran before it in its process.
def pytest_runtest_call(item: pytest.Item) -> None:
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(f"{request.node.nodeid} {fixturedef.argname}".encode()))
