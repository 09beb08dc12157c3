"""The parts `kernels` and `tuning` of `python -m benchmarks gpu`."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu import milliseconds, peak_mib
from lexel.kernels import index_backpropagation, nearest

Save = Callable[[str, Any], None]
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(z: Tensor, codebook: Tensor, entropy: bool, implementation: Any, products: Any) -> tuple[Tensor, Tensor]:
    """Index backpropagation and its loss terms."""
    z_q, _, terms = index_backpropagation(
        z, codebook, entropy=entropy, implementation=implementation, products=products
    )
    loss = terms["quantization"] + terms["commitment"] + peers.BETA * terms["codebook"]
    if entropy:
        loss = loss + 0.05 * (terms["entropy_sample"] - terms["entropy_batch"])
    return z_q, loss


def published(z: Tensor, codebook: Tensor, entropy: bool, device: str) -> tuple[Tensor, Tensor]:
    """The published computation under mixed precision."""
    with torch.autocast(device, torch.bfloat16):
        return peers.dense(z, codebook, entropy)


def methods(device: str) -> dict[str, tuple[Callable[..., Any], int]]:
    """What is compared, and how many bytes of N x K each holds about."""
    found: dict[str, tuple[Callable[..., Any], int]] = {}
    for products in ("float32", "bf16"):
        for implementation in ("tiled", "triton") if device == "cuda" else ("tiled",):
            found[f"{implementation}, {products}"] = (
                partial(ours, implementation=implementation, products=products),
                0,
            )
    found["dense, bf16"] = (partial(published, device=device), 40)
    found["dense, float32"] = (peers.dense, 44)
    return found


def kernels(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """Time, memory and error of index backpropagation and of search, beside the dense formulas."""
    rows, dim = (64, 32) if arguments.tiny else (4096, 256)
    sizes = (256, 512) if arguments.tiny else (262144, 16384, 65536, 2**20)
    ceilings(save, device, rows, sizes[0], dim)
    errors(save, device, arguments.tiny)
    for size in sizes:
        case = peers.Case(rows, size, dim, device)
        repeats = 3 if size >= 2**18 else 7
        for name, (forward, bytes_held) in methods(device).items():
            if bytes_held * rows * size > 60e9:
                save(f"{rows} x {size}: {name}", "does not fit")
                continue
            if size >= 2**20 and "float32" in name:
                continue
            figures: dict[str, float | None] = {}
            for entropy in (False, True):
                job = partial(case.step, partial(forward, entropy=entropy))
                figures["ms, entropy" if entropy else "ms"] = round(milliseconds(job, device, repeats, 1), 3)
                figures["MiB, entropy" if entropy else "MiB"] = peak_mib(job, device)
                if device == "cuda":
                    torch.cuda.empty_cache()
            save(f"{rows} x {size}: {name}", figures)
        search: dict[str, Callable[[], Any]] = {
            "auto dot": partial(nearest, case.z, case.codebook, "dot"),
            "auto l2": partial(nearest, case.z, case.codebook, "l2"),
            "tiled dot": partial(nearest, case.z, case.codebook, "dot", "tiled"),
        }
        if 12 * rows * size < 60e9:
            search["distances"] = partial(_argmin, case.z, case.codebook)
        found = {name: round(milliseconds(job, device, repeats, 1), 3) for name, job in search.items()}
        save(f"{rows} x {size}: search", found)


@torch.no_grad()
def _argmin(z: Tensor, codebook: Tensor) -> Tensor:
    return peers.distances(z, codebook).argmin(1)


def ceilings(save: Save, device: str, rows: int, size: int, dim: int) -> None:
    """What the machine can do: a large product, a copy, and the bare products in our shapes."""
    side = 8192 if device == "cuda" else 256
    pair = [torch.randn(side, side, device=device).bfloat16() for _ in range(2)]
    save("bf16 product, TFLOP/s", round(2 * side**3 / milliseconds(partial(torch.mm, *pair), device) / 1e9, 1))
    source = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    save("copy, TB/s", round(2 * len(source) / milliseconds(partial(copied.copy_, source), device) / 1e9, 3))
    del pair, source, copied
    z, codes = torch.randn(rows, dim, device=device).bfloat16(), torch.randn(size, dim, device=device).bfloat16()
    part = min(size, 32768)
    scores = torch.randn(rows, part, device=device).bfloat16()
    times = {
        "z E": milliseconds(lambda: torch.mm(z, codes[:part].T, out=scores), device),
        "dL E": milliseconds(lambda: scores @ codes[:part], device),
        "dL' z": milliseconds(lambda: scores.T @ z, device),
    }
    save(f"{rows} x {size}: bare bf16 products, ms", {name: round(t * size / part, 3) for name, t in times.items()})


def errors(save: Save, device: str, tiny: bool) -> None:
    """The distance of each method's gradients from float64, and whether its indices are right."""
    for rows, size, dim in ((16, 64, 16),) if tiny else ((256, 16384, 256), (128, 65536, 256)):
        z, codebook = peers.Case(rows, size, dim).z.detach(), peers.Case(rows, size, dim).codebook.detach()
        g = peers.Case(rows, size, dim).g.double().to(device)

        def outcome(forward: Forward, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            ours_z, ours_codes = (t.to(device, dtype).requires_grad_() for t in (z, codebook))  # noqa: B023
            z_q, loss = forward(ours_z, ours_codes)
            of_z, of_codes = torch.autograd.grad((z_q.double() * g).sum() + loss.double(), (ours_z, ours_codes))  # noqa: B023
            return of_z, of_codes

        exact = outcome(partial(ours, entropy=True, implementation="oracle", products="float32"), torch.float64)
        best = nearest(z.double().to(device), codebook.double().to(device), "dot", "oracle")
        for name, (forward, _) in methods(device).items():
            found = outcome(partial(forward, entropy=True), torch.float32)
            off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            figures: dict[str, Any] = {"d_z": float(f"{off[0]:.2e}"), "d_codebook": float(f"{off[1]:.2e}")}
            if not name.startswith("dense"):
                way: Any = name.split(",")[0]
                indices = nearest(z.to(device), codebook.to(device), "dot", way)
                figures["wrong indices"] = int((indices != best).sum())
            save(f"error, {rows} x {size}: {name}", figures)


def tuning(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """Times the Triton kernels cut in several ways: the fastest belongs into `triton_tiles.SHAPES`."""
    if device != "cuda":
        save("tuning", "needs a CUDA device")
        return
    from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]

    from lexel.kernels import triton_search, triton_softmax
    from lexel.kernels import triton_tiles as tiles
    from lexel.kernels.inputs import Inputs
    from lexel.kernels.rounding import APART, GROUP

    rows, size, dim = 4096, 2**18, 256
    z, g = (torch.randn(rows, dim, device=device) for _ in range(2))
    codes = torch.randn(size, dim, device=device)
    low_z, low_codes = z.bfloat16(), codes.bfloat16()
    inputs = Inputs(z, codes, None, False, 1.0, 0.01, False, 16, 1, 1, True)
    jobs: dict[str, Callable[[], Any]] = {
        "scan": lambda: triton_search.group_maxima(low_z, low_codes, None, GROUP, APART),
        "soft": lambda: triton_softmax.soft(inputs, g, None),
    }
    own = tiles.shapes(torch.device(device))
    most = next(limit for limit, cut in tiles.SHAPES.items() if cut == own)
    trials = {
        "scan": [(128, 64, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3), (256, 64, 8, 2)],
        "statistics": [(128, 64, 8, 3), (128, 128, 8, 1), (128, 64, 4, 3)],
        "slope": [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 1), (128, 32, 8, 4), (64, 128, 4, 1), (128, 32, 8, 3)],
    }
    for kernel, cuts in trials.items():
        for cut in cuts:
            tiles.SHAPES[most] = own._replace(**{kernel: tiles.Tiles(*cut)})
            job = jobs["scan" if kernel == "scan" else "soft"]
            try:
                save(f"{kernel} {cut}: ms with it", round(milliseconds(job, device, 7, 1), 3))
            except OutOfResources:
                save(f"{kernel} {cut}: ms with it", "does not fit")
    tiles.SHAPES[most] = own
