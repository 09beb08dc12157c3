"""Health of the codebook: counts known by hand, gradients in closed form, and a verdict that says why."""

import math

import pytest
import torch

from lexel.metrics.health import CodeHistogram, diagnose, gradient_health, softmax_perplexity
from lexel.quantizers import EMA, FVQ, IBQ, VQ, outline


class Plain:
    """A tokenizer whose latents are given and whose decoder multiplies by constants."""

    def __init__(self, quantizer, z, slope):
        self.quantizer, self.z, self.slope = quantizer, z, slope

    def latents(self, images):
        return self.z

    def decode_codes(self, z_q):
        return z_q * self.slope


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ counts


def test_usage_and_perplexity_of_a_histogram_known_by_hand():
    histogram = CodeHistogram(4)
    histogram.add(torch.tensor([[[0, 0], [1, 3]]]))
    assert histogram.usage == 0.75
    assert histogram.dead == 1
    assert histogram.perplexity == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4) is 1.5 bits


def test_equal_use_of_all_codes_has_perplexity_k():
    histogram = CodeHistogram(64)
    histogram.add(torch.arange(64).repeat(3).view(3, 8, 8))
    assert histogram.perplexity == pytest.approx(64.0)
    assert histogram.usage == 1.0


def test_merged_histograms_are_those_of_all_images():
    indices = torch.randint(0, 50, (6, 4, 4), generator=seeded())
    whole, first, second = CodeHistogram(50), CodeHistogram(50), CodeHistogram(50)
    whole.add(indices)
    first.add(indices[:2])
    second.add(indices[2:])
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    assert int(whole.counts.sum()) == indices.numel()


def test_books_are_counted_each_on_its_own():
    indices = torch.stack([torch.zeros(4, 2, 2), torch.arange(16).view(4, 2, 2)], 1).long()  # (4, 2 books, 2, 2)
    histogram = CodeHistogram(16, books=2)
    histogram.add(indices)
    assert histogram.counts.tolist() == [[16, *[0] * 15], [1] * 16]
    assert histogram.usage == 17 / 32
    assert histogram.perplexity == pytest.approx(math.sqrt(1 * 16))


def test_an_empty_histogram_has_no_perplexity():
    assert math.isnan(CodeHistogram(8).perplexity)


# ------------------------------------------------------------------------------------------------ gradients


def test_a_straight_through_estimator_hands_the_gradient_on_as_it_is():
    z = torch.randn(2, 4, 3, 3, generator=seeded())
    health = gradient_health(Plain(VQ(16, 4), z, torch.randn(4, 1, 1)), torch.zeros_like(z))
    assert health.ratio == pytest.approx(1.0)
    assert health.cosine == pytest.approx(1.0)


def test_index_backpropagation_hands_on_the_covariance_of_the_codes_times_the_gradient():
    torch.manual_seed(0)
    quantizer = IBQ(8, 3).double()
    z = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    slope = torch.randn(3, 1, 1, dtype=torch.float64)
    images = torch.full_like(z, -100.0)  # so that |image - made| has slope 1 everywhere
    health = gradient_health(Plain(quantizer, z, slope), images)
    codes = quantizer.weight.detach()
    p = (codes @ z.flatten()).softmax(0)
    covariance = (codes * p[:, None]).T @ codes - torch.outer(p @ codes, p @ codes)
    g = slope.flatten() / 3
    expected = covariance @ g
    assert health.ratio == pytest.approx(float(expected.norm() / g.norm()), rel=1e-9)
    assert health.cosine == pytest.approx(float(expected @ g / expected.norm() / g.norm()), rel=1e-9)


def test_codes_as_vqgan_starts_them_cut_the_encoder_off():
    z = torch.randn(2, 16, 4, 4, generator=seeded())
    quantizer = IBQ(256, 16)
    with torch.no_grad():
        quantizer.weight.uniform_(-1 / 256, 1 / 256)
    assert gradient_health(Plain(quantizer, z, 1.0), torch.zeros_like(z)).ratio < 1e-4


def test_measuring_moves_no_statistics():
    quantizer = EMA(16, 4)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    z = torch.randn(2, 4, 3, 3, generator=seeded())
    gradient_health(Plain(quantizer, z, 1.0), torch.zeros_like(z))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(before[name], value), name


def test_softmax_perplexity_is_k_for_latents_at_the_origin_and_one_for_long_ones():
    quantizer = IBQ(32, 4)
    assert softmax_perplexity(quantizer, torch.zeros(1, 4, 2, 2)) == pytest.approx(32.0, rel=1e-5)
    long = 1e4 * torch.randn(1, 4, 2, 2, generator=seeded())
    assert softmax_perplexity(quantizer, long) == pytest.approx(1.0, abs=1e-3)


def test_softmax_perplexity_does_not_depend_on_the_grouping(monkeypatch):
    quantizer, z = IBQ(32, 4), torch.randn(2, 4, 5, 5, generator=seeded())
    whole = softmax_perplexity(quantizer, z)
    monkeypatch.setattr("lexel.metrics.health.SOFTMAX_ELEMENTS", 100)
    assert softmax_perplexity(quantizer, z) == pytest.approx(whole, rel=1e-6)


# ------------------------------------------------------------------------------------------------ the verdict

HEALTHY = {
    "step": 1000,
    "usage": 0.97,
    "perplexity": 700.0,
    "softmax_perplexity": 12.0,
    "gradient_ratio": 0.9,
    "gradient_cosine": 0.6,
    "code_norm": 8.0,
    "latent_norm": 5.0,
}


def verdict(kind="ibq", train=(), history=(), **now):
    quantizer = outline({"kind": kind, "codebook_size": 1024, "codebook_dim": 4})
    return diagnose(quantizer, [*history, {**HEALTHY, **now}], train)


def test_a_healthy_codebook_gets_one_good_finding_with_its_numbers():
    (finding,) = verdict()
    assert finding.level == "good"
    assert "97.0% of 1024" in finding.seen


@pytest.mark.parametrize(
    "kind, now, level, seen, said",
    [
        ("vq", {"usage": 0.013, "perplexity": 9.0}, "problem", "13 of 1024", "never nearest"),
        ("vq", {"usage": 1 / 1024, "perplexity": 1.0}, "problem", "collapsed: 1 of 1024", "never nearest"),
        ("ema", {"usage": 0.5, "perplexity": 200.0}, "warning", "512 of 1024 codes are dead", "restart"),
        (
            "ibq",
            {"usage": 0.2, "perplexity": 90.0, "gradient_ratio": 1e-6},
            "problem",
            "most codes",
            "almost no gradient",
        ),
        ("ibq", {"gradient_ratio": 1e-3}, "problem", "1.0e-03 of the decoder's gradient", "variance"),
        ("ibq", {"gradient_cosine": 0.05}, "warning", "nearly orthogonal", "saturated"),
        ("ibq", {"gradient_ratio": 30.0}, "warning", "30.0 times", "variance"),
        ("vq", {"latent_norm": 200.0}, "warning", "much longer", "live apart"),
        ("ibq", {"perplexity": 20.0}, "note", "unevenly", "flat"),
        ("lfq", {"usage": 0.1, "perplexity": 50.0}, "problem", "most codes", "thresholds"),
        # 1,024 codes used evenly show 398 in 500 tokens on average.
        ("simvq", {"usage": 0.3, "tokens": 500}, "note", "307 of 1024 codes in use where 500 tokens", "too few"),
        ("simvq", {"usage": 0.09, "tokens": 500}, "problem", "92 of 1024 in use (9.0%) where 500", "fall behind"),
        ("simvq", {"usage": 0.24, "tokens": 50_000}, "problem", "246 of 1024 in use (24.0%)", "fall behind"),
    ],
)
def test_every_illness_is_named_with_its_cause(kind, now, level, seen, said):
    finding = verdict(kind, **now)[0]
    assert finding.level == level
    assert seen in finding.seen
    assert said in finding.cause + finding.change
    assert finding.cause
    assert finding.change


def test_a_straight_through_quantizer_is_not_blamed_for_its_gradient():
    assert verdict("vq", gradient_ratio=1.0, gradient_cosine=0.05)[0].level == "good"


@pytest.mark.parametrize("kind", ["lfq", "bsq", "fsq", "residual", "product", "cosine"])
def test_gradients_and_norms_are_not_compared_where_the_method_does_not_compare_them(kind):
    (finding,) = verdict(kind, gradient_ratio=1e-3, gradient_cosine=0.05)
    assert finding.level == "good"
    if kind != "product":
        assert verdict(kind, latent_norm=200.0)[0].level == "good"


def test_a_bridge_that_starts_at_zero_is_given_time():
    now = {"usage": 1 / 1024, "perplexity": 1.0}
    assert verdict("fvq", **now)[0].level == "note"
    assert verdict("fvq", history=[HEALTHY] * 2, **now)[0].level == "problem"
    assert diagnose(FVQ(64, 4, width=16, start="residual"), [{**HEALTHY, **now}])[0].level == "problem"


def test_a_fall_in_usage_names_the_step_it_fell_from():
    findings = verdict(usage=0.82, history=[{**HEALTHY, "step": 500, "usage": 0.99}])
    assert any("fell from 99.0% at step 500 to 82.0%" in finding.seen for finding in findings)


def test_saturation_counts_from_the_second_validation_on():
    assert verdict(softmax_perplexity=1.05)[0].level == "good"
    assert "softmax perplexity 1.05" in verdict(softmax_perplexity=1.05, history=[HEALTHY])[0].seen


def test_a_discriminator_that_wins_is_seen_in_the_train_lines():
    lines = [{"step": step, "logits_real": 3.0, "logits_fake": -3.0} for step in range(5)]
    assert "with ease" in verdict(train=lines)[0].seen
    assert verdict(train=lines[:4])[0].level == "good"


def test_the_gravest_finding_comes_first():
    findings = verdict(usage=0.1, perplexity=5.0, latent_norm=1000.0)
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=("problem", "warning", "note", "good").index)
    assert levels[0] == "problem"


def test_a_run_without_validation_is_young_not_ill():
    (finding,) = diagnose(IBQ(1024, 4), [])
    assert finding.level == "note"
