"""What every command costs before its own work: processor seconds beside `import torch` alone.

Each command runs in a process of its own, on a tiny model and two pictures or with an input that does not exist, so
that it comes as far as its first work. Runs are interleaved and medians are compared: other work disturbs all alike.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results

HELP_BAR, COMMAND_BAR = 0.3, 0.5  # seconds: of `--help`, and of every command beyond `import torch`
BARE, TORCH = "python -c pass", 'python -c "import torch"'

# HERE is a folder with what `prepare` writes. What is named `nothing` does not exist and is refused.
LINES = (
    "--help",
    "list quantizers",
    "inspect tiny",
    "inspect generator_tiny",
    "inspect HERE/model",
    "reconstruct HERE/model HERE/pictures --out HERE/new",
    "encode HERE/model HERE/pictures --out HERE/new",
    "merge HERE/tokens --out HERE/new",
    "decode HERE/model HERE/tokens --out HERE/new",
    "evaluate HERE/model --data HERE/pictures --metric psnr",
    "sample HERE/generator --tokenizer HERE/model --classes 0,1 --out HERE/new.png",
    "usage HERE/tokens",
    "prune HERE/model HERE/pictures --out HERE/new",
    "grow HERE/nothing --to 32 --out HERE/new",
    "tables HERE/nothing --out HERE/new",
    "bank nothing HERE/pictures --out HERE/new",
    "studio HERE/nothing",
    "import HERE/nothing --out HERE/new",
    "export HERE/nothing --out HERE/new",
    "publish HERE/nothing a/b",
    "probe HERE/nothing",
    "leaderboard HERE/nothing --out HERE/new",
    "curves HERE/nothing --out HERE/new",
    "compare tiny --quantizers nothing --out HERE/new",
    "demo --device nothing --out HERE/new",
    "train tiny --out HERE/new --dry-run",
    "train generator_tiny --out HERE/new --dry-run",
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command; medians are reported")
    parser.add_argument("--only", nargs="+", help="commands to measure, by name")
    parser.add_argument("--out", type=Path, help="the page to write the table to")


def prepare(here: Path) -> None:
    """A tiny tokenizer, a tiny generator, two pictures, and the pictures' tokens."""
    import numpy as np
    import torch
    from PIL import Image

    from lexel.config import check
    from lexel.generators import Generator, GeneratorConfig
    from lexel.tokenizer import Tokenizer, TokenizerConfig

    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    tokenizer = check({"autoencoder": {**sizes, "groups": 4}, "quantizer": quantizer}, TokenizerConfig, "the tokenizer")
    Tokenizer(tokenizer).save_pretrained(here / "model", {"size": 8})
    layout = {"kind": "masked", "rows": 4, "columns": 4, "codebook_size": 16, "classes": 2}
    generator = check(
        {"transformer": {**layout, "width": 16, "layers": 1, "heads": 2}}, GeneratorConfig, "the generator"
    )
    Generator(generator).save_pretrained(here / "generator")
    (here / "pictures").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(here / "pictures" / f"{number}.png")
    seconds(lexel(f"encode {here}/model {here}/pictures --out {here}/tokens"), "")


def lexel(line: str) -> list[str]:
    """A command as its entry point starts it."""
    return [sys.executable, "-c", "import sys; from lexel.cli import main; sys.exit(main())", *line.split()]


def seconds(command: list[str], refused: str) -> float:
    """Processor seconds of a process and those it waited for; it must end well, or name what it refused."""
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # modules are compiled once, in the first round, as a user's are
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode != (2 if refused else 0) or refused not in text:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    return used.ru_utime + used.ru_stime


def measured(lines: list[str], repeats: int, here: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of each command's seconds, and of what they are beyond those of `import torch` run just before.

    A machine's speed moves by more than the bars leave, so each run has its own `import torch`. Every round runs all
    commands once, after a first that fills caches.
    """
    commands = {BARE: [sys.executable, "-c", "pass"], TORCH: [sys.executable, "-c", "import torch"]}
    taken: dict[str, list[float]] = {name: [] for name in (*commands, *lines)}
    beyond: dict[str, list[float]] = {name: [] for name in lines}
    for turn in range(repeats + 1):
        for name in taken:
            fresh = here / f"{turn}-{list(taken).index(name)}"  # a command writes where nothing is yet
            command = commands.get(name) or lexel(name.replace("HERE/new", str(fresh)).replace("HERE", str(here)))
            torch = seconds(commands[TORCH], "") if turn and name in beyond else 0.0
            used = seconds(command, "nothing" if "nothing" in name else "")
            if turn:
                taken[name].append(used)
                if name in beyond:
                    beyond[name].append(used - torch)
    return medians(taken), medians(beyond)


def medians(taken: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


def section(figures: dict[str, Any]) -> list[str]:
    """The table of RESULTS.md."""
    times, beyond = figures["seconds"], figures["beyond"]
    lines = [
        "## Start-up",
        "",
        f"{figures['machine']}, commit {figures['commit']}, `python -m benchmarks startup`: processor seconds, medians"
        f" of {figures['repeats']} interleaved runs, each beside an `import torch` just before it. A tiny model and two"
        " pictures of 8 x 8, or an input that does not"
        f" exist (`nothing`), so that a command comes as far as its first work. Bars: `--help` under {HELP_BAR} s, all"
        f" others within {COMMAND_BAR} s of `import torch`.",
        "",
        "| command | seconds | beyond `import torch` | within its bar |",
        "|---|---|---|---|",
    ]
    for name, taken in times.items():
        if name not in beyond:
            lines.append(f"| `{name}` | {taken:.2f} | | |")
            continue
        more = beyond[name]
        within = taken < HELP_BAR if name == "--help" else more <= COMMAND_BAR
        line = name.replace("HERE/", "")
        lines.append(f"| `lexel {line}` | {taken:.2f} | {more:+.2f} | {'yes' if within else 'no'} |")
    return lines


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it with --out."""
    lines = [line for line in LINES if not arguments.only or line.split()[0] in arguments.only]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        times, beyond = measured(lines, arguments.repeats, Path(folder))
    figures = {
        "machine": results.machine("cpu", 1),
        "commit": results.commit(),
        "repeats": arguments.repeats,
        "seconds": times,
        "beyond": beyond,
    }
    results.show(arguments.out, "startup", figures, section(figures))
