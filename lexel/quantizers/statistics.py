"""Over which images a batch statistic is taken: those of a process, of all processes, or a fixed number of them."""

from typing import Literal, NamedTuple

import torch

from lexel.distributed import processes
from lexel.errors import UsageError

Statistics = int | Literal["process", "global"]


class Groups(NamedTuple):
    """Groups of a process's batch."""

    parts: int  # equal consecutive parts of the batch, each a group of its own
    together: int  # consecutive processes whose batches make up one group; above 1 they have to talk to each other


def check_statistics(given: Statistics) -> Statistics:
    """`given` if it is "process", "global" or a number of images; a clear error otherwise."""
    if given in ("process", "global") or (isinstance(given, int) and not isinstance(given, bool) and given >= 1):
        return given
    raise UsageError(f"statistics must be 'process', 'global' or a number of images, at least 1, got {given!r}")


def groups(statistics: Statistics, images: int, training: bool) -> Groups:
    """The groups of `images` images of this process.

    A number of images gives the same groups on any number of processes that see the same batch in the order of their
    ranks. Without training or gradients nothing is learned from the term: the batch is then one group, and processes
    do not talk to each other, so that any of them may evaluate alone.

    Raises:
        UsageError: batches of this size cannot be divided into groups, or put together to groups, of that number.
    """
    if statistics == "process" or not (training and torch.is_grad_enabled()):
        return Groups(1, 1)
    if statistics == "global":
        return Groups(1, processes())
    assert isinstance(statistics, int)
    if images % statistics == 0:
        return Groups(images // statistics, 1)
    if statistics % images == 0 and processes() % (statistics // images) == 0:
        return Groups(1, statistics // images)
    raise UsageError(
        f"statistics over {statistics} images cannot be taken from {processes()} x {images} images a step; "
        f"choose a batch size of which {statistics} is a divisor, or statistics = 'process' or 'global'"
    )
