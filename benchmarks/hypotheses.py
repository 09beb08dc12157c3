"""What might mend IBQ and is no part of Lexel: each hypothesis trained and measured as `lexel compare` does a method.

python -m benchmarks hypotheses --out runs/hypotheses
python -m benchmarks study --setting "prototypes openmoji 1024 32 1000" --add runs/hypotheses/runs/*
"""

import argparse
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.compare import compare
from lexel.compare.plan import Variant
from lexel.kernels import nearest
from lexel.kernels.inputs import loss_terms
from lexel.kernels.oracle import EPS
from lexel.quantizers import QUANTIZERS
from lexel.quantizers.base import Quantized, as_grid, as_vectors, full_precision
from lexel.quantizers.ibq import IBQ
from lexel.quantizers.ibq_affine import IBQAffine
from lexel.train import load_recipe
from lexel.train.tokenizer import TokenizerRecipe

TENTH = {name: weight / 10 for name, weight in IBQ.LOSS_WEIGHTS.items()}
NORM_DECAY = 0.9  # of the running norms that balance the terms


class Trial(IBQ):
    """IBQ as its formulas read, with tensors of N x K; with the options left alone it is IBQ.

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        temperatures: of the softmax that carries the gradient, at the training's start and end; geometric in between.
        learned: the temperature is a parameter, which learns from the gradient that the softmax hands it.
        identities: the share of the gradient as it is, at the start and the end; linear in between.
        terms: a factor of all terms, at the start and the end; linear in between.
        batches: over how many of the last batches the distribution of the batch entropy is averaged; the current one's
            gradient is that of a batch alone.
        balance: above 0, all terms are scaled so that their gradient at the latents is this many times as long as the
            picture's, by running means of both.
        scaled: "entropies by tokens" and "terms by tokens" multiply by the batch's tokens for each code, at most 1;
            "entropies by codes" divides by the largest entropy of K codes.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        temperatures: Sequence[float] = (1.0, 1.0),
        learned: bool = False,
        identities: Sequence[float] = (0.0, 0.0),
        terms: Sequence[float] = (1.0, 1.0),
        batches: int = 1,
        balance: float = 0.0,
        scaled: str = "",
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.temperatures, self.identities, self.terms = temperatures, identities, terms
        self.balance, self.scaled = balance, scaled
        self.log_temperature = torch.nn.Parameter(torch.zeros(())) if learned else None
        self.earlier: deque[Tensor] = deque(maxlen=batches - 1)  # mean rows of the batches before
        self.norms: dict[str, float] = {}  # running lengths of both gradients at the latents
        self.factor = 1.0
        self.anneal(0.0)

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        first, last = self.temperatures
        self.temperature = first * (last / first) ** progress
        self.identity = line(self.identities, progress)
        self.factor = line(self.terms, progress)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        vectors = as_vectors(z)
        indices = nearest(vectors, self.weight, "dot")
        if not self.balance:
            z_q, losses = self._passes(vectors, indices)
            factor = 1.0
        else:
            of_picture, of_terms = vectors.clone(), vectors.clone()
            z_q, _ = self._passes(of_picture, indices)
            _, losses = self._passes(of_terms, indices)
            factor = self._balanced(of_picture, of_terms)
        tokens_of_a_code = min(1.0, len(vectors) / self.codebook_size)
        if self.scaled == "terms by tokens":
            factor *= tokens_of_a_code
        losses = {name: self.factor * factor * value for name, value in losses.items()}
        for name in ("entropy_sample", "entropy_batch"):
            if self.scaled == "entropies by tokens":
                losses[name] = losses[name] * tokens_of_a_code
            elif self.scaled == "entropies by codes":
                losses[name] = losses[name] / math.log(self.codebook_size)
        return Quantized(as_grid(z_q, z), indices.view(z.shape[0], *z.shape[2:]), losses)

    def _passes(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z_q (N, D) and the terms of latents (N, D)."""
        logits = vectors @ self.weight.T
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        p = (logits / temperature).softmax(1)
        hard = F.one_hot(indices, self.codebook_size).to(p)
        z_q = (hard + (p - p.detach())) @ self.weight
        losses = loss_terms(vectors, z_q, F.embedding(indices, self.weight))
        log_q = (logits / self.entropy_temperature).log_softmax(1)
        q = log_q.exp()
        losses["entropy_sample"] = -(q * log_q).sum(1).mean()
        losses["entropy_batch"] = self._batch_entropy(q.mean(0))
        return z_q + self.identity * (vectors - vectors.detach()), losses

    def _batch_entropy(self, own: Tensor) -> Tensor:
        """The entropy of the distribution (K,) of a batch, averaged with those before; the gradient as of one."""
        together = torch.stack([own.detach(), *self.earlier]).mean(0)
        if self.training and torch.is_grad_enabled():
            self.earlier.append(own.detach())
        mean = together + (own - own.detach())
        return -(mean * (mean + EPS).log()).sum()

    def _balanced(self, of_picture: Tensor, of_terms: Tensor) -> float:
        """The factor of the terms by the lengths of gradients so far; those of this batch are seen as they pass."""
        norms = self.norms
        factor = self.balance * norms["picture"] / norms["terms"] if len(norms) == 2 else 1.0
        if self.training and of_picture.requires_grad:
            of_picture.register_hook(lambda gradient: self._keep("picture", gradient.norm().item()))
            of_terms.register_hook(lambda gradient: self._keep("terms", gradient.norm().item() / factor))
        return factor

    def _keep(self, name: str, length: float) -> None:
        length = max(length, 1e-12)
        self.norms[name] = NORM_DECAY * self.norms.get(name, length) + (1 - NORM_DECAY) * length


class AffineTrial(IBQAffine):
    """`ibq_affine` whose share of the straight gradient moves along a line, from the first number to the second."""

    def __init__(self, codebook_size: int, codebook_dim: int, identities: Sequence[float] = (0.5, 0.5)) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.identities = identities
        self.anneal(0.0)

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        self.identity = line(self.identities, progress)


def line(ends: Sequence[float], progress: float) -> float:
    """From the first number to the second."""
    return ends[0] + (ends[1] - ends[0]) * progress


TRIALS = {"ibq_trial": Trial, "ibq_affine_trial": AffineTrial}

ROWS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, float]]] = {
    "temperature_learned": ("ibq_trial", {"learned": True}, {}),
    "temperature_falls": ("ibq_trial", {"temperatures": (3.0, 0.3)}, {}),
    "identity_falls": ("ibq_trial", {"identities": (1.0, 0.0)}, {}),
    "queue": ("ibq_trial", {"batches": 16}, {}),
    "balanced": ("ibq_trial", {"balance": 1.0}, {}),
    "balanced_tenth": ("ibq_trial", {"balance": 0.1}, {}),
    "balanced_identity": ("ibq_trial", {"balance": 1.0, "identities": (1.0, 1.0)}, {}),
    "terms_by_tokens": ("ibq_trial", {"scaled": "terms by tokens"}, {}),
    "entropies_by_tokens": ("ibq_trial", {"scaled": "entropies by tokens"}, {}),
    "tenth_identity_falls": ("ibq_trial", {"identities": (1.0, 0.0)}, TENTH),
    "tenth_queue": ("ibq_trial", {"batches": 16}, TENTH),
    "affine_identity_falls": ("ibq_affine_trial", {"identities": (1.0, 0.0)}, {}),
    "affine_identity_rises": ("ibq_affine_trial", {"identities": (0.0, 1.0)}, {}),
    "entropies_by_codes": ("ibq_trial", {"scaled": "entropies by codes"}, {}),
    "terms_fall": ("ibq_trial", {"terms": (1.0, 0.0)}, {}),
    "temperature_rises": ("ibq_trial", {"temperatures": (0.3, 3.0)}, {}),
    "identity_rises": ("ibq_trial", {"identities": (0.0, 1.0)}, {}),
    "tenth_temperature_learned": ("ibq_trial", {"learned": True}, TENTH),
    "tenth_temperature_falls": ("ibq_trial", {"temperatures": (3.0, 0.3)}, TENTH),
    "tenth_identity": ("ibq_trial", {"identities": (1.0, 1.0)}, TENTH),
    "trial": ("ibq_trial", {}, {}),
}


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--recipe", default="compare_openmoji", help="a recipe of Lexel, or a file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; called again it goes on")
    parser.add_argument("--rows", help="names of rows, comma-separated; all of them by default")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--sizes", default="", help="numbers of codes, comma-separated; the recipe's by default")
    parser.add_argument("--set", action="append", default=[], help="a change of the recipe, as in `lexel train`")


def run(arguments: argparse.Namespace) -> None:
    """Trains and measures the rows that are not finished."""
    torch.set_num_threads(1)
    QUANTIZERS.update(TRIALS)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if not isinstance(recipe, TokenizerRecipe):
        raise SystemExit(f"{arguments.recipe} is a generator's recipe; name that of a tokenizer")
    variants = {
        name: Variant(kind=kind, options=dict(given), weights=dict(weights))
        for name, (kind, given, weights) in ROWS.items()
    }
    result = compare(
        recipe,
        arguments.rows.split(",") if arguments.rows else list(ROWS),
        arguments.out,
        codebook_sizes=[int(size) for size in arguments.sizes.split(",") if size],
        seeds=[int(seed) for seed in arguments.seeds.split(",")],
        variants=variants,
        metrics=["psnr", "lpips", "usage"],
        device="cpu",
    )
    print(result.page)
