"""Guidance, filters and draws: the published filters, closed forms, and laws of the random streams."""

import math

import pytest
import torch

from lexel.errors import UsageError
from lexel.generators.sampling import (
    BLOCK,
    check_filters,
    filter_logits,
    guidance_scales,
    guide,
    sample_index,
    uniform_stream,
)


def random_logits(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def top_p_by_sorting(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The textbook way: everything after the cumulative probability first exceeds p is dropped."""
    values, order = logits.sort(descending=True, stable=True)
    drop = values.softmax(-1).cumsum(-1) > top_p
    drop[:, 1:] = drop[:, :-1].clone()
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)


def test_filters_are_the_published_ones(parity):
    fixture = torch.load(parity / "ar.pt", weights_only=True)["filter"]
    logits = fixture["logits"]
    assert torch.equal(filter_logits(logits, top_k=10), fixture["top_k10"])
    assert torch.equal(filter_logits(logits, top_p=0.8), fixture["top_p80"])
    # The numbers behind `both` are not recorded; of the pairs that keep as many tokens, this is the roundest.
    assert torch.equal(filter_logits(logits, top_k=10, top_p=0.5), fixture["both"])


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_top_p_without_a_sort_equals_top_p_by_sorting(top_p, spread):
    logits = random_logits(5, 3000) * spread  # at spread 0.01 the mass needs nearly all 3,000 tokens
    assert torch.equal(filter_logits(logits, top_p=top_p), top_p_by_sorting(logits, top_p))


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, top_p=0.4).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.9).isfinite().tolist() == [[True, True, True, False]]


def test_min_p_keeps_what_is_probable_enough_beside_the_likeliest():
    logits = torch.tensor([[0.5, 0.26, 0.24, 0.0]]).log()
    assert filter_logits(logits, min_p=0.5).isfinite().tolist() == [[True, True, False, False]]


def test_ties_with_the_last_token_kept_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, top_p=0.7).isfinite().tolist() == [[True, True, True, False]]


def test_the_temperature_divides_before_the_filters():
    logits = random_logits(3, 100)
    cold = filter_logits(logits, temperature=0.5, top_p=0.8)
    assert torch.equal(cold, filter_logits(logits / 0.5, top_p=0.8))


def test_filters_that_are_off_change_nothing():
    logits = random_logits(3, 100)
    assert filter_logits(logits) is logits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0, 1.0, 0.0), "temperature must be a number from 1e-06 up, got 0.0; top_k = 1"),
        ((1e-320, 0, 1.0, 0.0), "temperature"),
        ((math.nan, 0, 1.0, 0.0), "temperature"),
        ((1.0, -1, 1.0, 0.0), "top_k"),
        ((1.0, 0, 0.0, 0.0), "top_p"),
        ((1.0, 0, 1.0, 1.5), "min_p"),
    ],
)
def test_filters_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        check_filters(*arguments)


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional():
    conditional, unconditional = random_logits(2, 10, 0), random_logits(2, 10, 1)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_schedules_take_the_values_their_formulas_say():
    assert guidance_scales("constant", 2.5, 4) == [2.5] * 4
    assert guidance_scales("linear", 3.0, 5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_scales("linear:2", 3.0, 3) == [2.0, 2.5, 3.0]
    assert guidance_scales("interval:0.25,0.75", 4.0, 8) == [1, 1, 4, 4, 4, 4, 1, 1]
    cosine = guidance_scales("cosine-power:2", 16.0, 256)
    assert cosine[0] == 1.0
    assert cosine[128] == pytest.approx(1 + 15 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine == sorted(cosine)
    assert cosine[-1] == pytest.approx(16.0, abs=0.01)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine-power", "interval", "interval:0,0.5"])
def test_a_scale_of_one_is_off_under_every_schedule(name):
    assert set(guidance_scales(name, 1.0, 16)) == {1.0}


@pytest.mark.parametrize(
    "schedule", ["kosine", "linear:1,2", "linear:x", "interval:0.8,0.2", "cosine-power:-1", "constant:3"]
)
def test_schedules_that_mean_nothing_are_refused(schedule):
    with pytest.raises(UsageError):
        guidance_scales(schedule, 2.0, 16)


def test_an_image_has_the_same_numbers_in_every_batch():
    together = uniform_stream(7, [0, 1, 5, 2**40], 256)
    for row, number in enumerate([0, 1, 5, 2**40]):
        assert torch.equal(uniform_stream(7, [number], 256)[0], together[row])
    assert torch.equal(
        uniform_stream(7, [5], 100)[0], together[2, :100]
    )  # a token's number does not depend on the count


def test_numbers_of_images_and_seeds_are_unrelated_and_uniform():
    values = torch.cat([uniform_stream(seed, range(100), 256) for seed in (0, 1, -1)])
    assert values.unique().numel() == values.numel()
    assert values.min() >= 0
    assert values.max() < 1
    deviation = values.flatten().sort().values - (torch.arange(values.numel()) + 0.5) / values.numel()
    assert deviation.abs().max().item() < 1.63 / math.sqrt(values.numel())  # Kolmogorov-Smirnov at 1 %
    correlation = torch.corrcoef(values.flatten(1)[:50])
    assert (correlation - torch.eye(50, dtype=torch.float64)).abs().max().item() < 0.3


@pytest.mark.parametrize("size", [2, 7, BLOCK, BLOCK + 1, 1000])
def test_draws_walk_through_the_cumulative_distribution(size):
    logits = random_logits(1, size)
    cumulative = logits.softmax(-1)[0].cumsum(0)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    found = sample_index(logits.expand(4000, -1), uniform)
    assert torch.equal(found, torch.searchsorted(cumulative, uniform, right=True).clamp(max=size - 1))


def test_draws_have_the_frequencies_of_the_softmax():
    logits = random_logits(1, 600, seed=3).float()
    count = 40_000
    found = sample_index(logits.expand(count, -1), uniform_stream(0, [0], count)[0])
    expected = logits.softmax(-1)[0] * count
    chi_square = ((found.bincount(minlength=600) - expected).square() / expected).sum().item()
    assert abs(chi_square - 599) < 4 * math.sqrt(2 * 599)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("size", [5, 3 * BLOCK])
def test_tokens_that_were_filtered_out_are_never_drawn(uniform, size):
    logits = torch.full((1, size), -math.inf)
    logits[0, 2:4] = 0.0  # nothing before, nothing after
    assert sample_index(logits, torch.tensor([uniform], dtype=torch.float64)).item() == (2 if uniform == 0 else 3)
