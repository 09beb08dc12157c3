"""Inputs of the kernels: choices, checks of shapes, loss terms."""

import os
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError, unknown

Implementation = Literal["oracle", "tiled", "triton", "auto"]
IMPLEMENTATIONS = ("oracle", "tiled", "triton", "auto")
Similarity = Literal["dot", "l2", "cosine"]
SIMILARITIES = ("dot", "l2", "cosine")
Products = Literal["float32", "bf16"]
PRODUCTS = ("float32", "bf16")

# What `auto` takes on a GPU, by compute capability: measured by `python -m benchmarks gpu`, tiles where nobody has.
FASTEST: dict[tuple[int, int], str] = {(9, 0): "triton"}


class Inputs(NamedTuple):
    """The inputs of both passes of index backpropagation."""

    queries: Tensor  # (N, D), float32 or float64
    keys: Tensor  # (K, D)
    codes: Tensor | None  # (K, D), what z_q is made of; None where the keys are the codes
    distance: bool  # logits are queries @ keys.T - |keys|^2
    temperature: float
    entropy_temperature: float
    entropy: bool
    rows: int  # rows of the backward pass at a time; it holds two buffers of rows x K
    parts: int  # equal consecutive parts of the rows, each with a batch entropy of its own
    together: int  # consecutive processes that share a batch entropy
    half: bool = False  # products of the gradient through the softmax in bfloat16


def check_rows(z: Tensor, codebook: Tensor) -> None:
    """Refuses what is no z (N, D) and codebook (K, D)."""
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise UsageError(
            f"z must be (N, D) and codebook (K, D) with the same D, got {tuple(z.shape)} and {tuple(codebook.shape)}"
        )
    if z.shape[0] == 0:
        raise UsageError("z has no rows: an empty batch cannot be quantized")
    if codebook.shape[0] == 0:
        raise UsageError("codebook has no rows")
    if not z.is_floating_point() or not codebook.is_floating_point():
        raise UsageError(f"z and codebook must be floating point, got {z.dtype} and {codebook.dtype}")


def check_similarity(similarity: str) -> None:
    """Refuses a similarity that is not in SIMILARITIES."""
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)


def choose_implementation(implementation: str, z: Tensor) -> str:
    """The implementation that serves z; refuses one that cannot."""
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "triton":
        if not (z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise UsageError(f"implementation 'triton' needs a CUDA device, got {z.device}; use 'tiled'")
        if z.dtype == torch.float64:
            raise UsageError("implementation 'triton' takes float32, got float64; use 'tiled'")
        if find_spec("triton") is None:
            raise UsageError("implementation 'triton' needs the triton package; install it or use 'tiled'")
    if implementation != "auto":
        return implementation
    if z.is_cuda and z.dtype == torch.float32 and find_spec("triton") is not None:
        return FASTEST.get(torch.cuda.get_device_capability(z.device), "tiled")
    return "tiled"


def has_half_products(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than those of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def as_scores(z: Tensor, codebook: Tensor, similarity: str) -> tuple[Tensor, Tensor, bool]:
    """Queries and keys whose products are the logits, up to a constant in each row; True: -|keys|^2 is to be added."""
    if similarity == "dot":
        return z, codebook, False
    if similarity == "cosine":
        return F.normalize(z, dim=1), F.normalize(codebook, dim=1), False
    # -|z - e|^2 = 2 z.e - |e|^2 - |z|^2; neither a softmax over codes nor its entropy sees the last term.
    return 2 * z, codebook, True


def loss_terms(z: Tensor, z_q: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The squared errors of index backpropagation, from z_q, which carries all codes, and the chosen codes (N, D)."""
    return {
        "quantization": F.mse_loss(z_q, z),
        "commitment": F.mse_loss(z, chosen.detach()),
        "codebook": F.mse_loss(chosen, z.detach()),
    }


def incoming(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of z_q, of all chosen codes, and of both entropies, from those of the outputs."""
    z_q, chosen, _, sample, batch = grads[:5]
    hard = z_q if chosen is None else chosen if z_q is None else z_q + chosen
    return z_q, hard, sample, batch


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether tensors stand for others (a compiler at work, fake or meta tensors), so that values cannot be looked at.

    A custom operator then keeps the computation in one piece. Only then: the first call of a custom operator imports
    torch._dynamo, which takes seconds and 170 MiB.
    """
    return torch.compiler.is_compiling() or any(
        t is not None and (t.is_meta or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__) for t in tensors
    )


class _Refused(torch.autograd.Function):
    """A gradient as it is; its own gradient is an error."""

    @staticmethod
    def forward(what: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise second_derivatives(ctx.what)


def second_derivatives(what: str) -> UsageError:
    """The error for differentiating a gradient."""
    return UsageError(f"{what} has no second derivatives: its gradient cannot be differentiated again")


def differentiable_once(
    what: str, gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients made from sources, such that differentiating them again raises UsageError instead of giving nothing."""
    if not torch.is_grad_enabled():
        return gradients
    given = [source for source in sources if source is not None]
    return tuple(None if g is None else _Refused.apply(what, g, *given) for g in gradients)


class OnRows(torch.autograd.Function):
    """A function of rows that refuses the transforms of torch.func, by its NAME."""

    NAME: ClassVar[str]

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        raise cls.refusal("vmap")

    @classmethod
    def jvp(cls, ctx: Any, *args: Any) -> Any:
        raise cls.refusal("jvp")

    @classmethod
    def refusal(cls, transform: str) -> UsageError:
        return UsageError(f"{cls.NAME} cannot be transformed by torch.func's {transform}; call it on rows (N, D)")
