"""The codebook of a training, spread over the processes with its gradient, its average and its optimizer state.

A checkpoint holds the whole of each, as without: a run may go on on another number of processes, spread or not.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lexel.distributed import all_rows
from lexel.kernels.sharded import share_of_codes
from lexel.quantizers.sharding import gather, shard, whole
from lexel.tokenizer import Tokenizer

NAME = "quantizer.weight"
PLACES = {"model": NAME, "average": f"module.{NAME}"}  # where checkpoints have the table


class SpreadCodebook:
    """Spreads the codes of a tokenizer, before its average and its optimizer are made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        shard(tokenizer.quantizer)
        self._tokenizer = tokenizer

    @property
    def parameter(self) -> nn.Parameter:
        """This process's codes."""
        assert isinstance(self._tokenizer.quantizer.weight, nn.Parameter)
        return self._tokenizer.quantizer.weight

    def gathered(self, state: dict[str, Any], number: int | None) -> dict[str, Any]:
        """A training state with the whole table, from that of each process.

        Args:
            state: by part; the tables in it are shares.
            number: of the table among the optimizer's parameters; None where it does not learn.
        """
        for part, name in PLACES.items():
            state[part] = {**state[part], name: all_rows(state[part][name])}
        return {**state, "optimizer": _of_table(state["optimizer"], number, all_rows)}

    def own(self, state: Mapping[str, Any], number: int | None) -> dict[str, Any]:
        """This process's share of a training state with the whole table."""
        share = share_of_codes(self._tokenizer.quantizer.codebook_size)

        def cut(rows: Tensor) -> Tensor:
            return rows[share.start : share.stop]

        found = dict(state)
        for part, name in PLACES.items():
            if name in state[part]:  # else loading says that it is missing
                found[part] = {**state[part], name: cut(state[part][name])}
        return {**found, "optimizer": _of_table(state["optimizer"], number, cut)}

    @contextmanager
    def whole(self, *tokenizers: Tokenizer) -> Iterator[None]:
        """Tokenizers with all their codes for a while."""
        with ExitStack() as stack:
            for tokenizer in tokenizers:
                stack.enter_context(whole(tokenizer.quantizer))
            yield

    def end(self, *tokenizers: Tokenizer) -> None:
        """Gives tokenizers all their codes for good."""
        for tokenizer in tokenizers:
            gather(tokenizer.quantizer)


def _of_table(optimizer: dict[str, Any], number: int | None, change: Any) -> dict[str, Any]:
    """An optimizer's state with what it keeps for the table, such as moments, changed; scalars stay."""
    states = dict(optimizer["state"])
    if number in states:
        states[number] = {
            name: change(value) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            for name, value in states[number].items()
        }
    return {**optimizer, "state": states}
