"""Tables of codes spread over processes: each holds, and trains, a share of neighbouring codes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lexel.distributed import all_rows
from lexel.errors import UsageError
from lexel.kernels.sharded import share_of_codes
from lexel.quantizers.base import Quantizer


def shard(quantizer: Quantizer) -> None:
    """Leaves a quantizer the codes that this process is to hold; from then on all processes call it together.

    Its `forward`, `assign` and `indices_to_codes` go on to be about all codes (`lexel.kernels.sharded`).

    Raises:
        UsageError: the method cannot, or the processes cannot share its codes evenly.
    """
    if not quantizer.can_be_sharded:
        raise UsageError(
            f"codes of {type(quantizer).__name__} cannot be spread over processes; those of vq and ibq can be"
        )
    if quantizer.restart_below > 0:
        raise UsageError("codes that are spread over processes do not restart; set quantizer.restart_below = 0")
    if quantizer.clustering:
        raise UsageError("codes that are spread over processes do not cluster; set quantizer.clustering = false")
    share = share_of_codes(quantizer.codebook_size)
    _replace(quantizer, _weight(quantizer).detach()[share.start : share.stop].clone())
    quantizer.sharded = True


def gather(quantizer: Quantizer) -> None:
    """Gives a quantizer all its codes back, in every process; undoes `shard`."""
    if quantizer.sharded:
        _replace(quantizer, all_rows(_weight(quantizer).detach()))
        quantizer.sharded = False


@contextmanager
def whole(quantizer: Quantizer) -> Iterator[None]:
    """A quantizer with all its codes for as long as the block takes, so that any process may call it alone."""
    if not quantizer.sharded:
        yield
        return
    share = _weight(quantizer)
    gather(quantizer)
    try:
        yield
    finally:
        quantizer.weight = share
        quantizer.sharded = True


def _weight(quantizer: Quantizer) -> nn.Parameter:
    assert isinstance(quantizer.weight, nn.Parameter)
    return quantizer.weight


def _replace(quantizer: Quantizer, rows: torch.Tensor) -> None:
    quantizer.weight = nn.Parameter(rows, requires_grad=_weight(quantizer).requires_grad)
