"""Statistics of features that stream: added batch by batch, merged across processes, never held as a whole."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.metrics.exact import ExactSum
from lexel.metrics.states import Sums, merge_processes, restored


class Moments(NamedTuple):
    """Mean and covariance of the rows of a sample."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64, unbiased (divided by n - 1)
    n: int | None = None  # rows they were taken over; None where a file does not say


class MomentState(Sums):
    """Count, sum and second moment of features in float64, kept apart for `groups` of samples.

    float64 sums make the result independent of batch size and order to about 1e-14; float32 sums are off by 5e-4 of a
    Fréchet distance at 1,000 samples. The groups cost groups * D * D doubles (335 MB at D = 2,048 and 10 groups) and
    buy the confidence interval: a distance can be taken with any one group left out.

    Args:
        dim: length of a feature, D.
        groups: number of groups; 1 where no interval is wanted.
    """

    what = "moments"
    parts = "n", "total", "outer"

    def __init__(self, dim: int, groups: int = 1) -> None:
        self.n = torch.zeros(groups, dtype=torch.int64)
        self.total = torch.zeros(groups, dim, dtype=torch.float64)
        self.outer = torch.zeros(groups, dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        return self.total.shape[1]

    @property
    def groups(self) -> int:
        return self.total.shape[0]

    def add(self, features: Tensor, group: Tensor | None = None) -> None:
        """Adds features (B, D) of any floating type; `group` int64 (B,) says where each belongs, all to 0 if None."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UsageError(f"features must be (B, {self.dim}), got {tuple(features.shape)}")
        rows = features.detach().to("cpu", torch.float64)
        group = torch.zeros(len(rows), dtype=torch.int64) if group is None else group.cpu()
        for number in group.unique().tolist():
            members = rows[group == number]
            self.n[number] += len(members)
            self.total[number] += members.sum(0)
            self.outer[number].addmm_(members.T, members)

    def moments(self, without: int | None = None) -> Moments:
        """Mean and unbiased covariance of everything, or of everything but one group.

        Raises:
            UsageError: fewer than two samples.
        """
        n, total, outer = self.n.sum(), self.total.sum(0), self.outer.sum(0)
        if without is not None:
            n, total, outer = n - self.n[without], total - self.total[without], outer - self.outer[without]
        count = int(n)
        if count < 2:
            raise UsageError(f"a covariance needs at least two samples, got {count}")
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(mean, (covariance + covariance.T) / 2, count)


class MeanState:
    """Count, sum and sum of squares of one number a sample, exact: the same bits in any order, in any parts."""

    def __init__(self) -> None:
        self.n = 0
        self._sum, self._squares = ExactSum(), ExactSum()

    def add(self, values: Tensor) -> None:
        """Adds values (B,)."""
        values = values.detach().to("cpu", torch.float64)
        self.n += len(values)
        self._sum.add(values.tolist())
        self._squares.add(values.square().tolist())

    def merge(self, other: "MeanState") -> None:
        self.n += other.n
        self._sum.merge(other._sum)
        self._squares.merge(other._squares)

    def all_reduce(self) -> None:
        """Adds the values of every process."""
        merge_processes(self, MeanState)

    @property
    def mean(self) -> float:
        return float(self._sum) / self.n if self.n else float("nan")

    @property
    def standard_error(self) -> float:
        """The standard error of the mean; NaN below two samples."""
        total, squares = float(self._sum), float(self._squares)
        return float("nan") if self.n < 2 else (max(squares - total * total / self.n, 0) / (self.n - 1) / self.n) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "sum": self._sum.text(), "squares": self._squares.text()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            UsageError: it is damaged, or of a version that kept rounded sums.
        """
        n = state.get("n") if isinstance(state, Mapping) else None
        if not isinstance(n, int) or n < 0:
            raise UsageError(f"a saved state of a mean is damaged: n is {n!r}")
        self._sum, self._squares = ExactSum.of_text(state.get("sum")), ExactSum.of_text(state.get("squares"))
        self.n = n


class FeatureBank:
    """The features of chosen samples themselves, float32, for the metrics that need pairs (precision, recall, KID).

    It holds at most one row a sample number, sorted by number when read, so that the order in which samples came does
    not show. Its size is what the caller keeps adding: 50,000 rows of 2,048 are 410 MB.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._rows: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def add(self, features: Tensor, numbers: Tensor) -> None:
        """Adds features (B, D) of the samples with these numbers, int64 (B,)."""
        self._rows.append(features.detach().to("cpu", torch.float32).clone())
        self._numbers.append(numbers.cpu().clone())

    def merge(self, other: "FeatureBank") -> None:
        self._rows += other._rows
        self._numbers += other._numbers

    def all_reduce(self) -> None:
        """Gathers the rows of every process on every process."""
        merge_processes(self, lambda: FeatureBank(self.dim))

    def features(self) -> Tensor:
        """All rows in the order of their numbers: float32 (N, D)."""
        state = self.state_dict()
        return state["rows"][state["numbers"].argsort()]

    def __len__(self) -> int:
        return sum(len(numbers) for numbers in self._numbers)

    def state_dict(self) -> dict[str, Any]:
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, self.dim)
        numbers = torch.cat(self._numbers) if self._numbers else torch.zeros(0, dtype=torch.int64)
        return {"rows": rows, "numbers": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows, numbers = restored(
            state, "features", rows=(torch.float32, (None, self.dim)), numbers=(torch.int64, (None,))
        )
        if len(rows) != len(numbers):
            raise UsageError(f"a saved state of features is damaged: {len(rows)} rows have {len(numbers)} numbers")
        self._rows, self._numbers = [rows], [numbers]
