"""Shared by all tests: how they are shared out, and where the published fixtures lie."""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
# What was compiled once is read by every process of the tests, and lies in none of the source folders.
sys.dont_write_bytecode = False
sys.pycache_prefix = str(Path(__file__).parents[1] / "build" / "bytecode")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest

PARITY = Path(os.environ.get("LEXEL_PARITY", Path(__file__).parents[2] / "shared" / "parity"))


LONGEST = [  # over 4 s, the longest first
    *("test_studio_browser", "test_train", "test_cli", "test_quantizers", "test_docs", "test_generators_latents"),
    *("test_layers", "test_generators", "test_recipes", "test_train_session", "test_compare", "test_train_laws"),
    *("test_kernels_triton", "test_objective", "test_train_processes", "test_train_generator", "test_generator"),
    *("test_tiling", "test_kernels", "test_train_autoencoders", "test_export", "test_loading", "test_parity"),
    *("test_evaluate_metrics", "test_tokenizer", "test_report"),
]


def pytest_configure(config: pytest.Config) -> None:
    """With -n, whole files are shared out: what a file's tests share is then made once."""
    dist = config.getoption("dist", "no")
    if dist == "no":  # a process that shares them out runs none, and needs no torch
        import torch  # noqa: F401
        from processes import SERVERS, Server

        SERVERS["torch"] = Server()
        config.pluginmanager.import_plugin("each_process")
    if dist == "load":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # but as `LONGEST` says


def pytest_unconfigure(config: pytest.Config) -> None:
    if "processes" in sys.modules:
        from processes import SERVERS

        while SERVERS:  # the last first: it holds the pipes of those before it
            SERVERS.popitem()[1].end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_xdist_auto_num_workers() -> int:
    """As many processes as CPUs; xdist counts cores, which are half as many where a core has two threads."""
    return len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def undrawn_charts() -> Iterator[None]:
    """For files whose trainings write a report that nobody looks at: its charts share a plot, which is never drawn."""
    from matplotlib.figure import Figure

    canvas = Figure()
    axes = canvas.subplots()

    def emptied():
        for artist in [*axes.lines, *axes.collections]:
            artist.remove()
        axes.set_yscale("linear")
        return axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "subplots", emptied)
        patch.setattr("lexel.report.figures._canvas", lambda *_: nullcontext(canvas))
        patch.setattr("lexel.report.figures._svg", lambda *_, **__: "<svg></svg>")
        yield


@pytest.fixture
def parity() -> Path:
    """The folder of fixtures made with the published implementation; tests that need it are skipped without it."""
    if not PARITY.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY}; set LEXEL_PARITY")
    return PARITY
