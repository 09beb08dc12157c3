"""Shapes of results on the meta device, by rules of their own: PyTorch's rules import its compiler, two seconds.

What has no rule here is asked of PyTorch, so that a network of any operations has shapes; only the time differs.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.logical_not, aten.logical_and}
COPIES = {aten.clone, aten._to_copy}  # PyTorch has them without its compiler
OF_INTEGERS = {
    aten.add,
    aten.sub,
    aten.rsub,
    aten.mul,
    aten.neg,
    aten.where,
    aten.clamp,
    aten.remainder,
}  # which stay integers


class Uncompiled(TorchDispatchMode):
    """A mode that no compiled code meets. PyTorch guards others from its compiler, which it imports to do so."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Shapes(Uncompiled):
    """Operations on meta tensors give tensors of the right shape, type and layout, and nothing is imported."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        operation = func.overloadpacket
        tensors = [each for each in tree_leaves(list(args)) if isinstance(each, Tensor)]
        if all(tensor.is_meta for tensor in tensors):
            if operation in RULES:
                result = RULES[operation](*args, **kwargs)
                if result is not NotImplemented:
                    return result
            elif tensors and torch.Tag.pointwise in func.tags and operation not in COPIES and "out" not in kwargs:
                if func._schema.is_mutable:
                    return args[0]
                if (dtype := pointwise_type(operation, tensors, args)) is not None:
                    return pointwise(tensors, dtype)
        return func(*args, **kwargs)


def pointwise_type(operation: Any, tensors: Sequence[Tensor], args: Sequence[Any]) -> torch.dtype | None:
    """The type of a pointwise result; None where PyTorch must be asked."""
    if operation in COMPARISONS:
        return torch.bool
    if any(tensor.is_complex() for tensor in tensors):
        return None
    if operation is aten.where:
        tensors = tensors[1:]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floats and (operation not in OF_INTEGERS or any(isinstance(each, float) for each in args)):
        return None
    axes = [tensor for tensor in floats or tensors if tensor.ndim] or floats or list(tensors)  # a 0-d tensor yields
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in axes)) if axes else None


def pointwise(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A result of broadcast shape, with its axes in memory in the order of the first input of that shape."""
    shape = broadcast([tensor.shape for tensor in tensors])
    for tensor in tensors:
        if tensor.shape == shape and 0 not in tensor.stride():
            return torch.empty_strided(shape, dense_strides(tensor), dtype=dtype, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")


def broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of several together: of every axis, counted from the last, the size that is not 1."""
    sizes = itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return tuple(next((size for size in axis if size != 1), 1) for axis in sizes)[::-1]


def dense_strides(tensor: Tensor) -> list[int]:
    """The strides of a tensor without gaps whose axes lie in memory in the order of this one's."""
    strides, step = [0] * tensor.ndim, 1
    for axis in sorted(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), tensor.shape[axis], -axis)):
        strides[axis], step = step, step * tensor.shape[axis]
    return strides


def like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of another shape."""
    return torch.empty(shape, dtype=dtype or x.dtype, device="meta")


def same(x: Tensor, *_: Any, dtype: torch.dtype | None = None, memory_format: Any = None, **__: Any) -> Any:
    """A tensor of the same shape and layout."""
    return NotImplemented if memory_format not in (None, torch.preserve_format) else pointwise([x], dtype or x.dtype)


def pixels(x: Tensor, *shape: int) -> Tensor:
    """A tensor of another shape, channels-last where x is, as on every device; PyTorch's own rules forget it."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if x.ndim != weight.ndim:
        return NotImplemented
    options = [[*each, *[each[-1]] * weight.ndim] for each in (stride, padding, dilation, output_padding)]
    sizes = []
    for size, kernel, step, pad, spread, more in zip(x.shape[2:], weight.shape[2:], *options, strict=False):
        reach = spread * (kernel - 1)
        sizes.append(
            (size - 1) * step - 2 * pad + reach + more + 1 if transposed else (size + 2 * pad - reach - 1) // step + 1
        )
    channels = weight.shape[1] * groups if transposed else len(weight)
    if min(sizes) < 1:
        return NotImplemented  # PyTorch has the words for it
    return pixels(x, len(x), channels, *sizes)


def group_norm(x: Tensor, weight: Any, bias: Any, n: int, channels: int, pixels: int, groups: int, eps: float) -> Any:
    return same(x), like(x, n, groups), like(x, n, groups)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    kept = (*x.shape[: x.ndim - len(shape)], *(1 for _ in shape))
    return like(x, *x.shape), like(x, *kept), like(x, *kept)


def batch_norm(x: Tensor, *rest: Any) -> Any:
    return (same(x), like(x, x.shape[1]), like(x, x.shape[1])) if rest[4] else NotImplemented  # in training


def negative_log_likelihood(x: Tensor, target: Tensor, weight: Any, reduction: int, ignored: int) -> Any:
    return like(x, *(target.shape if reduction == 0 else ())), like(x)


def counted(*bounds: float, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any) -> Any:
    if device is None or device.type != "meta":
        return NotImplemented
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    whole = torch.int64 if all(isinstance(each, int) for each in bounds) else torch.get_default_dtype()
    return torch.empty(max(0, math.ceil((end - start) / step)), dtype=dtype or whole, device="meta")


def matrix_product(a: Tensor, b: Tensor) -> Any:
    if a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        return NotImplemented
    return like(a, *a.shape[:-1], b.shape[-1])


def plus_product(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Any:
    return matrix_product(a, b)


def softmax(x: Tensor, dim: int, *rest: Any) -> Any:
    return NotImplemented if rest and (rest[0] is True or isinstance(rest[0], torch.dtype)) else like(x, *x.shape)


def concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1 or len({tensor.ndim for tensor in tensors}) > 1:
        return NotImplemented
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return like(first, *shape)


def stacked(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        return NotImplemented
    shape = list(first.shape)
    shape.insert(dim if dim >= 0 else dim + first.ndim + 1, len(tensors))
    return like(first, *shape)


def reduced(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not (x.is_floating_point() or dtype):
        return NotImplemented
    axes = range(x.ndim) if dim is None or dim == [] else [axis % x.ndim for axis in dim]
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes]
    return like(x, *kept, dtype=dtype)


def max_pooled(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceiling: bool = False,
) -> Any:
    result = mean_pooled(x, kernel, stride, padding, ceiling)
    known = result is not NotImplemented and {*dilation} == {1}
    return (result, same(result, dtype=torch.int64)) if known else NotImplemented


def mean_pooled(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceiling: bool = False,
    *_: Any,
) -> Any:
    if ceiling or x.ndim != 4:
        return NotImplemented
    pairs = [[*each, *[each[-1]] * 2][:2] for each in (kernel, stride or kernel, padding)]
    sizes = [(size + 2 * pad - reach) // step + 1 for size, reach, step, pad in zip(x.shape[2:], *pairs, strict=True)]
    return pixels(x, *x.shape[:2], *sizes)


def upsampled(x: Tensor, size: Sequence[int], *_: Any) -> Any:
    return pixels(x, *x.shape[:2], *size)


def repeated(x: Tensor, times: Sequence[int]) -> Any:
    return like(x, *(size * count for size, count in zip((1,) * (len(times) - x.ndim) + x.shape, times, strict=True)))


def looked_up(table: Tensor, indices: Tensor, *_: Any) -> Any:
    return like(table, *indices.shape, table.shape[1])


RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution: convolution,
    aten.native_group_norm: group_norm,
    aten.native_layer_norm: layer_norm,
    aten.native_batch_norm: batch_norm,
    aten.nll_loss_forward: negative_log_likelihood,
    aten.arange: counted,
    aten.mm: matrix_product,
    aten.bmm: matrix_product,
    aten.addmm: plus_product,
    aten._softmax: softmax,
    aten._log_softmax: softmax,
    aten._safe_softmax: softmax,
    aten.cat: concatenated,
    aten.stack: stacked,
    aten.sum: reduced,
    aten.mean: reduced,
    aten.max_pool2d_with_indices: max_pooled,
    aten.avg_pool2d: mean_pooled,
    aten.upsample_nearest2d: upsampled,
    aten.embedding: looked_up,
    aten.repeat: repeated,
    aten.tril: same,
    aten.triu: same,
    aten.empty_like: same,
    aten.zeros_like: same,
    aten.ones_like: same,
    aten.full_like: same,
}
