"""The base of the generators' networks: a condition, and blocks whose activations may be recomputed."""

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lexel.conditions import Condition
from lexel.errors import UsageError
from lexel.generators.config import NetworkConfig


def chosen_layers(asked: int | None, there: int, default: int | None = None) -> int:
    """After how many blocks hidden states are taken: what is asked for, or the default; half of them by default.

    Raises:
        UsageError: there are not so many blocks.
    """
    if asked is not None and not 1 <= asked <= there:
        raise UsageError(f"layers must be in [1, {there}], the generator's blocks; got {asked}")
    if asked is None:
        return (there + 1) // 2 if default is None else default
    return asked


class ConditionedNetwork(nn.Module):
    """A network with a condition.

    Args:
        config: of the family.
        width: channels of the condition's rows.
    """

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.config = config
        condition = config.make_condition(width)
        self.condition_name = condition.name
        self.add_module(condition.name, condition)
        # Recompute the activations of every block in the backward pass: the memory of one block, a third more time.
        self.checkpointing = False

    @property
    def condition(self) -> Condition:
        """The condition's module, which has another name for each kind."""
        return cast(Condition, self.get_submodule(self.condition_name))

    def pooled(self, prepared: Tensor) -> Tensor:
        """One vector an image, (B, width), of a checked condition; in training it is dropped to the null condition."""
        return self.vector(self.condition.drop(prepared))

    def vector(self, prepared: Tensor) -> Tensor:
        """`pooled`, with no condition dropped: for sampling."""
        return self.condition.pooled(self.condition(prepared))[:, 0]

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """A block's output; recomputed in the backward pass where `checkpointing` says so."""
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
