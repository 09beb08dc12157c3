"""A whole training step of a small tokenizer: what IBQ costs beside plain VQ."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers, results
from lexel.autoencoders import VQGANConfig
from lexel.quantizers import IBQ, VQ
from lexel.tokenizer import Tokenizer, TokenizerConfig

SIDE, BATCH, DIM = 128, 4, 256


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=65536, help="codebook size, K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results.PAGE, help="figures go beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Times steps with IBQ, our VQ and a published VQGAN lookup in the same network, interleaved; adds a section."""
    torch.set_num_threads(1)
    steps = {name: make(name, arguments.size) for name in ("IBQ, entropy", "VQ", "VQGAN lookup")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if round_:  # the first is a warm-up
                seconds[name].append(time.process_time() - start)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    figures = results.read(arguments.out)
    figures.setdefault("step", {})[str(arguments.size)] = {"s": medians, "commit": results.commit()}
    results.write(arguments.out, figures, "step", section(figures["step"]))
    print(json.dumps(medians))


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        f"`python -m benchmarks step`: seconds of a whole training step (autoencoder of width 32, {SIDE} px,",
        f"batch {BATCH}, D = {DIM}, L1 and the quantizer's terms, Adam), one thread, medians.",
        "",
    ]
    for number, (size, entry) in enumerate(figures.items()):
        if number == 0:
            lines += ["| K | " + " | ".join(entry["s"]) + " | commit |", "|---|" + "---|" * (len(entry["s"]) + 1)]
        lines.append(
            f"| {size} | " + " | ".join(f"{value:.2f}" for value in entry["s"].values()) + f" | {entry['commit']} |"
        )
    return lines


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
    autoencoder = VQGANConfig(width=32, multipliers=[1, 1, 2, 2, 4], residual_blocks=1, z_channels=DIM)
    tokenizer = Tokenizer(
        TokenizerConfig(autoencoder=autoencoder, quantizer={"kind": "vq", "codebook_size": 2, "codebook_dim": DIM})
    )
    quantizer: Any = {"IBQ, entropy": IBQ, "VQ": VQ}[name](size, DIM) if name != "VQGAN lookup" else Lookup(size)
    parameters = [
        p
        for part in (tokenizer.encoder, tokenizer.to_codes, tokenizer.from_codes, tokenizer.decoder, quantizer)
        for p in part.parameters()
    ]
    optimizer = torch.optim.Adam(parameters, 1e-4)
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
