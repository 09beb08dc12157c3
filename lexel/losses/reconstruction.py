"""How far two sets of images are apart, value by value."""

from torch import Tensor
from torch.nn import functional as F

from lexel.losses.precision import at_least_float32


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over every value of two tensors of equal shape: a scalar."""
    return F.l1_loss(at_least_float32(a), at_least_float32(b))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over every value of two tensors of equal shape: a scalar."""
    return F.mse_loss(at_least_float32(a), at_least_float32(b))
