"""A whole training step of a small tokenizer: what IBQ costs beside plain VQ, and ours beside the published code's.

    python -m benchmarks step [--sizes 16384 65536]
    python -m benchmarks step --peer CHECKOUT [--of generator]

The second needs a checkout of https://github.com/TencentARC/SEED-Voken. Both steps begin with the same weights, and
their losses are compared before anything is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import peers, published, results
from benchmarks.memory import resident
from lexel.autoencoders import VQGANConfig
from lexel.convert import convert
from lexel.quantizers import IBQ, VQ
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train import load_recipe
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import Learner

SIDE, BATCH, DIM = 128, 4, 256
WIDTH, BLOCKS, LR = 32, 1, 1e-4
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::_unique2"}
WAYS = ("Lexel", "published")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 65536], help="codebook sizes, K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="a checkout of SEED-Voken: our whole step beside the published one")
    parser.add_argument("--of", choices=["tokenizer", "generator"], default="tokenizer", help="with --peer")
    parser.add_argument("--set", nargs="*", default=[], help="with --of generator: options of its recipe")
    parser.add_argument("--weigh", choices=WAYS, help="with --peer: print the peak of one of them, of the first size")
    parser.add_argument("--out", type=Path, default=results.PAGE, help="figures go beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Times steps in turns, and adds a section to the page."""
    torch.set_num_threads(1)
    if arguments.weigh:
        print(peak(arguments.weigh, arguments.peer, arguments.sizes[0]))
        return
    if arguments.of == "generator":
        from benchmarks import generator_step

        entry = generator_step.beside(arguments.peer, arguments.set, arguments.repeats)
        figures = results.read(arguments.out)
        figures.setdefault("step", {})["generator"] = entry
        results.write(arguments.out, figures, "step", section(figures["step"]))
        print(json.dumps(entry))
        return
    for size in arguments.sizes:
        figures = results.read(arguments.out)
        kept = figures.setdefault("step", {})
        if arguments.peer:
            entry = beside(arguments.peer, size, arguments.repeats)
            kept.setdefault("published", {})[str(size)] = entry
        else:
            steps = {name: make(name, size) for name in ("IBQ, entropy", "VQ", "VQGAN lookup")}
            medians = {
                name: round(statistics.median(each), 3) for name, each in seconds(steps, arguments.repeats).items()
            }
            entry = {"s": medians, "commit": results.commit()}
            kept[str(size)] = entry
        results.write(arguments.out, figures, "step", section(kept))
        print(json.dumps(entry))


def seconds(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor time of each step, taken in turns; one round before is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if round_:
                found[name].append(time.process_time() - start)
    return found


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    sizes = {size: entry for size, entry in figures.items() if size.isdecimal()}
    lines = [
        f"`python -m benchmarks step`: seconds of a whole training step (autoencoder of width {WIDTH}, {SIDE} px,",
        f"batch {BATCH}, D = {DIM}, L1 and the quantizer's terms, Adam), one thread, medians.",
        "",
    ]
    for number, (size, entry) in enumerate(sizes.items()):
        if number == 0:
            lines += ["| K | " + " | ".join(entry["s"]) + " | commit |", "|---|" + "---|" * (len(entry["s"]) + 1)]
        lines.append(
            f"| {size} | " + " | ".join(f"{value:.2f}" for value in entry["s"].values()) + f" | {entry['commit']} |"
        )
    if "published" in figures:
        lines += beside_section(figures["published"])
    if "generator" in figures:
        from benchmarks import generator_step

        lines += generator_step.section(figures["generator"])
    return lines


def beside_section(figures: dict[str, Any]) -> list[str]:
    """The lines of the table beside the published step."""
    lines = [
        "",
        "`python -m benchmarks step --peer`: the same network with LPIPS (random weights), discriminator, LeCAM, both",
        "Adams and averages, beside the published step of https://github.com/TencentARC/SEED-Voken, run from a",
        "checkout with the same weights and images; the losses of the first step agree, or nothing is timed. Processor",
        "time of one thread, in turns, medians; in brackets the least and the most of the ratios of a round. *waits*:",
        "reads of a tensor by the host, without Adam's of its count of steps; *operations*: ATen calls that compute,",
        "in forward, backward and optimizers; *peak MiB*: beyond what the step before left, its gradients included.",
        "",
        "| K | way | s a step | times Lexel's | peak MiB | waits | operations | commit | CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, entry in figures.items():
        lines += [f"| {size} | {row(entry, way)}" for way in WAYS]
    return lines


# ------------------------------------------------------------------------------------------ beside the published step


def beside(checkout: Path, size: int, repeats: int) -> dict[str, Any]:
    """Our step and the published one from the same weights on the same images: time, memory, waits, operations."""
    model, learner = pair(checkout, size)
    images = pictures()
    steps: dict[str, Callable[[], Any]] = {
        "Lexel": partial(learner.step, images, True, 1.0),
        "published": published.tokenizer_step(model, images),
    }
    agree(model, steps)
    entry = compared(steps, checkout, repeats)
    del model, learner, steps
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks", "step", "--peer", str(checkout)]
        command += ["--weigh", way, "--sizes", str(size)]
        entry[way]["MiB"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return entry


def compared(steps: dict[str, Callable[[], Any]], checkout: Path, repeats: int) -> dict[str, Any]:
    """Seconds, waits and operations of both ways, and how many times ours the published step takes."""
    times = seconds(steps, repeats)
    ratios = sorted(theirs / ours for ours, theirs in zip(*(times[way] for way in WAYS), strict=True))
    entry: dict[str, Any] = {
        "ratios": [round(each, 3) for each in (statistics.median(ratios), ratios[0], ratios[-1])],
        "machine": results.machine("cpu", torch.get_num_threads()),
    }
    for way, code in zip(WAYS, (results.commit(), published.commit(checkout)), strict=True):
        with Counted() as counted:
            steps[way]()
        entry[way] = {
            "s": round(statistics.median(times[way]), 3),
            "waits": counted.waits,
            "operations": counted.operations,
            "commit": code,
        }
    return entry


def row(entry: dict[str, Any], way: str) -> str:
    """The cells of a way in a table, from its name to the CPU."""
    one = entry[way]
    ratio = "1" if way == WAYS[0] else "{:.2f} ({:.2f} to {:.2f})".format(*entry["ratios"])
    return (
        f"{way} | {one['s']:.2f} | {ratio} | {one['MiB']:.0f} | {one['waits']} | {one['operations']} | "
        f"{one['commit']} | {entry['machine']} |"
    )


def pictures() -> Tensor:
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def pair(checkout: Path, size: int) -> tuple[Any, Learner]:
    """The published model, and our learner with the same weights: tokenizer, discriminator and LPIPS."""
    torch.manual_seed(0)
    model = published.tokenizer(checkout, size, DIM, SIDE, WIDTH, BLOCKS, LR)
    recipe = load_recipe(
        "ibq_16384",
        [
            f"model.quantizer.codebook_size={size}",
            f"model.autoencoder.width={WIDTH}",
            f"model.autoencoder.residual_blocks={BLOCKS}",
            f"data.size={SIDE}",
            f"train.lr={LR}",
            "train.precision=float32",
            "train.channels_last=false",
        ],
    )
    assert isinstance(recipe, TokenizerRecipe)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.ckpt"
        torch.save({"state_dict": nn.Module.state_dict(model)}, path)
        converted = convert(path, "ibq", "live").model
    tokenizer = Tokenizer(recipe.model)
    tokenizer.load_state_dict(converted.state_dict())
    with mock.patch("lexel.losses.perceptual.pretrained.load", return_value=published.lpips(model)):
        learner = Learner(recipe, tokenizer, Processes("cpu"))
    assert learner.adversary is not None
    learner.adversary.discriminator.load_state_dict(model.loss.discriminator.state_dict())
    return model, learner


# Names in the published log, and ours.
LOSSES = {
    "reconstruct_loss": "l1",
    "perceptual_loss": "lpips",
    "logits_real": "logits_real",
    "total_loss": "loss",
    "codebook_sample_entropy_loss": "entropy_sample",
    "codebook_avg_entropy_loss": "entropy_batch",
    "unsacled_g_loss": "adversarial",
    "lecam_loss": "lecam",
    "logits_fake": "logits_fake",
}
STEADY = 4  # of them are compared after an update too: Adam makes whole steps of gradients that are mere rounding


def agree(model: Any, steps: dict[str, Callable[[], Any]]) -> None:
    """Runs two steps of both and compares what both report: all losses before an update, the steady ones after it.

    Raises:
        SystemExit: they do not compute the same.
    """
    for number, count in enumerate((len(LOSSES), STEADY)):
        ours = steps["Lexel"]()
        steps["published"]()
        for name, own in list(LOSSES.items())[:count]:
            here, there = float(ours[own]), float(model.logged[f"train/{name}"])
            if abs(here - there) > 1e-3 * abs(there):
                raise SystemExit(f"step {number}: {own} is {here:.6g} here and {there:.6g} in the published step")


class Counted(TorchDispatchMode):
    """Counts operations as the device gets them, and those whose result the host needs.

    Views compute nothing and do not count; nor do reads of Adam's own count of steps, which is on the CPU everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITS:
            frames = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            self.waits += not any("/torch/optim/" in file for file in frames)
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def peak(way: str, checkout: Path, size: int) -> float:
    """MiB at the peak of a step beyond what the weights, averages and both optimizers' states already take."""
    model, learner = pair(checkout, size)
    images = pictures()
    if way == "Lexel":
        del model
        step: Callable[[], Any] = partial(learner.step, images, True, 1.0)
    else:
        del learner
        step = published.tokenizer_step(model, images)
    step()
    return peak_of(step)


def peak_of(step: Callable[[], Any]) -> float:
    """MiB that a step takes at its peak beyond what is there before it."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    return round((resident("VmHWM") - before) / 1024, 1)


# ------------------------------------------------------------------------------------------ beside plain quantizers


class Lookup(nn.Module):
    """VQGAN's quantizer with its distance matrix, as a peer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, DIM))

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = z.movedim(1, -1)
        z_q, loss = peers.lookup(vectors.flatten(0, -2), self.weight)
        return z_q.view(vectors.shape).movedim(-1, 1), loss


def make(name: str, size: int) -> Callable[[], None]:
    """One training step (L1, quantizer terms, Adam) of a small network of the paper's design."""
    torch.manual_seed(0)
    autoencoder = VQGANConfig(width=WIDTH, multipliers=[1, 1, 2, 2, 4], residual_blocks=BLOCKS, z_channels=DIM)
    tokenizer = Tokenizer(
        TokenizerConfig(autoencoder=autoencoder, quantizer={"kind": "vq", "codebook_size": 2, "codebook_dim": DIM})
    )
    quantizer: Any = {"IBQ, entropy": IBQ, "VQ": VQ}[name](size, DIM) if name != "VQGAN lookup" else Lookup(size)
    parameters = [
        p
        for part in (tokenizer.encoder, tokenizer.to_codes, tokenizer.from_codes, tokenizer.decoder, quantizer)
        for p in part.parameters()
    ]
    optimizer = torch.optim.Adam(parameters, LR)
    images = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1

    def step() -> None:
        z = tokenizer.latents(images)
        if name == "VQGAN lookup":
            z_q, loss = quantizer(z)
        else:
            z_q, _, losses = quantizer(z)
            loss = quantizer.loss(losses)
        loss = loss + F.l1_loss(tokenizer.decode_codes(z_q), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
