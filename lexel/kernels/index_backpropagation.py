"""Index backpropagation (https://arxiv.org/abs/2412.02692): one call, three implementations."""

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError, unknown
from lexel.kernels import oracle, tiled
from lexel.kernels.problem import Problem
from lexel.kernels.search import WIDTH, minus_squares, near_codes

Implementation = Literal["oracle", "tiled", "triton", "auto"]
IMPLEMENTATIONS = ("oracle", "tiled", "triton", "auto")
Similarity = Literal["dot", "l2", "cosine"]
SIMILARITIES = ("dot", "l2", "cosine")


def index_backpropagation(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 0.01,
    implementation: str = "auto",
    similarity: str = "dot",
    entropy: bool = True,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Quantizes rows z (N, D) by a codebook (K, D) with the straight-through estimator on the one-hot over all codes.

    The value of z_q is the chosen code; its gradient is that of softmax(logits / temperature) @ codebook in the
    softmax, and reaches the chosen code beside it. Logits are z.e ("dot"), -|z - e|^2 ("l2") or the cosine of the
    angle ("cosine"). The pass can be run backward more than once; there are no second derivatives.

    Args:
        temperature: of the softmax that carries z_q's gradient, above 0.
        entropy_temperature: of the softmax whose entropies are returned, above 0.
        implementation: "tiled" runs anywhere without a tensor of N x K; "triton" needs CUDA; "auto" chooses;
            "oracle" is the plain dense computation, for tests.
        entropy: False leaves out both entropy terms and their cost.
        rows: how many rows the tiled backward pass takes at a time; it holds two buffers of rows x K. Fewer save
            memory and cost time.

    Returns:
        z_q (N, D), indices int64 (N,), and scalars: `quantization` (mean squared error, gradient to both sides and
        through the softmax), `commitment` (the same value, moves z), `codebook` (the same value, moves the chosen
        code), `entropy_sample` (mean entropy of the rows), `entropy_batch` (entropy of the mean row). At least
        float32, whatever autocast says.

    Raises:
        UsageError: shapes do not fit, the batch is empty, a temperature is not above 0, or a name is unknown.
    """
    _check(z, codebook)
    for name, value in (("temperature", temperature), ("entropy_temperature", entropy_temperature)):
        if not value > 0:
            raise UsageError(f"{name} must be above 0, got {value}")
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)
    if rows is not None and rows < 1:
        raise UsageError(f"rows must be at least 1, got {rows}")
    implementation = _choose(implementation, z)

    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.to(dtype), codebook.to(dtype)
        queries, keys, distance = _as_scores(z, codebook, similarity)
        problem = Problem(
            queries,
            keys,
            None if keys is codebook else codebook,
            distance,
            temperature,
            entropy_temperature,
            entropy,
            rows or tiled.rows_at_a_time(len(keys), z.is_cuda),
        )
        if implementation == "oracle":
            z_q, chosen, indices, sample, batch = oracle.index_backpropagation(problem)
        else:
            z_q, chosen, indices, sample, batch, *_ = _forward(*problem, implementation)
        terms = {
            "quantization": F.mse_loss(z_q, z),
            "commitment": F.mse_loss(z, chosen.detach()),
            "codebook": F.mse_loss(chosen, z.detach()),
        }
        if entropy:
            terms |= {"entropy_sample": sample, "entropy_batch": batch}
    return z_q, indices, terms


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor, similarity: str = "l2", implementation: str = "auto") -> Tensor:
    """The index of the best row of codebook (K, D) for each row of z (N, D): int64 (N,).

    Decided in exact arithmetic on the inputs as they come in (under autocast too); ties go to the lowest index.

    Args:
        similarity: "l2" takes the smallest distance, "dot" the largest product, "cosine" the smallest angle.
        implementation: as in `index_backpropagation`.

    Raises:
        UsageError: shapes do not fit, the batch is empty, or a name is unknown.
    """
    _check(z, codebook)
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)
    implementation = _choose(implementation, z)
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        queries, keys, distance = _as_scores(z.to(dtype), codebook.to(dtype), similarity)
        if implementation == "oracle":
            return oracle.nearest(queries, keys, distance)
        return _search(queries, keys, distance, implementation)


def _as_scores(z: Tensor, codebook: Tensor, similarity: str) -> tuple[Tensor, Tensor, bool]:
    """Queries and keys whose products are the logits, up to a constant in each row; True: -|keys|^2 is to be added."""
    if similarity == "dot":
        return z, codebook, False
    if similarity == "cosine":
        return F.normalize(z, dim=1), F.normalize(codebook, dim=1), False
    # -|z - e|^2 = 2 z.e - |e|^2 - |z|^2; neither a softmax over codes nor its entropy sees the last term.
    return 2 * z, codebook, True


def _check(z: Tensor, codebook: Tensor) -> None:
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


def _choose(implementation: str, z: Tensor) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "triton":
        if not (z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise UsageError(f"implementation 'triton' needs a CUDA device, got {z.device}; use 'tiled'")
        if z.dtype == torch.float64:
            raise UsageError("implementation 'triton' computes in float32, got float64; use 'tiled'")
        if find_spec("triton") is None:
            raise UsageError("implementation 'triton' needs the triton package; install it or use 'tiled'")
    # The kernels have not been timed on a GPU yet: until they are shown to be faster, tiles are the choice everywhere.
    return "tiled" if implementation == "auto" else implementation


@torch.library.custom_op("lexel::search", mutates_args=())
def _search(queries: Tensor, keys: Tensor, distance: bool, implementation: str) -> Tensor:
    bias = minus_squares(keys) if distance else None
    return near_codes(queries, keys, bias, implementation=implementation).best


@_search.register_fake
def _(queries: Tensor, keys: Tensor, distance: bool, implementation: str) -> Tensor:
    return queries.new_empty(len(queries), dtype=torch.int64)


# Custom operators are opaque to torch.compile: the step around them compiles without a graph break.
@torch.library.custom_op("lexel::index_backpropagation", mutates_args=())
def _forward(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor | None,
    distance: bool,
    temperature: float,
    entropy_temperature: float,
    entropy: bool,
    rows: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(queries, keys, codes, distance, temperature, entropy_temperature, entropy, rows)
    found = tiled.forward(problem, implementation)
    z_q = F.embedding(found.indices, keys if codes is None else codes)
    return z_q, z_q.clone(), *found


@_forward.register_fake
def _(queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy: bool = rest[4]
    n, size = len(queries), len(keys)
    listed = (n, WIDTH) if entropy else (0,)
    return (
        torch.empty_like(queries),
        torch.empty_like(queries),
        queries.new_empty(n, dtype=torch.int64),
        queries.new_empty(()),
        queries.new_empty(()),
        queries.new_empty((n, WIDTH) if entropy else (0, WIDTH), dtype=torch.int64),
        queries.new_empty(listed, dtype=torch.float64),
        queries.new_empty(size if entropy else 0, dtype=torch.float64),
        queries.new_empty(n if entropy else 0, dtype=torch.bool),
    )


@torch.library.custom_op("lexel::index_backpropagation_backward", mutates_args=())
def _backward(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor | None,
    distance: bool,
    temperature: float,
    entropy_temperature: float,
    entropy: bool,
    rows: int,
    implementation: str,
    found: list[Tensor],
    soft: Tensor | None,
    hard: Tensor | None,
    sample: Tensor | None,
    batch: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(queries, keys, codes, distance, temperature, entropy_temperature, entropy, rows)
    gradients = tiled.backward(problem, tiled.Found(*found), soft, hard, sample, batch, implementation)
    return gradients.queries, gradients.keys, gradients.codes


@_backward.register_fake
def _(queries: Tensor, keys: Tensor, codes: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_codes = queries.new_empty(0) if codes is None else torch.empty_like(codes)
    return torch.empty_like(queries), torch.empty_like(keys), d_codes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, codes, *ctx.options = inputs
    ctx.save_for_backward(queries, keys, codes, *output[2:])
    ctx.mark_non_differentiable(output[2], *output[5:])
    ctx.set_materialize_grads(False)  # a loss of one term pays for that term only


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    z_q, chosen, _, sample, batch = grads[:5]
    queries, keys, codes, *found = ctx.saved_tensors
    hard = z_q if chosen is None else chosen if z_q is None else z_q + chosen
    d_queries, d_keys, d_codes = _backward(queries, keys, codes, *ctx.options, found, z_q, hard, sample, batch)
    return d_queries, d_keys, None if codes is None else d_codes, *[None] * len(ctx.options)


_forward.register_autograd(_gradients, setup_context=_setup)
