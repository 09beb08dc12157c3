"""The share of tokens whose codes have not been seen yet (Good-Turing, Biometrika 40, 1953)."""

import torch

from lexel.evaluate.metric import Batch, Context, Metric, Values
from lexel.metrics.intervals import Interval
from lexel.metrics.unseen import NORMAL, CodeIncidence


class UnseenCodes(Metric):
    """Estimates of the codes that further pictures like these would use: `lexel.metrics.unseen`.

    `unseen_share` is the share of their tokens that are codes not seen yet, `reachable_codes` a lower bound of the
    number of codes that they show at all.
    """

    needs = frozenset({"indices"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.codebook_size is not None
        self.states = {"codes": CodeIncidence(context.codebook_size, context.books)}

    def update(self, batch: Batch) -> None:
        assert batch.indices is not None
        self.states["codes"].add(batch.indices, batch.numbers.to(torch.int64))

    def compute(self) -> Values:
        unseen = self.states["codes"].unseen()
        values = Values()
        for name, middle, low, high in (
            ("unseen_share", unseen.share, unseen.share_low, unseen.share_high),
            ("reachable_codes", unseen.reachable, unseen.reachable_low, unseen.reachable_high),
        ):
            values.metrics[name] = middle
            values.intervals[name] = Interval(low, high, (high - low) / 2 / NORMAL)._asdict()
        return values
