"""The same forward and backward pass by other means: what the kernels are compared with."""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.kernels import Products, index_backpropagation, nearest

TAU = 0.01
BETA = 0.25
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z (N, D), codebook (K, D) -> z_q, loss


class Case:
    """Latents, a codebook and the gradient that a decoder would send, with the statistics of a fresh model.

    Latents are short (length 3 at any D), as an encoder's output is at the start: the softmax over N(0, 1) codes is
    then broad, and no method is slowed down by denormal numbers.
    """

    def __init__(self, rows: int, size: int, dim: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(rows + size)
        self.z = (torch.randn(rows, dim, generator=generator) * 3 / dim**0.5).to(device).requires_grad_()
        self.codebook = torch.randn(size, dim, generator=generator).to(device).requires_grad_()
        self.g = (torch.randn(rows, dim, generator=generator) / rows).to(device)

    def step(self, forward: Forward) -> None:
        """One forward and backward pass."""
        z_q, loss = forward(self.z, self.codebook)
        torch.autograd.grad((z_q * self.g).sum() + loss, (self.z, self.codebook), allow_unused=True)

    @torch.no_grad()
    def encode(self, search: Callable[[Tensor, Tensor], object]) -> None:
        search(self.z, self.codebook)


def lexel(
    z: Tensor, codebook: Tensor, entropy: bool, rows: int | None = None, products: Products = "float32"
) -> tuple[Tensor, Tensor]:
    z_q, _, terms = index_backpropagation(z, codebook, entropy=entropy, rows=rows, products=products)
    loss = terms["quantization"] + terms["commitment"] + BETA * terms["codebook"]
    if entropy:
        loss = loss + 0.05 * (terms["entropy_sample"] - terms["entropy_batch"])
    return z_q, loss


def dense(z: Tensor, codebook: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """The published computation, written plainly with matrix products: N x K tensors and autograd."""
    logits = z @ codebook.T
    p = logits.softmax(1)
    hard = F.one_hot(p.argmax(1), len(codebook)).to(p.dtype)
    z_q = (hard - p.detach() + p) @ codebook
    chosen = hard @ codebook
    loss = F.mse_loss(z_q, z) + F.mse_loss(chosen.detach(), z) + BETA * F.mse_loss(chosen, z.detach())
    if entropy:
        scaled = logits / TAU
        q, log_q = scaled.softmax(1), (scaled + 1e-5).log_softmax(1)
        mean = q.mean(0)
        loss = loss + 0.05 * ((mean * (mean + 1e-5).log()).sum() - (q * log_q).sum(1).mean())
    return z_q, loss


def distances(z: Tensor, codebook: Tensor) -> Tensor:
    """All squared distances, as VQGAN's quantizer computes them."""
    return z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * (z @ codebook.T)


def lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """A plain VQGAN lookup: all distances, argmin, two loss terms, straight-through."""
    chosen = F.embedding(distances(z, codebook).argmin(1), codebook)
    loss = F.mse_loss(chosen.detach(), z) + BETA * F.mse_loss(chosen, z.detach())
    return z + (chosen - z).detach(), loss


def library(size: int, dim: int, device: str) -> Forward:
    """The plain VectorQuantize of the vector-quantize-pytorch package, with its defaults (codes learn by averages)."""
    from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-untyped]

    module = VectorQuantize(dim=dim, codebook_size=size).to(device)

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        z_q, _, loss = module(z[None])
        return z_q[0], loss.sum()

    return forward


def published(checkout: Path, codes: int, dim: int, device: str, entropy: bool) -> Forward:
    """IndexPropagationQuantize of https://github.com/TencentARC/SEED-Voken as it is, from a checkout of it.

    It takes grids (B, D, H, W): 16 x 16 tokens an image, as its recipes have, where that divides the rows.
    """
    path = checkout / "src/IBQ/modules/vqvae/quantize.py"
    if not path.exists():
        raise SystemExit(f"--peer names a checkout of SEED-Voken: {path} is not there")
    module = runpy.run_path(str(path))["IndexPropagationQuantize"](
        codes, dim, BETA, entropy, entropy_temperature=TAU
    ).to(device)

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        side = 16 if len(z) % 256 == 0 else 1
        grid = z.view(-1, side, side, dim).permute(0, 3, 1, 2)
        z_q, terms, _ = torch.func.functional_call(module, {"embedding.weight": codebook}, (grid,))
        loss = terms[0] + 0.05 * terms[3] if entropy else terms
        return z_q.permute(0, 2, 3, 1).reshape(z.shape), loss

    return forward


def products(z: Tensor, codebook: Tensor, count: int) -> None:
    """Matrix products alone, tile by tile into reused memory: one for encoding, five for index backpropagation."""
    tile = 1024
    d_z, d_codes = torch.zeros_like(z[:tile]), torch.zeros_like(codebook[:tile])
    for codes in codebook.split(tile):
        for rows in z.split(tile):
            for number in range(count):
                if number < 3:
                    scores = rows @ codes.T
                elif number == 3:
                    d_z[: len(rows)].addmm_(scores, codes)
                else:
                    d_codes[: len(codes)].addmm_(scores.T, rows)


# name: (the work, buffers of N x K that it holds)
STEPS: dict[str, tuple[Forward, int]] = {
    "lexel": (partial(lexel, entropy=False), 0),
    "lexel, entropy": (partial(lexel, entropy=True), 0),
    "lexel, entropy, bf16 products": (partial(lexel, entropy=True, products="bf16"), 0),
    "lexel, entropy, 16 rows": (partial(lexel, entropy=True, rows=16), 0),
    "dense": (partial(dense, entropy=False), 7),
    "dense, entropy": (partial(dense, entropy=True), 10),
    "VQGAN lookup": (lookup, 4),
    "vector-quantize-pytorch": (lookup, 6),  # built by `work`
    "published class": (partial(dense, entropy=False), 10),  # the same
    "published class, entropy": (partial(dense, entropy=True), 17),
}
OF_CHECKOUT = [name for name in STEPS if name.startswith("published")]
ENCODERS: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "encode: lexel dot": (partial(nearest, similarity="dot"), 0),
    "encode: lexel l2": (nearest, 0),
    "encode: distances": (lambda z, codebook: distances(z, codebook).argmin(1), 4),
    "1 product": (partial(products, count=1), 0),
    "5 products": (partial(products, count=5), 0),
}


def work(name: str, case: Case, checkout: Path | None = None) -> Callable[[], None]:
    """What to time for a method; those OF_CHECKOUT need one of SEED-Voken."""
    if name in ENCODERS:
        return partial(case.encode, ENCODERS[name][0])
    size, dim = case.codebook.shape
    if name in OF_CHECKOUT:
        assert checkout is not None
        return partial(case.step, published(checkout, size, dim, str(case.z.device), "entropy" in name))
    if name == "vector-quantize-pytorch":
        return partial(case.step, library(size, dim, str(case.z.device)))
    return partial(case.step, STEPS[name][0])


def gigabytes(name: str, rows: int, size: int) -> float:
    """About what the N x K tensors of a method take."""
    return {**STEPS, **ENCODERS}[name][1] * rows * size * 4 / 2**30
