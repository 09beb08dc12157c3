"""Statements of the package that run for a command at two commits (`python -m benchmarks lines BEFORE AFTER --run`).

What somebody reads who follows a command through the package. Every command runs in a process of its own, on the CPU
and without torch.compile, with its lines traced. A statement counts once, however often it runs and however many lines
it has; statements in functions are what is followed, those of modules and classes run for every name imported.
"""

import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

STEPS = "--set train.steps=4 --set train.validate_every=2 --set train.save_every=2 --set train.log_every=1"
SHORT = f"{STEPS} --set train.schedule.warm_up=1 --set train.validation_images=16 --device cpu"
TOKENIZER = f"TREE/recipes/tiny.toml {SHORT} --set train.discriminator.start=2"
# What both commits can do, in this order: later commands use what earlier ones wrote. TREE is a commit's checkout.
COMMANDS = {
    "train a tokenizer": f"train {TOKENIZER} --out tiny",
    "inspect it": "inspect tiny",
    "evaluate": "evaluate tiny --data openmoji --split validation --metric psnr --metric ssim --limit 16 --device cpu "
    "--workers 0",
    "reconstruct": "reconstruct tiny pictures --out reconstructions --device cpu --workers 0",
    "encode": "encode tiny pictures --out tokens --device cpu --workers 0",
    "decode": "decode tiny tokens --out decoded --device cpu",
    "train a generator": f"train TREE/recipes/generator_tiny.toml {SHORT} --set data.tokenizer=tiny --out generator",
    "sample": "sample generator --classes 0,1 --per-class 1 --cfg-scale 2 --out samples.png --device cpu",
    "compare two quantizers": f"compare {TOKENIZER} --quantizers ibq,vq --metric psnr --limit 16 --out compared",
    "write a run's report": "report tiny",  # no command of its own: `train` ends with it
    "import a published VQGAN": "import vqgan.ckpt --family vqgan --out imported",
    "export": "export tiny --format torch --out exported",
    "publish": "publish tiny a/b --folder staged",
}


def table(commits: tuple[str, str]) -> Iterator[str]:
    """Lines of a table of statements, command by command; "all together" counts what any of them runs."""
    yield f"| command | {commits[0]} | {commits[1]} | all: {commits[0]} | {commits[1]} |\n|---|---|---|---|---|"
    ran: dict[str, list[dict[str, set[int]]]] = {name: [] for name in COMMANDS}
    sources: list[dict[str, ast.Module]] = []
    for commit in commits:
        with tempfile.TemporaryDirectory() as folder:
            tree = checkout(commit, Path(folder) / "tree")
            prepare(Path(folder))
            for name, command in COMMANDS.items():
                ran[name].append(executed(command, tree, Path(folder)))
            sources.append(
                {str(path.relative_to(tree)): ast.parse(path.read_text()) for path in (tree / "lexel").rglob("*.py")}
            )
    everything: list[dict[str, set[int]]] = [defaultdict(set), defaultdict(set)]
    for name, both in ran.items():
        for whole, lines in zip(everything, both, strict=True):
            for file, numbers in lines.items():
                whole[file] |= numbers
        yield row(name, both, sources)
    yield row("all together", everything, sources)


def row(name: str, ran: list[dict[str, set[int]]], sources: list[dict[str, ast.Module]]) -> str:
    counts = [statements(lines, trees) for lines, trees in zip(ran, sources, strict=True)]
    columns = [f"{count:,}" for counted in zip(*counts, strict=True) for count in counted]
    return f"| {name} | {' | '.join(columns)} |"


def statements(ran: dict[str, set[int]], sources: dict[str, ast.Module]) -> tuple[int, int]:
    """Statements that the lines belong to: those in functions, and all."""
    followed = everything = 0
    for file, lines in ran.items():
        first_line: dict[int, int] = {}  # of the innermost statement, by line
        for node in ast.walk(sources[file]):  # from the outside in
            if isinstance(node, ast.stmt):
                begin = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
                first_line |= dict.fromkeys(range(begin, (node.end_lineno or begin) + 1), begin)
        bodies = [node for node in ast.walk(sources[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {line for node in bodies for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}
        found = {first_line[line] for line in lines}
        followed += len(found & inside)
        everything += len(found)
    return followed, everything


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit."""
    archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def prepare(folder: Path) -> None:
    """Two pictures, and a checkpoint in VQGAN's published layout with random weights."""
    import numpy as np
    import torch
    from PIL import Image

    from tests.published_layouts import random_state, vqgan_shapes

    (folder / "pictures").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{number}.png")
    shapes = vqgan_shapes(width=32, multipliers=[1, 2], blocks=1, attended=[1], z=6, dim=4)
    torch.save({"state_dict": random_state({**shapes, "quantize.embedding.weight": (40, 4)})}, folder / "vqgan.ckpt")


def executed(command: str, tree: Path, folder: Path) -> dict[str, set[int]]:
    """Lines that ran for a command, by file of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TORCHDYNAMO_DISABLE": "1", "LEXEL_CACHE": str(folder)}
    words = command.replace("TREE", str(tree)).split()
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(tree), *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return {file: {*lines} for file, lines in json.loads((folder / "lines.json").read_text()).items()}


def trace(tree: Path, words: list[str]) -> None:
    """Runs a command line with the package of a checkout and writes the lines that ran to `lines.json`."""
    import torch  # noqa: F401  # before lines are traced, which takes three times as long

    lines: dict[str, set[int]] = defaultdict(set)
    package = f"{tree}/lexel/"

    def enter(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        if not file.startswith(package) or not file.endswith(".py"):  # a page's template runs as a file of its own
            return None
        here = lines[file.removeprefix(f"{tree}/")]

        def step(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            if event == "line":
                here.add(frame.f_lineno)
            return step

        return step

    threading.settrace(enter)
    sys.settrace(enter)
    if words[0] == "report":
        from lexel.report import write_report

        write_report(words[1])
    else:
        from lexel.cli import main

        sys.argv = ["lexel", *words]
        main()
    sys.settrace(None)
    Path("lines.json").write_text(json.dumps({file: sorted(numbers) for file, numbers in lines.items()}))


if __name__ == "__main__":
    trace(Path(sys.argv[1]), sys.argv[2:])
