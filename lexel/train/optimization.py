"""Parts of a training step: optimizer steps, weight averages, running means, seeds. None of them waits for the device.

(A GradScaler does, under fp16: whether a gradient overflowed decides whether the optimizer steps.)
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lexel.distributed import all_sum


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes every random number of a step a function of (seed, step, rank): nothing to save, nothing to lose."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def fused(device: torch.device, precision: str) -> bool | None:
    """Whether Adam updates a parameter in one pass on a device, for its argument `fused`; None is PyTorch's choice.

    On a CPU that takes a quarter off a step of a generator, and little off a tokenizer's; it is left out under fp16,
    whose scaler hands a fused optimizer what one cannot take that goes on from a run begun without. Such a run goes on
    as it began: the optimizer's state says how.
    """
    return True if device.type == "cuda" or (device.type == "cpu" and precision != "fp16") else None


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    clip: float | None,
    spread: Sequence[nn.Parameter] = (),
) -> Tensor:
    """One step on the gradients at hand, skipped by the scaler when half precision overflowed; returns their norm.

    `spread` are those of `parameters` of which every process has other rows: the norm is that of all rows.
    """
    scaler.unscale_(optimizer)
    parameters = list(parameters)
    rows = {id(parameter) for parameter in spread}
    norm = nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None and id(parameter) not in rows]
    )
    own = [parameter.grad for parameter in spread if parameter.grad is not None]
    if own:
        squares = all_sum(nn.utils.get_total_norm(own).double().square())
        norm = (norm.double().square() + squares).sqrt().to(norm.dtype)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    scaler.step(optimizer)
    scaler.update()
    torch.autograd.graph.increment_version(parameters)  # what keeps copies of weights looks at it; fused steps forget
    return norm


def to_device(tensor: Tensor, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """A tensor on the device; from the CPU to a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda", memory_format=layout)


class WeightAverage(nn.Module):
    """An exponential average of the parameters of a model; buffers are copied, not averaged.

    The average begins as the weights do, as published. `warm_up` lowers the decay to (1 + n) / (10 + n) at the n-th
    update, which suits runs of a few hundred steps. `torch.optim.swa_utils.AveragedModel` computes the same and has
    the same state, but asks the device for its counter at every update.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float, warm_up: bool = False) -> None:
        super().__init__()
        self.decay, self.warm_up = decay, warm_up
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.updates = 1
        self.register_buffer("n_averaged", torch.ones((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(WeightAverage._count)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the weights of a step in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.updates += 1
        self.n_averaged += 1

    @staticmethod
    def _count(average: nn.Module, _: Any) -> None:
        """Takes the number of updates from a state that was loaded."""
        assert isinstance(average, WeightAverage)
        average.updates = int(average.n_averaged)


class RunningMeans:
    """Means of named scalars since the last `take`; sums stay on their device, so that adding never waits."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            value = value.float() if value.device.type == "mps" else value.double()  # Apple's GPUs have no float64
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self) -> dict[str, Tensor]:
        """The means as scalars on their device, which begin anew."""
        means = self.tensors()
        self.sums, self.counts = {}, {}
        return means

    def tensors(self) -> dict[str, Tensor]:
        """The means as scalars on their device."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Gradients pass through the module but are not gathered in it."""
    parameters = list(module.parameters()) if module is not None else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def set_layout(module: nn.Module, channels_last: bool) -> None:
    """Lays the weights of convolutions out for channels-last images, which is faster on some devices."""
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
