"""Codebook usage and perplexity: the definitions behind published numbers, which do not agree.

`usage` without a further word is distinct codes over a whole data set / K (`CodeHistogram`). The others here are what
other code bases print under the same name, and how they differ:

- the last 65,536 tokens, starting from zeros (LlamaGen, FVQ in training): cannot exceed 25 % at K = 262,144;
- codes whose moving average of hits is above 8 % of a uniform one (VAR): forgets, and depends on the batch size;
- codes above 1 % of uniform within one batch (UniTok): depends on the batch size still more.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.metrics.states import merge_processes, restored


class WindowUsage:
    """Distinct codes among the last tokens of a data set, in the order of the sample numbers.

    The published queue starts filled with zeros, so that code 0 counts as used until the window is full.

    Args:
        codebook_size: number of codes, K.
        window: tokens that the queue holds.
    """

    def __init__(self, codebook_size: int, window: int = 65536) -> None:
        self.codebook_size = codebook_size
        self.window = window
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, indices: Tensor, numbers: Tensor) -> None:
        """Adds the indices (B, *grid) of the samples with these numbers, int64 (B,)."""
        self._keep(numbers.cpu(), indices.flatten(1).cpu())

    def merge(self, other: "WindowUsage") -> None:
        self._keep(other._numbers, other._tokens)

    def all_reduce(self) -> None:
        """Adds the tokens of every process."""
        merge_processes(self, lambda: WindowUsage(self.codebook_size, self.window))

    @property
    def usage(self) -> float:
        tokens = self._tokens.flatten()[-self.window :]
        distinct = set(tokens.unique().tolist()) | ({0} if len(tokens) < self.window else set())
        return len(distinct) / self.codebook_size

    def _keep(self, numbers: Tensor, tokens: Tensor) -> None:
        """Joins samples to those held and drops all that no longer reach into the window."""
        if not len(numbers):
            return
        if len(self._numbers):
            numbers, tokens = torch.cat([self._numbers, numbers]), torch.cat([self._tokens, tokens])
        reach = math.ceil(self.window / tokens.shape[1])
        order = numbers.argsort()[-reach:]
        self._numbers, self._tokens = numbers[order], tokens[order]

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self._numbers, "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        numbers, tokens = restored(
            state, "a window of tokens", numbers=(torch.int64, (None,)), tokens=(torch.int64, (None, None))
        )
        if len(numbers) != len(tokens):
            raise UsageError(f"a saved state of a window is damaged: {len(tokens)} rows have {len(numbers)} numbers")
        self._numbers, self._tokens = numbers, tokens
