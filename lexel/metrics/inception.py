"""The inception score, https://arxiv.org/abs/1606.03498: exp of the mean divergence of p(class | image) from p(class).

It needs no more than the sums of p and of p log p in each split. Which split a sample falls in is what implementations
differ by: contiguous blocks of the file's order (so that a class-sorted file scores far too low), or a shuffle.
"""

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.metrics.states import Sums


class ScoreState(Sums):
    """Sums of p and of p log p in float64, for each split and, within it, for each group (for the interval).

    Args:
        classes: number of classes.
        splits: number of splits the score is averaged over.
        groups: number of groups that can be left out; 1 where no interval is wanted.
    """

    what = "an inception score"
    parts = "n", "total", "negentropy"

    def __init__(self, classes: int, splits: int = 1, groups: int = 1) -> None:
        self.n = torch.zeros(splits, groups, dtype=torch.int64)
        self.total = torch.zeros(splits, groups, classes, dtype=torch.float64)  # sum of p
        self.negentropy = torch.zeros(splits, groups, dtype=torch.float64)  # sum over samples and classes of p log p

    def add(self, logits: Tensor, split: Tensor | None = None, group: Tensor | None = None) -> None:
        """Adds logits (B, classes); `split` and `group`, int64 (B,), say where each sample belongs (0 if None)."""
        log_p = logits.detach().to("cpu", torch.float64).log_softmax(1)
        zeros = torch.zeros(len(log_p), dtype=torch.int64)
        place = (zeros if split is None else split.cpu(), zeros if group is None else group.cpu())
        p = log_p.exp()
        self.n.index_put_(place, torch.ones_like(zeros), accumulate=True)
        self.total.index_put_(place, p, accumulate=True)
        # A class that cannot be (logit -inf) contributes 0, the limit of p log p.
        self.negentropy.index_put_(place, torch.where(p > 0, p * log_p, 0.0).sum(1), accumulate=True)

    def splits(self, without: int | None = None) -> Tensor:
        """The score of every split that has samples, float64; `without` leaves a group out."""
        n, total, negentropy = self.n.sum(1), self.total.sum(1), self.negentropy.sum(1)
        if without is not None:
            n, total = n - self.n[:, without], total - self.total[:, without]
            negentropy = negentropy - self.negentropy[:, without]
        filled = n > 0
        if not filled.any():
            raise UsageError("an inception score needs at least one sample, got none")
        marginal = total[filled].clamp(min=0) / n[filled, None]
        return (negentropy[filled] / n[filled] - torch.special.xlogy(marginal, marginal).sum(1)).exp()

    def score(self, without: int | None = None) -> float:
        """The mean over splits."""
        return float(self.splits(without).mean())


def contiguous_splits(samples: int, count: int | None = 10, size: int | None = None) -> Tensor:
    """The split of every sample number, int64 (samples,): blocks in the order of the file.

    Args:
        samples: how many samples there are.
        count: number of (nearly) equal splits, where `size` is None.
        size: samples a split, the last one shorter, as the ADM evaluator cuts (5,000).
    """
    numbers = torch.arange(samples)
    if size is not None:
        return numbers // size
    count = count or 1
    starts = torch.arange(1, count) * samples // count  # as torch-fidelity cuts where `count` does not divide `samples`
    return torch.bucketize(numbers, starts, right=True)


def shuffled(splits: Tensor, seed: int) -> Tensor:
    """The same splits dealt out in a random order that depends on the seed alone."""
    return splits[torch.randperm(len(splits), generator=torch.Generator().manual_seed(seed))]


def inception_score(logits: Tensor, split: Tensor | None = None) -> float:
    """The score of logits (N, classes) that are at hand; `split` int64 (N,), one split if None."""
    state = ScoreState(logits.shape[1], 1 if split is None else int(split.max()) + 1)
    state.add(logits, split)
    return state.score()
