"""What index backpropagation is asked: the inputs that its implementations share."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """What is asked: the inputs of both passes."""

    queries: Tensor  # (N, D), float32 or float64
    keys: Tensor  # (K, D)
    codes: Tensor | None  # (K, D), what z_q is made of; None where the keys are the codes
    distance: bool  # logits are queries @ keys.T - |keys|^2
    temperature: float
    entropy_temperature: float
    entropy: bool
    rows: int  # rows of the backward pass at a time; it holds two buffers of rows x K
