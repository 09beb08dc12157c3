"""The SHA-256 of the weights that the two tiny recipes end with: equal before and after a change that alters no result.

Digests hold on one machine with one version of PyTorch; compare two commits, not two machines.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel.checkpoint import load_state
from lexel.train import load_recipe, train


def options(parser: argparse.ArgumentParser) -> None:
    """None: the recipes decide."""


def run(arguments: argparse.Namespace) -> None:
    """Trains `tiny`, then `generator_tiny` on its tokens, on one CPU thread, and prints a digest of each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, generator = Path(folder) / "tiny", Path(folder) / "generator_tiny"
        train(load_recipe("tiny"), tokenizer, device="cpu")
        state = last_state(tokenizer)
        averages = {name: value for name, value in state["average"].items() if name != "n_averaged"}
        print(f"tiny            {digest([*state['model'].values(), *averages.values()])}", flush=True)
        train(load_recipe("generator_tiny", [f"data.tokenizer={tokenizer}"]), generator, device="cpu")
        print(f"generator_tiny  {digest(last_state(generator)['model'].values())}")


def last_state(run: Path) -> dict[str, Any]:
    """The training state of a run's newest checkpoint."""
    return load_state(max((run / "checkpoints").glob("*.pt")))


def digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of the types, shapes and bytes of tensors, whatever their names and order."""
    parts = []
    for tensor in tensors:
        tensor = tensor.detach().contiguous()
        head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        parts.append(hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()
