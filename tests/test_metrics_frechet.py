"""Fréchet distances against closed forms, scipy and torchmetrics; streamed moments against the whole."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.metrics import (
    Moments,
    MomentState,
    deal,
    frechet_distance,
    frechet_distance_of_features,
    frechet_terms,
    jackknife,
)
from lexel.metrics.frechet import factor
from lexel.metrics.intervals import student_quantile


def features(n: int, dim: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Correlated features, as those of a network are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim)).double() / dim**0.5
    return torch.randn(n, dim, generator=generator).double() @ mix * scale + mean


def moments(rows: Tensor, batch: int = 64, groups: int = 1) -> Moments:
    return state(rows, batch, groups).moments()


def state(rows: Tensor, batch: int = 64, groups: int = 1) -> MomentState:
    result = MomentState(rows.shape[1], groups)
    group = deal(len(rows), groups)
    for part, of in zip(rows.split(batch), group.split(batch), strict=True):
        result.add(part, of)
    return result


def by_scipy(a: Tensor, b: Tensor) -> float:
    from scipy.linalg import sqrtm

    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    one, two = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    return float(mean) + np.trace(one) + np.trace(two) - 2 * np.trace(sqrtm(one @ two)).real


def test_shifting_every_feature_gives_the_squared_shift():
    rows = features(500, 8)
    shift = torch.arange(8.0)
    assert frechet_distance(moments(rows), moments(rows + shift)) == pytest.approx(140.0, abs=1e-6)  # 0 + 1 + ... + 49


def test_scaling_every_feature_gives_the_trace_times_the_squared_change():
    rows = features(500, 8)
    terms = frechet_terms(moments(rows), moments(3 * rows))
    trace = moments(rows).covariance.trace()
    assert terms.covariance == pytest.approx(float((3 - 1) ** 2 * trace), rel=1e-9)
    assert terms.distance == pytest.approx(terms.mean + terms.covariance)


def test_diagonal_covariances_have_a_closed_form():
    a = Moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
    b = Moments(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, abs=1e-12)


def test_equal_samples_are_at_distance_zero_and_the_distance_is_symmetric():
    a, b = moments(features(300, 16)), moments(features(300, 16, seed=1, scale=1.3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_rotating_both_samples_changes_nothing():
    rotation, _ = torch.linalg.qr(features(16, 16, seed=5))
    a, b = features(200, 16), features(200, 16, seed=1, scale=1.3, mean=0.2)
    turned = frechet_distance(moments(a @ rotation), moments(b @ rotation))
    assert turned == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-10)


def test_the_distance_is_scipys():
    a, b = features(400, 32), features(300, 32, seed=1, scale=1.2, mean=0.1)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(by_scipy(a, b), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_the_distance_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :12].double()

    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2), normalize=False)
    metric.set_dtype(torch.float64)
    a, b = (torch.randint(0, 256, (80, 3, 2, 2), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    metric.update(a.to(torch.uint8), real=True)
    metric.update(b.to(torch.uint8), real=False)
    own = frechet_distance(moments(a.flatten(1)), moments(b.flatten(1)))
    assert own == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize("n", [20, 48, 200])
def test_distances_of_features_and_of_moments_agree_below_and_above_the_dimension(n):
    a, b = features(n, 48), features(n + 5, 48, seed=1, scale=1.2, mean=0.1)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(frechet_distance_of_features(a, b), rel=1e-9)


def test_below_the_dimension_rounding_does_not_leak_through_the_root():
    rows = features(20, 400)
    assert frechet_distance(moments(rows), moments(rows)) == pytest.approx(0, abs=1e-9)
    unaware = Moments(moments(rows).mean, moments(rows).covariance)  # does not know that its rank is 19
    assert abs(frechet_distance(unaware, unaware)) > 1e-9


def test_a_given_factor_saves_work_and_changes_nothing():
    a, b = moments(features(100, 16)), moments(features(100, 16, seed=1))
    assert frechet_terms(a, b, factor(b)) == frechet_terms(a, b)


def test_trap_float32_statistics_are_not_enough():
    """Means far from zero, as activations after a rectifier have: a covariance is a small difference of large sums."""
    a, b = features(1000, 8, mean=100), features(1000, 8, seed=1, scale=1.05, mean=100)
    exact = frechet_distance_of_features(a, b)
    single = []
    for rows in (a, b):
        total, outer = torch.zeros(8), torch.zeros(8, 8)
        for part in rows.float().split(50):
            total, outer = total + part.sum(0), outer + part.T @ part
        mean = total / 1000
        single.append(Moments(mean.double(), ((outer - 1000 * torch.outer(mean, mean)) / 999).double()))
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(exact, rel=1e-8)
    assert abs(frechet_distance(*single) - exact) > 1e-3 * exact


def test_trap_small_samples_score_worse():
    distances = [
        np.mean([frechet_distance(moments(features(n, 16, s)), moments(features(n, 16, 100 + s))) for s in range(8)])
        for n in (50, 200, 800)
    ]
    # All are samples of one distribution, so the truth is 0: what remains is the bias, falling as 1 / n.
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.15)
    assert distances[1] / distances[2] == pytest.approx(4, rel=0.15)


def test_a_covariance_with_negative_eigenvalues_is_reported():
    good = moments(features(100, 4))
    damaged = Moments(good.mean, good.covariance - 0.5 * torch.eye(4).double())
    assert frechet_terms(good, good).clipped < 1e-12
    assert frechet_terms(good, damaged).clipped > 1e-3


def test_moments_are_numpys():
    rows = features(123, 9)
    mean, covariance, n = moments(rows, batch=10)
    np.testing.assert_allclose(mean, rows.numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(rows.numpy(), rowvar=False), atol=1e-12)
    assert n == 123


def test_batch_size_order_groups_and_merging_do_not_show():
    rows = features(101, 6)
    whole = moments(rows, batch=101)
    parts = [state(part, batch=7, groups=3) for part in rows.flip(0).split(40)]
    merged = MomentState(6, 3)
    for part in parts:
        merged.merge(part)
    for other in (
        moments(rows, batch=1),
        moments(rows.flip(0), batch=13),
        moments(rows, 16, groups=5),
        merged.moments(),
    ):
        torch.testing.assert_close(other.mean, whole.mean, atol=1e-13, rtol=0)
        torch.testing.assert_close(other.covariance, whole.covariance, atol=1e-12, rtol=0)
        assert other.n == whole.n


def test_leaving_a_group_out_is_never_having_seen_it():
    rows, group = features(60, 4), deal(60, 5)
    without = state(rows, groups=5).moments(without=2)
    expected = moments(rows[group != 2])
    torch.testing.assert_close(without.covariance, expected.covariance, atol=1e-12, rtol=0)
    assert without.n == expected.n == 48


def test_a_state_survives_being_saved(tmp_path):
    torch.save(state(features(30, 4), groups=2).state_dict(), tmp_path / "state.pt")
    again = MomentState(4, 2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.moments().covariance, state(features(30, 4), groups=2).moments().covariance)


def test_what_cannot_be_compared_is_refused():
    a = moments(features(30, 4))
    with pytest.raises(UsageError, match="differ in length: 4 and 5"):
        frechet_distance(a, moments(features(30, 5)))
    with pytest.raises(UsageError, match="at least two samples, got 1"):
        moments(features(1, 4))
    with pytest.raises(UsageError, match="not finite"):
        frechet_distance(a, Moments(a.mean * float("nan"), a.covariance))


# ------------------------------------------------------------------------------------------------- intervals


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values, group = features(100, 1).flatten(), torch.arange(100)
    without = [float(values[group != g].mean()) for g in range(100)]
    interval = jackknife(float(values.mean()), without)
    assert interval.standard_error == pytest.approx(float(values.std() / 10), rel=1e-9)
    assert interval.bias == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("degrees,expected", [(4, 2.7764), (9, 2.2622), (19, 2.0930), (99, 1.9842)])
def test_students_quantiles_are_the_tables(degrees, expected):
    assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=2e-3)


def test_intervals_of_the_frechet_distance_cover_its_expectation():
    groups, n = 10, 300
    reference = moments(features(5000, 4, seed=999))
    estimates, intervals = [], []
    for seed in range(200):
        sample = state(features(n, 4, seed, scale=1.2, mean=0.3), batch=n, groups=groups)
        estimates.append(frechet_distance(sample.moments(), reference))
        without = [frechet_distance(sample.moments(g), reference) for g in range(groups)]
        intervals.append(jackknife(estimates[-1], without))
    centre = np.mean(estimates)
    covered = np.mean([interval.low <= centre <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.99
    assert np.mean([i.standard_error for i in intervals]) == pytest.approx(np.std(estimates), rel=0.15)


def test_the_jackknife_sees_the_bias_of_a_small_sample():
    biases, values = [], []
    truth = moments(features(20_000, 8, 7777), batch=20_000)
    for seed in range(40):
        sample = state(features(100, 8, seed), batch=100, groups=10)
        values.append(frechet_distance(sample.moments(), truth))
        biases.append(jackknife(values[-1], [frechet_distance(sample.moments(g), truth) for g in range(10)]).bias)
    assert np.mean(biases) == pytest.approx(np.mean(values), rel=0.25)  # the truth is 0: all of it is bias


def test_groups_are_equal_in_size_and_cut_across_sorted_and_cyclic_orders():
    group = deal(1000, 10)
    assert torch.equal(group.bincount(), torch.full((10,), 100))
    for order in (torch.arange(1000) // 100, torch.arange(1000) % 10):  # class-sorted, class-cyclic
        table = torch.zeros(10, 10).index_put_((group, order), torch.ones(1000), accumulate=True)
        assert table.min() >= 1
        assert table.max() <= 25
