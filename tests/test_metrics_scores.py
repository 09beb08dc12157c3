"""Inception score, KID, precision and recall, usage: known answers, brute force, and the published traps."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.metrics import (
    CodeHistogram,
    FeatureBank,
    MeanState,
    ScoreState,
    WindowUsage,
    contiguous_splits,
    deal,
    inception_score,
    kernel_distance,
    polynomial_mmd,
    precision_recall,
    shuffled,
)
from lexel.metrics.neighbours import radii


class MovingUsage:
    """Codes whose moving average of hits a batch reaches a share of the uniform expectation (VAR's meter).

    Args:
        codebook_size: number of codes, K.
        share: of the hits that every code would have if all were equal.
    """

    def __init__(self, codebook_size: int, share: float = 0.08) -> None:
        self.share = share
        self.batches = 0
        self._hits = torch.zeros(codebook_size, dtype=torch.float64)
        self._expected = 0.0

    def add(self, indices: Tensor) -> None:
        """Takes in one batch of indices; the average remembers 10 batches at first, 100 after the hundredth."""
        hits = torch.bincount(indices.flatten().cpu(), minlength=len(self._hits)).double()
        kept = 0.0 if self.batches == 0 else 0.9 if self.batches < 100 else 0.99
        self._hits = kept * self._hits + (1 - kept) * hits
        self._expected = indices.numel() / len(self._hits)
        self.batches += 1

    @property
    def usage(self) -> float:
        return float((self._hits >= self.share * self._expected).double().mean())


def batch_usage(indices: Tensor, codebook_size: int, share: float = 0.01) -> float:
    """Codes that one batch of indices hits more often than `share` of the uniform expectation, over K (UniTok's)."""
    hits = torch.bincount(indices.flatten(), minlength=codebook_size)
    return float((hits > share * indices.numel() / codebook_size).double().mean())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------- inception score


def test_certain_and_diverse_predictions_score_the_number_of_classes():
    logits = torch.full((20, 5), -math.inf).scatter(1, (torch.arange(20) % 5)[:, None], 0.0)
    assert inception_score(logits) == pytest.approx(5, abs=1e-12)


def test_predictions_that_are_all_alike_score_one():
    assert inception_score(noise(1, 7).expand(30, 7)) == pytest.approx(1, abs=1e-12)


def test_the_score_is_the_definition():
    logits = noise(40, 6)
    p = logits.softmax(1).numpy()
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    assert inception_score(logits) == pytest.approx(np.exp(divergence.mean()), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`")
def test_the_score_is_torchmetrics_split_by_split():
    from torchmetrics.image.inception import InceptionScore

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :12].float() / 32

    images = torch.randint(0, 256, (40, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(3)
    order = torch.randperm(40)  # as torchmetrics will draw it
    torch.manual_seed(3)
    metric = InceptionScore(feature=Flat(), splits=4)
    metric.update(images)
    mean, deviation = metric.compute()
    state = ScoreState(12, splits=4)
    state.add(Flat()(images)[order], contiguous_splits(40, 4))
    assert state.score() == pytest.approx(float(mean), rel=1e-5)
    assert float(state.splits().std()) == pytest.approx(float(deviation), rel=1e-4)


def test_contiguous_splits_are_cut_as_published():
    assert contiguous_splits(7, count=None, size=3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert contiguous_splits(10, count=3).bincount().tolist() == [3, 3, 4]  # torch-fidelity: from i * N // count


def test_trap_a_class_sorted_file_scores_far_too_low_unless_shuffled():
    logits = torch.zeros(1000, 10).scatter(1, (torch.arange(1000) // 100)[:, None], 20.0)  # sorted by class
    in_order = inception_score(logits, contiguous_splits(1000, 10))
    dealt = inception_score(logits, shuffled(contiguous_splits(1000, 10), seed=0))
    assert in_order == pytest.approx(1, abs=1e-3)
    assert dealt > 9


def test_trap_the_bias_of_the_classifier_changes_the_score():
    logits, bias = 3 * noise(200, 20), noise(20, seed=1)
    assert abs(inception_score(logits) - inception_score(logits + bias)) > 0.2


def test_a_shuffle_depends_on_the_seed_alone():
    splits = contiguous_splits(100, 10)
    assert torch.equal(shuffled(splits, 3), shuffled(splits, 3))
    assert not torch.equal(shuffled(splits, 3), shuffled(splits, 4))
    assert torch.equal(shuffled(splits, 3).bincount(), splits.bincount())


def test_a_streamed_score_does_not_depend_on_batches_order_or_merging():
    logits, split, group = noise(60, 5), shuffled(contiguous_splits(60, 3), 0), deal(60, 4)
    whole = ScoreState(5, 3, 4)
    whole.add(logits, split, group)
    merged = ScoreState(5, 3, 4)
    for numbers in torch.arange(60).flip(0).split(7):
        part = ScoreState(5, 3, 4)
        part.add(logits[numbers], split[numbers], group[numbers])
        merged.merge(part)
    assert merged.score() == pytest.approx(whole.score(), rel=1e-13)
    assert merged.score(without=2) == pytest.approx(whole.score(without=2), rel=1e-13)
    kept = group != 2
    assert whole.score(without=2) == pytest.approx(inception_score(logits[kept], split[kept]), rel=1e-12)


def test_a_score_of_nothing_is_refused():
    with pytest.raises(UsageError, match="at least one sample"):
        ScoreState(5).score()


# --------------------------------------------------------------------------------------------------------- KID


def test_the_discrepancy_is_the_definition():
    a, b = noise(7, 3), noise(5, 3, seed=1) + 0.5
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert float(polynomial_mmd(a, b)) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)


def test_the_discrepancy_is_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = noise(50, 8), noise(50, 8, seed=1) + 0.3
    assert float(polynomial_mmd(a, b)) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_the_kernel_distance_is_unbiased_for_small_samples():
    values = [kernel_distance(noise(30, 4, seed=s), noise(30, 4, seed=500 + s), subsets=1).mean for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5


def test_subsets_depend_on_the_seed_and_average_to_the_whole():
    a, b = noise(100, 4), noise(120, 4, seed=1) + 0.4
    assert kernel_distance(a, b, 20, 50) == kernel_distance(a, b, 20, 50)
    assert kernel_distance(a, b, 20, 50) != kernel_distance(a, b, 20, 50, seed=1)
    mean, error = kernel_distance(a, b, 200, 50)
    assert mean == pytest.approx(float(polynomial_mmd(a, b)), abs=4 * error)


def test_a_kernel_distance_of_one_sample_is_refused():
    with pytest.raises(UsageError, match="two samples a side"):
        kernel_distance(noise(1, 4), noise(5, 4))


# ------------------------------------------------------------------------------------------ precision and recall


def by_brute_force(reference: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    def manifold(points: Tensor) -> list[float]:
        return [sorted(float((x - y).square().sum()) for y in points)[k] for x in points]

    def inside(points: Tensor, centres: Tensor, reach: list[float]) -> float:
        hits = [any(float((p - c).square().sum()) <= r for c, r in zip(centres, reach, strict=True)) for p in points]
        return float(np.mean(hits))

    return inside(samples, reference, manifold(reference)), inside(reference, samples, manifold(samples))


@pytest.mark.parametrize("block", [4096, 16, 7])
def test_precision_and_recall_are_brute_force_whatever_the_block(block):
    reference, samples = noise(60, 5), noise(45, 5, seed=1) * 1.2 + 0.5
    precision, recall = precision_recall(reference, samples, block=block)
    assert (precision, recall) == by_brute_force(reference, samples)
    assert 0.2 < precision < recall < 1  # a case that can tell


def test_precision_and_recall_are_not_swapped():
    broad, narrow = noise(300, 3), 0.2 * noise(300, 3, seed=1)
    precision, recall = precision_recall(reference=broad, samples=narrow)
    assert precision > 0.9
    assert recall < 0.3


def test_a_set_against_itself_has_both_one_and_against_a_far_one_both_zero():
    points = noise(40, 4).float()
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1000) == (0, 0)


def test_a_radius_reaches_to_the_third_other_point_and_counts_twins():
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert radii(line, k=3).tolist() == [36, 25, 9, 25, 81]
    assert radii(torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0]]), k=3).tolist() == [0, 0, 0, 0, 25]


def test_features_far_from_zero_lose_no_neighbours_in_float32():
    reference, samples = noise(60, 5), noise(45, 5, seed=1) * 1.2 + 0.5
    reference, samples = (reference + 3000).float(), (samples + 3000).float()
    assert precision_recall(reference, samples) == precision_recall(reference.double(), samples.double())


def test_a_point_on_the_edge_of_a_ball_is_inside():
    reference = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])  # each ball reaches to the neighbour at distance 1
    assert precision_recall(reference, torch.tensor([[-3.0], [3.0], [3.5], [-3.5]]), k=1).precision == 0.5


def test_too_few_points_are_refused():
    with pytest.raises(UsageError, match="more than k = 3 points"):
        precision_recall(noise(3, 2), noise(50, 2))


def test_a_feature_bank_gives_rows_by_number():
    rows, bank = noise(10, 3).float(), FeatureBank(3)
    for numbers in (torch.tensor([7, 2]), torch.tensor([0, 9, 4])):
        bank.add(rows[numbers], numbers)
    assert torch.equal(bank.features(), rows[[0, 2, 4, 7, 9]])
    again = FeatureBank(3)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.features(), bank.features())
    assert len(again) == 5


def test_a_mean_state_knows_its_standard_error():
    values = noise(50)
    state = MeanState()
    for part in values.split(8):
        state.add(part)
    assert state.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert state.standard_error == pytest.approx(float(values.std() / 50**0.5), rel=1e-9)


def test_a_mean_has_the_same_bits_in_any_order_and_any_parts_and_is_rounded_once():
    values = noise(300) * torch.logspace(-100, 100, 300, dtype=torch.float64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    whole, parts = MeanState(), [MeanState() for _ in range(3)]
    whole.add(values)
    for number, part in enumerate(parts):
        part.add(values[order[number::3]])
    again = MeanState()
    again.load_state_dict(parts[0].state_dict())
    for part in parts[1:]:
        again.merge(part)
    assert (again.mean, again.standard_error) == (whole.mean, whole.standard_error)
    assert whole.mean == math.fsum(values.tolist()) / 300
    with pytest.raises(UsageError, match="a saved sum is damaged"):
        again.load_state_dict({"n": 3, "sum": "x", "squares": "y"})


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_a_mean_with_infinite_values_is_infinite(odd):
    state, other = MeanState(), MeanState()
    state.add(torch.tensor([1.0, odd]))
    other.load_state_dict(state.state_dict())
    for one in (state, other):
        assert repr(one.mean) == repr(odd)


# --------------------------------------------------------------------------------------------------------- usage


def test_the_window_counts_the_last_tokens_and_the_zeros_it_starts_with():
    meter = WindowUsage(codebook_size=10, window=6)
    meter.add(torch.tensor([[5, 5]]), torch.tensor([0]))
    assert meter.usage == 2 / 10  # 5, and 0 from the queue's start
    meter.add(torch.tensor([[1, 2], [3, 4], [6, 6]]), torch.tensor([1, 2, 3]))
    assert meter.usage == 5 / 10  # 1 2 3 4 6


def test_the_window_follows_sample_numbers_not_the_order_of_arrival():
    tokens = torch.randint(0, 50, (40, 4), generator=torch.Generator().manual_seed(0))
    in_order, parts = WindowUsage(50, 37), [WindowUsage(50, 37) for _ in range(3)]
    in_order.add(tokens, torch.arange(40))
    for rank, part in enumerate(parts):
        for number in reversed(range(rank, 40, 3)):
            part.add(tokens[number : number + 1], torch.tensor([number]))
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].usage == in_order.usage == len(tokens.flatten()[-37:].unique()) / 50


def test_trap_usage_has_four_values_on_the_same_tokens():
    size = 4096
    frequencies = torch.arange(1, size + 1).double().pow(-1.0)  # Zipf, as words are
    tokens = torch.multinomial(frequencies, 400 * 256, replacement=True, generator=torch.Generator().manual_seed(0))
    tokens = tokens.view(400, 256)
    whole, window, moving = CodeHistogram(size), WindowUsage(size, 8192), MovingUsage(size)
    for number, part in enumerate(tokens.split(8)):
        whole.add(part)
        window.add(part, torch.arange(8 * number, 8 * number + 8))
        moving.add(part)
    values = [whole.usage, window.usage, moving.usage, batch_usage(tokens[:8], size)]
    assert values == pytest.approx([0.989, 0.463, 0.807, 0.181], abs=0.002)


def test_trap_a_window_of_65536_cannot_show_full_usage_of_a_large_codebook():
    size = 262_144
    tokens = torch.arange(size).view(1024, 256)  # every code used exactly once
    whole, window = CodeHistogram(size), WindowUsage(size, 65_536)
    whole.add(tokens)
    window.add(tokens, torch.arange(1024))
    assert whole.usage == 1
    assert window.usage == 0.25
