"""Probes: small classifiers on features that stay as they are, linear or attentive.

A probe sees the features of an image as rows (T, D), or as indices (T,) for which it learns vectors of its own. Each is
a function of its settings and its data alone: starting weights and the order of images come from the seed.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback

KEPT_BYTES = 2**30  # features that are kept in memory instead of being made anew for each pass
SOLVER_NUMBERS = 2**27  # float64 numbers that scikit-learn is given at most
SOLVER_STEPS = 1000  # of L-BFGS


class ProbeConfig(Config):
    """Options of a probe.

    `pool` is of the linear probe: the mean of all rows, or "all" of them side by side. `penalty` is its L2 penalty
    where scikit-learn fits it, on features of variance 1. `width` and `heads` are of the attentive probe; `width` is
    also the length of learned vectors. The other options are of AdamW, which fits everything else.
    """

    pool: Literal["mean", "all"] = "mean"
    penalty: float = Field(default=1.0, gt=0)
    width: int = Field(default=256, ge=1)
    heads: int = Field(default=4, ge=1)
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Table:
    """Features of numbered images: float32 (N, T, D), or int64 (N, T) with a vocabulary.

    Args:
        make: features of images by their numbers.
        count: N.
        batch_size: images whose features are made together.
        vocabulary: how many indices there are, where features are indices.
        report: called with images done and images in all while they are made for the first time.
    """

    def __init__(
        self,
        make: Callable[[np.ndarray], Tensor],
        count: int,
        batch_size: int,
        vocabulary: int | None = None,
        report: ProgressCallback | None = None,
    ) -> None:
        self.make, self.count, self.batch_size, self.vocabulary = make, count, batch_size, vocabulary
        self.report = report
        self._kept: Tensor | None = None
        self.shape = tuple(make(np.arange(min(1, count))).shape[1:])  # (T, D) or (T,)

    def batches(self) -> Iterator[Tensor]:
        """The features of all images, in order."""
        for first in range(0, self.count, self.batch_size):
            numbers = np.arange(first, min(first + self.batch_size, self.count))
            yield self.rows(numbers)
            if self.report is not None and self._kept is None:
                self.report(int(numbers[-1]) + 1, self.count)

    def rows(self, numbers: np.ndarray) -> Tensor:
        """The features of some images."""
        return self.make(numbers) if self._kept is None else self._kept[torch.from_numpy(numbers)]

    def keep(self) -> None:
        """Makes all features once and keeps them, where they fit into KEPT_BYTES."""
        integers = self.vocabulary is not None
        if self._kept is not None or (8 if integers else 4) * self.count * int(np.prod(self.shape)) > KEPT_BYTES:
            return
        kept = torch.empty(self.count, *self.shape, dtype=torch.int64 if integers else torch.float32)
        begin = 0
        for rows in self.batches():
            kept[begin : begin + len(rows)] = rows
            begin += len(rows)
        self._kept = kept


class Probe(Protocol):
    """A classifier that `fit` made."""

    solver: str  # what fitted it

    def scores(self, rows: Tensor) -> Tensor:
        """Scores (B, classes) for features (B, T, D) or (B, T); the highest is the class."""


class Linear(nn.Module):
    """A linear layer on the mean of an image's features, or on all of them (logistic regression).

    Args:
        table: the features, for their shape.
        classes: how many.
        config: settings.
    """

    OPTIONS: ClassVar[set[str]] = {"pool", "penalty"}  # that reach this probe alone

    def __init__(self, table: Table, classes: int, config: ProbeConfig) -> None:
        super().__init__()
        places, *channels = table.shape
        width = channels[0] if channels else config.width
        self.pool = config.pool
        self.vectors = None if table.vocabulary is None else nn.Embedding(table.vocabulary, width)
        self.head = nn.Linear(width * (places if config.pool == "all" else 1), classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores (B, classes)."""
        x = rows if self.vectors is None else self.vectors(rows)
        return cast(Tensor, self.head(pooled(x, self.pool)))


class Attentive(nn.Module):
    """One learned query that attends to an image's features, and a linear layer on what it sees.

    Features are projected to `width` channels and get learned positions. As in context autoencoders and V-JEPA
    (https://arxiv.org/abs/2202.03026, https://arxiv.org/abs/2404.08471), without a feed-forward layer.

    Args:
        table: the features, for their shape.
        classes: how many.
        config: settings.

    Raises:
        UsageError: the heads do not divide the width.
    """

    OPTIONS: ClassVar[set[str]] = {"heads"}

    def __init__(self, table: Table, classes: int, config: ProbeConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise UsageError(f"heads must divide width, got {config.heads} and {config.width}")
        places, *channels = table.shape
        width = config.width
        self.enter: nn.Module = (
            nn.Linear(channels[0], width) if channels else nn.Embedding(table.vocabulary or 0, width)
        )
        self.positions = nn.Parameter(torch.randn(places, width).mul_(0.02))
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width).mul_(0.02))
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores (B, classes)."""
        x = self.norm(self.enter(rows) + self.positions)  # (B, T, width)
        seen, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return cast(Tensor, self.head(self.last_norm(seen[:, 0])))


PROBES: dict[str, type[Linear] | type[Attentive]] = {"linear": Linear, "attentive": Attentive}


def fit(
    kind: str, table: Table, labels: Tensor, classes: int, config: ProbeConfig, report: ProgressCallback | None = None
) -> Probe:
    """A probe, fitted to features and labels.

    Args:
        kind: a key of PROBES. A linear probe on features that fit into memory is scikit-learn's LogisticRegression;
            all else is trained by AdamW.
        table: the features of N images.
        labels: int64 (N,) in [0, classes).
        classes: how many.
        config: settings.
        report: called with passes done and passes in all.

    Raises:
        UsageError: an option does not go with the kind.
    """
    for other, module in PROBES.items():
        for name in sorted(module.OPTIONS - PROBES[kind].OPTIONS):
            if getattr(config, name) != ProbeConfig.model_fields[name].default:
                raise UsageError(f"{name} belongs to the {other} probe and reaches nothing in the {kind} one")
    table.keep()
    numbers = table.count * (int(np.prod(table.shape)) if config.pool == "all" else table.shape[-1])
    if kind == "linear" and table.vocabulary is None and numbers <= SOLVER_NUMBERS:
        return LogisticRegression(table, labels, classes, config)
    return TrainedProbe(kind, table, labels, classes, config, report)


class LogisticRegression:
    """The linear probe by scikit-learn's L-BFGS, on pooled features of mean 0 and variance 1, in float64."""

    def __init__(self, table: Table, labels: Tensor, classes: int, config: ProbeConfig) -> None:
        import sklearn  # type: ignore[import-untyped]
        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
        from sklearn.linear_model import LogisticRegression as Solver  # type: ignore[import-untyped]

        self.solver, self.pool, self.classes = f"scikit-learn {sklearn.__version__}", config.pool, classes
        x = torch.cat([pooled(rows, self.pool).double() for rows in table.batches()])
        self.mean, self.deviation = x.mean(0), deviation(x.std(0, correction=0))
        self.model = Solver(C=1 / config.penalty, max_iter=SOLVER_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said once, below
            self.model.fit(((x - self.mean) / self.deviation).numpy(), labels.numpy())
        self.converged = bool(self.model.n_iter_.max() < SOLVER_STEPS)

    def scores(self, rows: Tensor) -> Tensor:
        """Log-probabilities (B, classes); -inf for a class that no image to learn from has."""
        x = (pooled(rows, self.pool).double() - self.mean) / self.deviation
        found = torch.full((len(x), self.classes), -torch.inf, dtype=torch.float64)
        found[:, torch.from_numpy(self.model.classes_)] = torch.from_numpy(self.model.predict_log_proba(x.numpy()))
        return found


class TrainedProbe:
    """A probe by AdamW, its learning rate falling to 0 along a cosine; features get mean 0 and variance 1 a channel."""

    def __init__(
        self,
        kind: str,
        table: Table,
        labels: Tensor,
        classes: int,
        config: ProbeConfig,
        report: ProgressCallback | None,
    ) -> None:
        self.solver = f"torch {torch.__version__}"
        self.moments = None if table.vocabulary is not None else moments(table)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.module = PROBES[kind](table, classes, config)
            for part in self.module.modules():
                if isinstance(part, nn.Embedding):
                    nn.init.normal_(part.weight, std=0.02)
        optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        steps = config.epochs * -(-table.count // config.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.Generator().manual_seed(config.seed)
        for epoch in range(config.epochs):
            for numbers in torch.randperm(table.count, generator=order).split(config.batch_size):
                loss = F.cross_entropy(self._forward(table.rows(numbers.numpy())), labels[numbers])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if report is not None:
                report(epoch + 1, config.epochs)
        self.module.eval()

    def _forward(self, rows: Tensor) -> Tensor:
        if self.moments is not None:
            rows = (rows - self.moments[0]) / self.moments[1]
        return cast(Tensor, self.module(rows))

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self._forward(rows)


def pooled(rows: Tensor, pool: str) -> Tensor:
    """Features (B, T, D) as one vector an image: their mean (B, D), or all of them (B, T * D)."""
    return rows.mean(1) if pool == "mean" else rows.flatten(1)


def moments(table: Table) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over images and places, summed in float64: float32 (D,) each."""
    first: Any = 0
    second: Any = 0
    for rows in table.batches():
        wide = rows.double().flatten(0, 1)
        first, second = first + wide.sum(0), second + wide.square().sum(0)
    count = table.count * table.shape[0]
    mean = first / count
    return mean.float(), deviation((second / count - mean.square()).clamp(min=0).sqrt()).float()


def deviation(found: Tensor) -> Tensor:
    """Standard deviations to divide by: 1 for a channel that does not vary."""
    return torch.where(found > 1e-12 * found.max().clamp(min=1e-30), found, torch.ones_like(found))
