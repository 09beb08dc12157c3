"""Which image stands at which place of a training, which crop it gets: functions of the seed alone."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np


class Positions:
    """Which picture stands at each position of the endless sequence: one permutation after another.

    Args:
        count: pictures in the set.
        seed: the order.
        window: neighbours that are shuffled among each other; all of them by default.
    """

    def __init__(self, count: int, seed: int, window: int | None = None) -> None:
        self.count = count
        self.seed = seed
        self.window = window
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Epoch and picture number of a position."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            order = permutation(self.count, self.seed, epoch, self.window)
            # Every process that reads has it: half the bytes where they are enough.
            self._epoch, self._order = epoch, order.astype(np.min_scalar_type(self.count), copy=False)
        return epoch, int(self._order[place])


def permutation(count: int, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """The order of an epoch: int64 (count,). Made of raw random bits, so that no library's version can change it.

    With a window only so many neighbours are shuffled among each other, one window after another.
    """
    bits = np.random.Philox(key=_key(seed, epoch, purpose=0)).random_raw(count)
    if window is None:
        return np.argsort(bits, kind="stable")
    return np.lexsort((bits, np.arange(count) // window))


def crop_generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The random stream for the crop of one picture in one epoch."""
    key = _key(seed, epoch, purpose=1)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, number], np.uint64)))


def crop_choices(count: int, crops: int, seed: int) -> Callable[[int, int], int]:
    """(epoch, picture number) to one of `crops` prepared versions of the picture: a function of the seed alone."""
    if crops == 1:
        return lambda epoch, number: 0

    @lru_cache(maxsize=2)  # a batch may lie in two epochs
    def choices(epoch: int) -> np.ndarray:
        return np.random.Philox(key=_key(seed, epoch, purpose=2)).random_raw(count) % np.uint64(crops)

    return lambda epoch, number: int(choices(epoch)[number])


def _key(seed: int, epoch: int, purpose: int) -> np.ndarray:
    return np.array([seed % 2**64, 4 * epoch + purpose], np.uint64)
