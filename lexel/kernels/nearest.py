"""The search as callers see it: one call, with autograd, torch.func and torch.compile told what it is."""

from typing import Any, cast

import torch
from torch import Tensor

from lexel.kernels import oracle
from lexel.kernels.inputs import (
    Implementation,
    Similarity,
    as_scores,
    check_rows,
    check_similarity,
    choose_implementation,
    is_traced,
)
from lexel.kernels.search import best_codes


@torch.no_grad()
def nearest(
    z: Tensor, codebook: Tensor, similarity: Similarity = "l2", implementation: Implementation = "auto"
) -> Tensor:
    """The index of the best row of codebook (K, D) for each row of z (N, D): int64 (N,).

    Decided in exact arithmetic on the inputs as they come in (under autocast too); ties go to the lowest index.

    Args:
        similarity: "l2" takes the smallest distance, "dot" the largest product, "cosine" the smallest angle.
        implementation: as in `index_backpropagation`.

    Raises:
        UsageError: shapes do not fit, the batch is empty, or a name is unknown.
    """
    check_rows(z, codebook)
    check_similarity(similarity)
    chosen = choose_implementation(implementation, z)
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        queries, keys, distance = as_scores(z.to(dtype), codebook.to(dtype), similarity)
        if chosen == "oracle":
            return oracle.nearest(queries, keys, distance)
        if is_traced(queries, keys):
            from lexel.kernels import operators

            return cast(Tensor, operators.search(queries, keys, distance, chosen))
        indices: Tensor = _Search.apply(queries, keys, distance, chosen)
        return indices


class _Search(torch.autograd.Function):
    """The search as torch.func sees it: it has no derivative, and under vmap each member is searched by itself."""

    forward = staticmethod(best_codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], queries: Tensor, keys: Tensor, *rest: Any) -> Any:
        parts = [
            [part] * info.batch_size if dim is None else list(part.unbind(dim))
            for part, dim in zip((queries, keys), in_dims, strict=False)
        ]
        found = [_Search.apply(each, table, *rest) for each, table in zip(*parts, strict=True)]
        return torch.stack(found), 0

    @staticmethod
    def jvp(ctx: Any, *args: Any) -> None:
        return None
