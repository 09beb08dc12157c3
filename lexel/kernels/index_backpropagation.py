"""Index backpropagation (https://arxiv.org/abs/2412.02692): one call, three implementations."""

from typing import Any

import torch
from torch import Tensor

from lexel.distributed import processes
from lexel.errors import UsageError, unknown
from lexel.kernels import oracle, passes, tiled
from lexel.kernels.inputs import (
    PRODUCTS,
    Implementation,
    Inputs,
    OnRows,
    Products,
    Similarity,
    as_scores,
    check_rows,
    check_similarity,
    choose_implementation,
    differentiable_once,
    incoming,
    is_traced,
    loss_terms,
)


def index_backpropagation(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 0.01,
    implementation: Implementation = "auto",
    similarity: Similarity = "dot",
    entropy: bool = True,
    rows: int | None = None,
    entropy_parts: int = 1,
    entropy_processes: int = 1,
    products: Products = "float32",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Quantizes rows z (N, D) by a codebook (K, D) with the straight-through estimator on the one-hot over all codes.

    The value of z_q is the chosen code; its gradient is that of softmax(logits / temperature) @ codebook in the
    softmax, and reaches the chosen code beside it. Logits are z.e ("dot"), -|z - e|^2 ("l2") or the cosine of the
    angle ("cosine"). The pass can be run backward more than once; only the oracle has second derivatives.

    Args:
        temperature: of the softmax that carries z_q's gradient, above 0.
        entropy_temperature: of the softmax whose entropies are returned, above 0.
        implementation: "tiled" runs anywhere without a tensor of N x K; "triton" needs CUDA; "auto" chooses;
            "oracle" is the plain dense computation, for tests.
        entropy: False leaves out both entropy terms and their cost.
        rows: how many rows the tiled backward pass takes at a time; it holds two buffers of rows x K. Fewer save
            memory and cost time; with 24 or fewer a CPU makes two passes over the codes and holds no such buffer.
        entropy_parts: into how many equal consecutive parts the rows are divided for the batch entropy, which is then
            the mean over the parts; it divides N.
        entropy_processes: how many consecutive processes share a batch entropy, a divisor of their number; above 1 all
            processes have to make the call.
        products: the precision of the matrix products of the gradient through the softmax. "bf16" rounds their
            operands to bfloat16 and sums in float32, which puts the gradients of z and of the codebook some 0.5 % from
            the exact ones (up to 40 % where logits are in the hundreds); indices, z_q and all terms stay as they are.
            Inputs in float64 are never rounded.

    Returns:
        z_q (N, D), indices int64 (N,), and scalars: `quantization` (mean squared error, gradient to both sides and
        through the softmax), `commitment` (the same value, moves z), `codebook` (the same value, moves the chosen
        code), `entropy_sample` (mean entropy of the rows), `entropy_batch` (entropy of the mean row). At least
        float32, whatever autocast says.

    Raises:
        UsageError: shapes do not fit, the batch is empty, a temperature is not above 0, or a name is unknown; on a
            second derivative, and under torch.func's vmap and jvp.
    """
    check_rows(z, codebook)
    for name, value in (("temperature", temperature), ("entropy_temperature", entropy_temperature)):
        if not value > 0:
            raise UsageError(f"{name} must be above 0, got {value}")
    check_similarity(similarity)
    if rows is not None and rows < 1:
        raise UsageError(f"rows must be at least 1, got {rows}")
    if entropy_parts < 1 or len(z) % entropy_parts:
        raise UsageError(f"entropy_parts must divide the {len(z)} rows, got {entropy_parts}")
    if entropy_processes < 1 or processes() % entropy_processes:
        raise UsageError(f"entropy_processes must divide the {processes()} processes, got {entropy_processes}")
    if products not in PRODUCTS:
        raise unknown("products", products, PRODUCTS)
    chosen_implementation = choose_implementation(implementation, z)

    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.to(dtype), codebook.to(dtype)
        queries, keys, distance = as_scores(z, codebook, similarity)
        inputs = Inputs(
            queries,
            keys,
            None if keys is codebook else codebook,
            distance,
            temperature,
            entropy_temperature,
            entropy,
            rows or tiled.rows_at_a_time(len(keys), z.is_cuda),
            entropy_parts,
            entropy_processes,
            products == "bf16" and dtype == torch.float32,
        )
        if chosen_implementation == "oracle":
            z_q, chosen, indices, sample, batch = oracle.index_backpropagation(inputs)
        elif is_traced(queries, keys):
            from lexel.kernels import operators

            z_q, chosen, indices, sample, batch, *_ = operators.index_backpropagation(*inputs, chosen_implementation)
        else:
            z_q, chosen, indices, sample, batch, *_ = _IndexBackpropagation.apply(*inputs, chosen_implementation)
        terms = loss_terms(z, z_q, chosen)
        if entropy:
            terms |= {"entropy_sample": sample, "entropy_batch": batch}
    return z_q, indices, terms


class _IndexBackpropagation(OnRows):
    NAME = passes.NAME

    forward = staticmethod(passes.forward)
    setup_context = staticmethod(passes.keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, codes, *state = ctx.saved_tensors
        given = incoming(grads)
        with torch.no_grad():
            d_queries, d_keys, d_codes = passes.backward(queries, keys, codes, *ctx.options, state, *given)
        gradients = (d_queries, d_keys, None if codes is None else d_codes)
        return *differentiable_once(passes.NAME, gradients, (queries, keys, codes, *given)), *[None] * len(ctx.options)
