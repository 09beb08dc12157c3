"""What is particular to each method: its formulas against dense ones, its options, its schedules."""

import contextlib
import inspect
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fuzz import counts, survives
from torch import Tensor

import lexel.quantizers
from lexel.checkpoint import load_strict
from lexel.errors import UsageError
from lexel.kernels.clustering import kmeans, pick_rows
from lexel.quantizers import (
    BSQ,
    EMA,
    FSQ,
    FVQ,
    IBQ,
    LFQ,
    QUANTIZERS,
    VQ,
    VQGANLC,
    Affine,
    Continuous,
    Cosine,
    Gumbel,
    Product,
    Residual,
    SimVQ,
    Soft,
    Table,
    build,
    build_bank,
    load_bank,
    registry,
    save_bank,
)
from lexel.quantizers.base import as_vectors, rotate, straight_through, weighted_sum
from lexel.quantizers.fsq import choose_levels
from lexel.quantizers.soft import soft_assign
from lexel.runtime import without_weights


def latents(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# gradients past the codes


def test_straight_through_is_the_code_to_the_bit_and_the_latent_in_gradient():
    z, z_q = latents(2, 4, 3).requires_grad_(), latents(2, 4, 3, seed=3)
    passed = straight_through(z, z_q)
    passed.backward(latents(2, 4, 3, seed=4))
    assert torch.equal(passed, z_q)
    assert torch.equal(z.grad, latents(2, 4, 3, seed=4))


def test_rotation_takes_the_gradient_along_from_code_to_latent():
    z, z_q = latents(6, 5).double().requires_grad_(), latents(6, 5, seed=3).double()
    passed = rotate(z, z_q)
    assert torch.equal(passed, z_q)
    gradient = latents(6, 5, seed=4).double()
    passed.backward(gradient)
    scale = z_q.norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), scale * gradient.norm(dim=1))  # a rotation and a scale
    # The angle between gradient and code becomes the angle between gradient and latent.
    torch.testing.assert_close(F.cosine_similarity(z.grad, z.detach()), F.cosine_similarity(gradient, z_q))


def test_rotation_is_finite_at_zero_and_at_opposite_vectors():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    z_q = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    passed = rotate(z, z_q)
    passed.sum().backward()
    assert torch.equal(passed, z_q)
    assert z.grad.isfinite().all()


def test_a_term_without_a_weight_is_refused_and_no_terms_weigh_nothing():
    with pytest.raises(UsageError, match="no weight for the loss term 'codebook'"):
        weighted_sum({"codebook": torch.ones(())}, {"commitment": 1.0})
    assert weighted_sum({}, {}) == 0


# EMA


def test_ema_is_the_decayed_mean_of_the_latents_that_chose_a_code():
    quantizer = EMA(3, 1, decay=0.5, epsilon=0.0)
    start = torch.tensor([[0.0], [10.0], [20.0]])
    quantizer.place(torch.tensor([True, True, True]), start, torch.ones(3))
    quantizer(torch.tensor([[[1.0, 2.0, 9.0]]]))  # two latents choose code 0, one chooses code 1
    # counts (1, 1, 1) -> (1.5, 1, 0.5), sums (0, 10, 20) -> (1.5, 9.5, 10)
    torch.testing.assert_close(quantizer.counts, torch.tensor([1.5, 1.0, 0.5]))
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[1.0], [9.5], [20.0]]))


def test_ema_learns_in_training_only():
    quantizer = EMA(16, 4)
    before = quantizer.codebook.clone()
    quantizer.eval()(latents(2, 4, 5))
    assert torch.equal(quantizer.codebook, before)
    quantizer.train()(latents(2, 4, 5))
    assert not torch.equal(quantizer.codebook, before)


def test_ema_starts_from_kmeans_once():
    centres = torch.tensor([[-8.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    z = (centres[:, None] + 0.1 * latents(3, 40, 2)).flatten(0, 1).T[None]
    quantizer = EMA(3, 2, start="kmeans")
    quantizer(z)
    assert torch.cdist(centres, quantizer.codebook).min(1).values.max() < 0.3
    moved = quantizer.codebook.clone()
    quantizer(z + 100)
    assert (quantizer.codebook - moved).abs().max() < 5  # one step of the averages, no new start
    assert quantizer.counts.sum() == pytest.approx(120)


def test_kmeans_lowers_the_distance_and_copes_with_too_few_vectors():
    vectors = latents(300, 3)
    few, many = (kmeans(vectors, 8, iterations)[0] for iterations in (1, 20))
    assert (
        torch.cdist(vectors, many).min(1).values.square().mean()
        < torch.cdist(vectors, few).min(1).values.square().mean()
    )
    assert len(torch.unique(kmeans(vectors[:5], 16)[0], dim=0)) == 16


def test_dead_codes_become_latents_of_the_batch_and_live_ones_stay():
    quantizer = EMA(8, 2, restart_below=0.5)
    quantizer.counts[:] = torch.tensor([1.0, 0.1, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0])
    before, z = quantizer.codebook.clone(), latents(1, 2, 30)
    quantizer._restart(as_vectors(z), 0)
    changed = (quantizer.codebook != before).any(1)
    assert changed.tolist() == [False, True, False, True, False, False, False, False]
    assert all((as_vectors(z) == code).all(1).any() for code in quantizer.codebook[changed])


def test_restart_gives_full_usage_where_plain_averages_collapse():
    used = {}
    for restart in (0.0, 0.5):
        torch.manual_seed(0)
        quantizer = EMA(32, 4, decay=0.9, restart_below=restart)
        quantizer.place(
            torch.ones(32, dtype=torch.bool), 5 + 0.01 * latents(32, 4), torch.ones(32)
        )  # all codes far off, together
        for step in range(40):
            indices = quantizer(latents(4, 4, 64, seed=step)).indices
        used[restart] = len(indices.unique())
    assert used[0.0] < 16
    assert used[0.5] >= 30


def test_drawn_rows_differ_even_where_there_are_too_few():
    generator = torch.Generator().manual_seed(0)
    assert len(torch.unique(pick_rows(latents(10, 2), 10, generator), dim=0)) == 10
    assert len(torch.unique(pick_rows(latents(3, 2), 10, generator), dim=0)) == 10


# cosine


def test_cosine_does_not_see_the_length_of_latents():
    quantizer = Cosine(64, 4).eval()
    z = latents(2, 4, 9)
    short, long = quantizer(z), quantizer(z * 50)
    assert torch.equal(short.indices, long.indices)
    torch.testing.assert_close(short.losses["commitment"], long.losses["commitment"])
    torch.testing.assert_close(short.z_q.norm(dim=1), torch.ones(2, 9))


# lookup-free


def dense_entropies(z: Tensor, codebook: Tensor, temperature: float, epsilon: float) -> tuple[Tensor, Tensor]:
    log_p = (-torch.cdist(as_vectors(z), codebook).square() / temperature).log_softmax(1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + epsilon).log()).sum()


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("codebook_dim", [10, 23, 4, 1], ids=lambda d: f"D={d}")
def test_lfq_entropies_equal_those_over_the_whole_table(codebook_dim, temperature):
    quantizer = LFQ(1024, codebook_dim, temperature=temperature).double()
    z = 0.3 * latents(3, codebook_dim, 7).double()
    z.requires_grad_()
    expected = dense_entropies(z, quantizer.codebook, temperature, 1e-5)
    losses = quantizer(z).losses
    for name, value in zip(("entropy_sample", "entropy_batch"), expected, strict=True):
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-12)
        ours, theirs = (torch.autograd.grad(term, z, retain_graph=True)[0] for term in (losses[name], value))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_the_entropy_of_a_quarter_million_codes_makes_no_large_tensor():
    losses = LFQ(2**18, 18)(latents(2, 18, 64)).losses
    sample, batch = losses["entropy_sample"], losses["entropy_batch"]
    assert 0 <= sample < batch <= sample + math.log(128)


def test_bits_of_lfq_are_low_first_or_high_first():
    z = torch.tensor([[1.0, -1.0, -0.5, 0.0]])  # zero is -1
    assert LFQ(16, 4)(z).indices.item() == 0b0001
    assert LFQ(16, 4, bit_order="high_first")(z).indices.item() == 0b1000
    torch.testing.assert_close(LFQ(16, 4)(z).z_q, torch.tensor([[1.0, -1.0, -1.0, -1.0]]))


def test_lfq_repeats_bits_over_more_channels_and_stacks_them_in_fewer():
    assert torch.equal(LFQ(4, 5).codebook[1], torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    assert LFQ(4, 1).codebook.flatten().tolist() == [-1.5, -0.5, 0.5, 1.5]
    # The mean over a bit's channels decides: the nearest row of the table.
    assert LFQ(4, 4)(torch.tensor([[3.0, -1.0, -1.0, -1.0]])).indices.item() == 1


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_sign_codes_come_in_powers_of_two(kind):
    with pytest.raises(UsageError, match="powers of two, got codebook_size 100; try 64"):
        kind(100, 7)


@pytest.mark.parametrize("codebook_dim", [6, 16])
def test_bsq_lies_on_the_sphere_and_its_entropies_equal_those_over_the_table(codebook_dim):
    quantizer = BSQ(64, codebook_dim, temperature=0.3, group_bits=None).double()
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(64).double())
    z = latents(3, codebook_dim, 7).double()
    losses = quantizer(z).losses
    expected = dense_entropies(F.normalize(z, dim=1), quantizer.codebook, 0.3, 1e-8)
    torch.testing.assert_close(losses["entropy_sample"], expected[0])
    torch.testing.assert_close(losses["entropy_batch"], expected[1])


@pytest.mark.parametrize("codebook_dim", [6, 16])
def test_the_encoders_gradient_passes_the_signs_of_bsq_and_is_scaled_afterwards(codebook_dim):
    quantizer = BSQ(64, codebook_dim).double()
    z, g = latents(3, codebook_dim, 7).double().requires_grad_(), latents(3, codebook_dim, 7, seed=3).double()
    z_q, _, losses = quantizer(z)
    # Released: u = z / |z|, s = u + stop(sign(u) - u), z_q = s / sqrt(D).
    released = F.normalize(z, dim=1) / codebook_dim**0.5
    torch.testing.assert_close(
        torch.autograd.grad(z_q, z, g, retain_graph=True)[0], torch.autograd.grad(released, z, g, retain_graph=True)[0]
    )
    distance = (F.normalize(z, dim=1) - z_q.detach()).square().sum(1).mean()  # a sum over channels
    torch.testing.assert_close(losses["commitment"], distance)


def test_bsq_sums_the_batch_entropy_over_groups_of_bits():
    z = latents(3, 6, 7).double()
    together = BSQ(64, 6, group_bits=3).double()(z).losses["entropy_batch"]
    halves = [BSQ(8, 3, group_bits=None).double() for _ in range(2)]
    for half in halves:
        half.scale = 6**-0.5
        half._prepare = lambda part: part
    parts = F.normalize(z, dim=1).split(3, 1)
    expected = sum(half(part).losses["entropy_batch"] for half, part in zip(halves, parts, strict=True))
    torch.testing.assert_close(together, expected)


# finite scalar


def test_levels_are_the_published_ones_where_they_multiply_exactly():
    published = {
        1000: (8, 5, 5, 5),
        4375: (7, 5, 5, 5, 5),
        15360: (8, 8, 8, 6, 5),
        16384: (8, 8, 8, 8, 4),
        64000: (8, 8, 8, 5, 5, 5),
        262144: (8,) * 6,
    }
    assert {size: choose_levels(size, 8) for size in published} == published
    assert choose_levels(16384, 2) == (128, 128)
    assert choose_levels(31, 5) == (31,)


def test_fsq_rounds_each_channel_to_its_levels():
    quantizer = FSQ(6, 2, levels=[3, 2])
    ends = quantizer(torch.tensor([[-50.0, -50.0], [0.0, 50.0], [50.0, 50.0]]))
    torch.testing.assert_close(ends.z_q, torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]]))
    assert ends.indices.tolist() == [0, 4, 5]  # channel 0 is the lowest digit


def test_two_levels_of_fsq_are_parted_at_zero():
    quantizer = FSQ(2, 1, levels=[2]).double()
    z = torch.tensor([[-3.0], [-0.01], [0.01], [3.0]], dtype=torch.float64, requires_grad=True)
    z_q, indices, _ = quantizer(z)
    assert indices.tolist() == [0, 0, 1, 1]
    assert z_q.flatten().tolist() == [-1, -1, 0, 0]
    z_q.sum().backward()
    half = 1.001 / 2
    torch.testing.assert_close(z.grad, half * (1 - z.detach().tanh() ** 2))
    assert FSQ(64, 6, levels=[2] * 6)(latents(1, 6, 999)).indices.unique().numel() / 64 > 0.4


def test_fsq_has_the_tanhs_gradient():
    z = latents(4, 1).double().requires_grad_()
    FSQ(5, 1, levels=[5]).double()(z).z_q.sum().backward()
    half = 4 * 1.001 / 2
    torch.testing.assert_close(z.grad, half * (1 - z.detach().tanh() ** 2) / 2)


def test_fsq_reaches_the_ends_of_very_many_levels_without_leaving_them():
    indices = FSQ(16384, 1)(torch.tensor([[-50.0], [50.0]])).indices
    assert indices.tolist() == [0, 16383]


@pytest.mark.parametrize("levels", [[8, 8], [64, 1], []], ids=str)
def test_levels_that_do_not_multiply_to_the_size_are_refused(levels):
    with pytest.raises(UsageError, match="multiply to codebook_size 1000"):
        FSQ(1000, 4, levels=levels)


def test_more_levels_than_channels_are_refused():
    with pytest.raises(UsageError, match="4 levels need at least as many channels, got codebook_dim 3"):
        FSQ(1000, 3, levels=[8, 5, 5, 5])


# soft and Gumbel


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("tau", [1e-3, 0.9])
def test_soft_vq_in_tiles_equals_the_dense_softmax(similarity, tau):
    torch.manual_seed(0)
    quantizer = Soft(50, 6, tau_start=tau, tau_end=tau, similarity=similarity).double()
    z = latents(2, 6, 5).double().requires_grad_()
    gradient = latents(2, 6, 5, seed=4).double()
    rows, codes = as_vectors(z), quantizer.weight
    logits = rows @ codes.T if similarity == "dot" else -(rows[:, None] - codes).square().sum(2)
    dense = ((logits / tau).softmax(1) @ codes).view(2, 5, 6).movedim(-1, 1)
    expected = torch.autograd.grad(dense, [z, codes], gradient)

    quantizer.progress.fill_(0)
    z_q, indices, _ = quantizer(z)
    torch.testing.assert_close(z_q, dense)
    assert torch.equal(indices, logits.argmax(1).view(2, 5))
    for ours, theirs in zip(torch.autograd.grad(z_q, [z, codes], gradient), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_tile_does_not_change_the_average():
    z, keys, bias, values = latents(9, 3), latents(20, 3, seed=3), latents(20, seed=4), latents(20, 2, seed=5)
    whole = soft_assign(z, keys, bias, values, torch.tensor(0.5), tile=100)
    tiled = soft_assign(z, keys, bias, values, torch.tensor(0.5), tile=7)
    torch.testing.assert_close(tiled[0], whole[0])
    assert torch.equal(tiled[1], whole[1])


@pytest.mark.parametrize("kind", [Soft, Gumbel])
def test_the_temperature_falls_along_half_a_cosine(kind):
    quantizer = kind(4, 2, tau_start=0.9, tau_end=0.1)
    temperatures = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        quantizer.anneal(progress)
        temperatures.append(quantizer.temperature.item())
    assert temperatures == pytest.approx([0.9, 0.5 + 0.4 * math.sqrt(0.5), 0.5, 0.1], abs=1e-6)
    with pytest.raises(UsageError, match=r"above 0, got .* and 0\.0"):
        kind(4, 2, tau_end=0.0)


def test_soft_vq_tells_the_gap_and_closes_it_as_the_temperature_falls():
    z = latents(2, 4, 9)
    gaps = []
    for tau in (10.0, 1.0, 0.01):
        torch.manual_seed(0)
        quantizer = Soft(64, 4, tau_start=tau)
        result = quantizer(z)
        hard = quantizer.indices_to_codes(result.indices)
        torch.testing.assert_close(result.losses["gap"], F.mse_loss(result.z_q, hard))
        gaps.append(result.losses["gap"].item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.01 * gaps[0]


def test_soft_vq_uses_the_best_code_once_it_is_hard_with_the_averages_gradient():
    torch.manual_seed(0)
    quantizer = Soft(16, 4, hard_from=0.5, tau_start=1.0, tau_end=1.0)
    z, gradient = latents(2, 4, 5).requires_grad_(), latents(2, 4, 5, seed=4)
    expected = torch.autograd.grad(quantizer(z).z_q, z, gradient)[0]
    quantizer.anneal(0.5)
    result = quantizer(z)
    assert torch.equal(result.z_q, quantizer.indices_to_codes(result.indices))
    torch.testing.assert_close(torch.autograd.grad(result.z_q, z, gradient)[0], expected)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_equals_pytorchs_gumbel_softmax_over_its_logits(hard):
    quantizer = Gumbel(12, 4, tau_start=0.7, hard=hard)
    z, gradient = latents(2, 4, 5).requires_grad_(), latents(2, 4, 5, seed=4)
    inputs = [z, quantizer.weight, quantizer.logits.weight]
    torch.manual_seed(3)
    z_q = quantizer(z).z_q
    ours = torch.autograd.grad(z_q, inputs, gradient)
    torch.manual_seed(3)
    y = F.gumbel_softmax(quantizer.logits(as_vectors(z)), tau=0.7, hard=hard)
    expected = (y @ quantizer.weight).view(2, 5, 4).movedim(-1, 1)
    torch.testing.assert_close(z_q, expected)
    for one, other in zip(ours, torch.autograd.grad(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gumbels_kl_is_the_divergence_from_the_uniform_distribution():
    quantizer = Gumbel(8, 3)
    p = quantizer.logits(latents(5, 3)).softmax(1)
    expected = F.kl_div(torch.full((5, 8), 1 / 8).log(), p, reduction="batchmean")
    torch.testing.assert_close(quantizer(latents(5, 3)).losses["kl"], expected)
    torch.nn.init.zeros_(quantizer.logits.weight)
    torch.nn.init.zeros_(quantizer.logits.bias)
    assert quantizer(latents(5, 3)).losses["kl"].item() == pytest.approx(0, abs=1e-6)


# projected tables


def test_simvq_moves_every_code_with_one_chosen():
    quantizer = SimVQ(32, 4)
    before = quantizer.codebook.detach().clone()
    quantizer.loss(quantizer(latents(1, 4)).losses).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= parameter.grad
    assert (quantizer.codebook - before).abs().amin(1).sum() > 0
    assert ((quantizer.codebook - before).norm(dim=1) > 0).all()


@pytest.mark.parametrize("spread", ["full", "channel"])
def test_affine_codes_are_spread_as_the_latents_are_from_the_first_batch_on(spread):
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 5
    mixing = mixing if spread == "full" else mixing.diagonal().diag()
    z = (latents(4000, 3) @ mixing.T + torch.tensor([7.0, -2.0, 0.5])).T[None]
    quantizer = Affine(20000, 3, spread=spread)
    quantizer(z)
    torch.testing.assert_close(quantizer.codebook.mean(0), z[0].mean(1), atol=0.2, rtol=0)
    torch.testing.assert_close(quantizer.codebook.T.cov(), z[0].cov(), atol=0.05 * z[0].cov().abs().amax(), rtol=0)


def test_affine_indices_do_not_change_when_latents_are_stretched_and_moved_together():
    z, quantizer, other = latents(2, 4, 50), Affine(64, 4), Affine(64, 4)
    other.load_state_dict(quantizer.state_dict())
    indices, moved = quantizer(z).indices, other(1000 * z + 5).indices
    assert torch.equal(indices, moved)
    assert indices.unique().numel() > 20


def test_affine_statistics_are_a_plain_mean_first_and_then_forget_at_their_decay():
    quantizer = Affine(8, 2, decay=0.75)
    means = []
    for step in range(6):
        z = latents(1, 2, 30, seed=step) + step
        means.append(z.mean((0, 2)))
        quantizer(z)
    expected = sum(means[:4]) / 4
    for mean in means[4:]:
        expected = 0.75 * expected + 0.25 * mean
    torch.testing.assert_close(quantizer.mean, expected)
    before = quantizer.covariance.clone()
    quantizer.eval()(latents(1, 2, 30))
    assert torch.equal(quantizer.covariance, before)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_affine_has_a_root_where_wide_latents_lie_on_a_line(scale):
    quantizer = Affine(16, 256)
    for step in range(20):
        z = scale * latents(2, 1, 300, seed=step) * latents(1, 256, 1)
        assert quantizer(z).z_q.isfinite().all()
    spread_of_codes = quantizer.codebook.var(0).sum() / z.var((0, 2)).sum()
    assert 0.2 < spread_of_codes < 5


def test_affine_passes_latents_on_that_are_no_numbers():
    quantizer = Affine(16, 4)
    assert quantizer.loss(quantizer(torch.full((1, 4, 3), torch.nan)).losses).isnan()


def test_affine_tells_codes_apart_in_directions_without_latents():
    quantizer = Affine(64, 4)
    z = latents(1, 4, 50) * torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    assert quantizer(z).z_q.isfinite().all()
    assert quantizer.codebook.unique(dim=0).shape == (64, 4)
    assert quantizer(torch.zeros(1, 4, 50)).z_q.isfinite().all()


def test_the_bridge_runs_once_in_evaluation_and_at_every_use_in_training():
    quantizer = FVQ(64, 4, width=16)
    calls = []
    quantizer.bridge.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        quantizer(latents(2, 4, 5))
    assert len(calls) == 3
    quantizer.eval()
    for _ in range(3):
        quantizer.indices_to_codes(quantizer(latents(2, 4, 5)).indices)
    assert len(calls) == 4
    with torch.no_grad():
        quantizer.bridge.recover.bias += 1  # a new weight is seen
    assert (quantizer.codebook == 1).all()
    quantizer.train()
    assert quantizer(latents(2, 4, 5)).losses["codebook"].requires_grad


def test_the_zero_start_uses_one_code_and_learning_parts_them_slot_by_slot():
    torch.manual_seed(0)
    quantizer = FVQ(64, 4, width=32, patch=2)  # 16 squares of 4 slots
    assert quantizer(latents(4, 4, 32)).indices.unique().tolist() == [0]
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    different = []
    for step in range(30):
        optimizer.zero_grad()
        quantizer.loss(quantizer(latents(4, 4, 32, seed=step)).losses).backward()
        optimizer.step()
        different.append(len(torch.unique(quantizer.codebook, dim=0)))
    assert different[0] == 17  # the chosen slot of every square has moved, the other 48 codes are still at zero
    assert different[-1] == 64


def test_the_residual_start_is_the_table():
    quantizer = FVQ(64, 4, width=16, start="residual")
    assert torch.equal(quantizer.codebook, quantizer.weight)


def test_a_square_of_codes_becomes_a_token():
    quantizer = FVQ(36, 1, width=8, patch=3, depth=0)
    with torch.no_grad():
        quantizer.weight[:, 0] = torch.arange(36.0)
    seen = []
    quantizer.bridge.compress.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    quantizer(latents(1, 1))
    table = torch.arange(36.0).view(6, 6)
    assert torch.equal(seen[0][0, 1], table[:3, 3:].flatten())
    # and its square comes back to where it was taken from
    torch.nn.init.zeros_(quantizer.bridge.recover.bias)
    with torch.no_grad():
        quantizer.bridge.recover.bias[:] = torch.arange(9.0)
    assert torch.equal(quantizer.codebook.view(6, 6)[3:, :3], torch.arange(9.0).view(3, 3))


@pytest.mark.parametrize(
    "size, shape", [(16384, (32, 4, 32, 4)), (65536, (32, 8, 32, 8)), (32768, (32, 4, 64, 4)), (1000, (10, 2, 25, 2))]
)
def test_the_picture_of_codes_is_as_square_as_it_can_be(size, shape):
    assert FVQ(size, 2, width=4, depth=0).bridge.shape == shape


def test_the_papers_bridge_has_its_parameters():
    bridge = FVQ(16384, 256).bridge
    assert sum(parameter.numel() for parameter in bridge.parameters()) == pytest.approx(3.15e6, rel=0.01)


def test_squares_that_do_not_tile_the_codes_are_refused():
    with pytest.raises(UsageError, match="squares of 4 x 4 codes do not tile 1000 codes; try patch=1"):
        FVQ(1000, 4, patch=4)
    with pytest.raises(UsageError, match="width must be a multiple of the 4 heads, got 18"):
        FVQ(64, 4, width=18)


@pytest.mark.parametrize("bridge, layers", [("linear", 1), ("mlp", 5)])
def test_the_ablations_bridges_are_one_linear_layer_and_five_with_relu(bridge, layers):
    quantizer = FVQ(64, 4, bridge=bridge)
    assert sum(isinstance(module, torch.nn.Linear) for module in quantizer.modules()) == layers
    assert len(torch.unique(quantizer.codebook, dim=0)) > 1
    quantizer.loss(quantizer(latents(2, 4, 5)).losses).backward()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


# VQGAN-LC


def test_a_bank_is_the_centres_of_the_features():
    centres = torch.tensor([[-9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, -9.0]])
    features = (centres[:, None] + 0.1 * latents(4, 50, 2)).flatten(0, 1)
    bank = build_bank(features, size=4)
    assert torch.cdist(centres, bank).min(1).values.max() < 0.5


def test_a_bank_per_class_gives_each_class_its_share():
    features = torch.cat([latents(30, 2), 100 + latents(30, 2), 200 + latents(2, 2)])
    labels = [0] * 30 + [1] * 30 + [2] * 2
    bank = build_bank(features, size=7, labels=labels)
    assert [int(((bank[:, 0] - 100 * c).abs() < 50).sum()) for c in range(3)] == [3, 2, 2]
    with pytest.raises(UsageError, match="3 centres need at least as many features, got 2 of class 2"):
        build_bank(features, size=9, labels=labels)


def test_a_saved_model_needs_its_bank_file_no_more(tmp_path):
    path = tmp_path / "bank.safetensors"
    save_bank(latents(32, 6), path)
    assert torch.equal(load_bank(path), latents(32, 6))
    options = {"codebook_size": 32, "codebook_dim": 4, "bank": str(path), "feature_dim": 6}
    quantizer = build("vqgan_lc", options).eval()
    assert torch.equal(quantizer.bank, latents(32, 6))
    path.unlink()
    with pytest.raises(UsageError, match=r"bank\.safetensors does not exist"):
        build("vqgan_lc", options)
    with without_weights():
        loaded = build("vqgan_lc", options)
    load_strict(loaded, quantizer.state_dict(), "saved")
    assert torch.equal(loaded.eval()(latents(2, 4, 5)).z_q, quantizer(latents(2, 4, 5)).z_q)


def test_a_bank_of_another_size_or_no_bank_at_all_is_refused(tmp_path):
    with pytest.raises(UsageError, match="codebook_size x feature_dim = 32 x 768, got 32 x 6"):
        VQGANLC(32, 4, bank=latents(32, 6))
    (tmp_path / "no.safetensors").write_bytes(b"this is no bank")
    with pytest.raises(UsageError, match="no safetensors file"):
        load_bank(tmp_path / "no.safetensors")
    with pytest.raises(UsageError, match=r"gone\.safetensors does not exist"):
        load_bank(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("hidden", [None, 256])
def test_vqgan_lc_starts_as_released(hidden):
    quantizer = VQGANLC(4096, 8, hidden=hidden)
    if hidden is None:  # N(0, 1/8) on 768 features
        assert quantizer.projector[0].weight.std().item() == pytest.approx(8**-0.5, rel=0.05)
        assert quantizer.codebook.std().item() == pytest.approx((768 / 8) ** 0.5, rel=0.2)
    else:  # two layers as PyTorch starts them: codes of about a tenth, not sixteen
        bound = 768**-0.5
        assert quantizer.projector[0].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert 0.05 < quantizer.codebook.std().item() < 0.3


def test_the_projector_can_have_a_hidden_layer():
    quantizer = VQGANLC(32, 4, feature_dim=6, hidden=10)
    bank, first, last = quantizer.bank, quantizer.projector[0], quantizer.projector[2]
    torch.testing.assert_close(quantizer.codebook, last(first(bank).relu()))


# residual and product


@pytest.mark.parametrize("base", ["vq", "ema", "cosine", "ibq", "soft", "gumbel", "lfq", "bsq", "fsq", "simvq", "fvq"])
@pytest.mark.parametrize("structure", [Residual, Product])
def test_any_simple_quantizer_can_be_stacked(structure, base):
    quantizer = structure(16, 4, base=base)
    z = latents(3, 4, 5).requires_grad_()
    z_q, indices, losses = quantizer(z)
    (z_q.square().sum() + quantizer.loss(losses)).backward()
    assert indices.shape == (3, quantizer.books, 5)
    assert z.grad.isfinite().all()
    if base != "soft":
        torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)
    quantizer.eval()
    z_q, indices, _ = quantizer(z)
    assert torch.equal(quantizer.assign(z), indices)
    torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)


def test_levels_quantize_what_is_left():
    quantizer = Residual(2, 1, depth=3)
    for level, size in zip(quantizer, (4.0, 2.0, 1.0), strict=True):
        level.weight.data = torch.tensor([[-size], [size]])
    z_q, indices, losses = quantizer(torch.tensor([[5.2]]))  # 4, then 2, then -1
    assert indices.tolist() == [[1, 1, 0]]
    assert z_q.item() == pytest.approx(5.0)
    left = [5.2 - 4, 5.2 - 6, 5.2 - 5]
    assert losses["commitment"].item() == pytest.approx(sum(x * x for x in left) / 3, rel=1e-5)


def test_every_level_commits_the_latents_but_the_decoders_gradient_passes_once():
    quantizer = Residual(16, 4, depth=3)
    z = latents(2, 4, 5).requires_grad_()
    result = quantizer(z)
    sums = torch.stack(
        [level.indices_to_codes(index) for level, index in zip(quantizer, result.indices.unbind(1), strict=True)]
    ).cumsum(0)
    expected = sum(2 * (z - so_far).detach() / z.numel() for so_far in sums) / 3
    torch.testing.assert_close(torch.autograd.grad(result.losses["commitment"], z, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(result.z_q.sum(), z)[0], torch.ones_like(z))


def test_a_shared_book_stands_once_and_rq_vae_can_be_written():
    quantizer = Residual(16, 4, depth=4, base="ema", shared=True, base_options={"restart_below": 0.1})
    assert set(quantizer.state_dict()) == {f"levels.0.{name}" for name in ("weight", "counts", "sums", "steps")}
    assert quantizer.codebook.shape == (4, 16, 4)
    z_q, indices, _ = quantizer(latents(2, 4, 5))
    assert quantizer[0].steps == 4
    torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)


@pytest.mark.parametrize("structure", [Residual, Product])
def test_every_level_is_told_how_far_training_is(structure):
    quantizer = structure(16, 4, base="soft", base_options={"tau_start": 1.0, "tau_end": 0.5})
    quantizer.anneal(1.0)
    assert [level.temperature.item() for level in quantizer] == pytest.approx([0.5] * quantizer.books)


def test_shrinking_levels_make_residual_signs_finer():
    z = latents(4, 6, 50)
    errors = [F.mse_loss(Residual(64, 6, depth=d, base="lfq", shrink=0.5)(z).z_q, z).item() for d in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert Residual(64, 6, depth=3, base="lfq", shrink=0.5).codebook[2].abs().unique().tolist() == [0.25]


def test_parts_of_a_product_see_their_channels_only():
    quantizer = Product(16, 5, parts=2).eval()
    assert [level.codebook_dim for level in quantizer] == [3, 2]
    z = latents(2, 5, 7)
    other = torch.cat([z[:, :3], latents(2, 2, 7, seed=9)], 1)
    assert torch.equal(quantizer.assign(z)[:, 0], quantizer.assign(other)[:, 0])
    assert torch.equal(quantizer.codebook[0, :, 3:], torch.zeros(16, 2))
    assert torch.equal(quantizer.codebook[1, :, :3], torch.zeros(16, 3))


def test_structures_refuse_what_cannot_be():
    with pytest.raises(UsageError, match="depth must be at least 1, got 0"):
        Residual(16, 4, depth=0)
    with pytest.raises(UsageError, match="parts must be from 1 to codebook_dim 4, got 5"):
        Product(16, 4, parts=5)
    with pytest.raises(UsageError, match="unknown base quantizer 'product'"):
        Residual(16, 4, base="product")
    with pytest.raises(UsageError, match="quantizer 'vq' has no option 'depth'"):
        Residual(16, 4, base_options={"depth": 3})


def test_a_structure_of_what_cannot_be_baked_cannot_be_baked():
    with pytest.raises(UsageError, match="FSQ has no table"):
        Residual(16, 4, base="fsq").bake()


# the rest of the table


def test_continuous_latents_pass_and_have_no_codes():
    quantizer = build("none", {"codebook_dim": 4})
    z = latents(2, 4, 3).requires_grad_()
    z_q, indices, losses = quantizer(z)
    assert z_q is z
    assert indices.shape == (2, 3)
    assert not losses
    for use in (lambda: quantizer.codebook, lambda: quantizer.assign(z), quantizer.bake):
        with pytest.raises(UsageError, match="continuous latents have no codes"):
            use()
    assert isinstance(quantizer, Continuous)


def test_every_similarity_of_ibq_bakes_to_itself():
    z = latents(4, 6, 30)
    choices = {}
    for similarity in ("dot", "l2", "cosine"):
        torch.manual_seed(0)
        quantizer = IBQ(64, 6, similarity=similarity).eval()
        choices[similarity] = quantizer(z).indices
        assert torch.equal(quantizer.bake()(z).indices, choices[similarity])
    assert not torch.equal(choices["dot"], choices["l2"])
    assert not torch.equal(choices["dot"], choices["cosine"])


def test_vq_searches_by_distance_not_by_direction():
    quantizer = VQ(2, 1)
    quantizer.weight.data = torch.tensor([[1.0], [10.0]])
    assert quantizer(torch.tensor([[2.0]])).indices.item() == 0


def test_an_unknown_kind_or_option_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"unknown quantizer 'vqq'; choose from .*simvq"):
        build("vqq", {})
    with pytest.raises(UsageError, match="quantizer 'lfq' has no option 'level'; its options are codebook_size"):
        build("lfq", {"level": 3})
    with pytest.raises(UsageError, match="needs the option 'codebook_size'"):
        build("lfq", {"codebook_dim": 3})


def test_the_example_of_the_page_on_extending_is_a_quantizer(monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "extending" / "quantizer.md").read_text(encoding="utf-8")
    source = re.search(r'```python\n("""A frozen.*?)```', page, re.DOTALL)[1]
    module: dict = {}
    exec(source, module)  # the page's own code
    monkeypatch.setitem(QUANTIZERS, "scaled", module["Scaled"])
    quantizer = build("scaled", {"codebook_size": 32, "codebook_dim": 4})
    z = latents(2, 4, 5).requires_grad_()
    z_q, indices, losses = quantizer(z)
    (z_q.sum() + quantizer.loss(losses)).backward()
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    assert quantizer.scale.grad.abs().sum() > 0
    assert torch.equal(quantizer.bake()(z).indices, indices)


@pytest.mark.parametrize("kind", [*sorted(QUANTIZERS), "table", "none"])
def test_the_example_in_the_documentation_of_a_class_works(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cls = (QUANTIZERS | {"table": Table, "none": Continuous})[kind]
    text = inspect.getdoc(cls).split("Args:")[0]
    example = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert cls.__name__ in example or kind == "table"
    names = {**vars(lexel.quantizers), "torch": torch, "quantizer": VQ(16, 16), "z": latents(2, 16, 4)}
    exec(example, {**names, "features": latents(1024, 768), "step": 1, "steps": 2})


# options


SMALL = {"codebook_size": 64, "codebook_dim": 8}
NONSENSE = ["32", 1.5, True, [3], {"a": 1}, None, float("nan"), float("inf"), -1, 0, 10**30, 2**62]


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
@pytest.mark.parametrize("name", ["codebook_size", "codebook_dim"])
def test_a_size_that_is_no_size_is_refused_in_one_line(kind, name):
    for value in NONSENSE:
        with pytest.raises(UsageError, match=name) as refused:
            build(kind, {**SMALL, name: value})
        assert "\n" not in str(refused.value)
    for value in ("32", 1.5, True, [3], float("nan"), -1, 0, 10**30):
        with pytest.raises(UsageError, match=name):
            QUANTIZERS[kind](**{**SMALL, name: value})


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_an_option_of_any_value_builds_or_is_refused_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in inspect.signature(QUANTIZERS[kind]).parameters:
        for value in [*NONSENSE, 1e-320, 1e300, "", [], [2.5], [10**30], ["x"], {}]:
            with contextlib.suppress(UsageError), torch.device("meta"):
                build(kind, {**SMALL, name: value})


@pytest.mark.parametrize("kind", [*sorted(QUANTIZERS), "table", "none"])
def test_the_type_of_every_option_is_known(kind):
    for name, parameter in inspect.signature(registry.quantizer_class(kind)).parameters.items():
        assert parameter.annotation is not parameter.empty, name


def test_a_table_beyond_any_memory_is_refused_before_it_is_made():
    with pytest.raises(UsageError, match=r"a table of 1073741824 x 64 numbers takes 256 GiB; at most 64 GiB"):
        VQ(2**30, 64)
    with pytest.raises(UsageError, match="group_bits = 9"):
        LFQ(2**36, 36)
    assert LFQ(2**36, 36, group_bits=9)(latents(1, 36, 4)).losses["entropy_batch"].isfinite()


def test_a_base_has_the_size_of_the_structure():
    with pytest.raises(UsageError, match="base_options cannot hold codebook_dim"):
        Residual(16, 4, base_options={"codebook_dim": 3})
    with pytest.raises(UsageError, match="unknown gradient 'rotate'"):
        Residual(16, 4, base_options={"gradient": "rotate"})


def test_a_quantizer_with_a_bank_can_be_pickled():
    quantizer = VQGANLC(32, 4, bank=latents(32, 6), feature_dim=6)
    other = pickle.loads(pickle.dumps(quantizer))
    assert torch.equal(other(latents(2, 4, 5)).z_q, quantizer(latents(2, 4, 5)).z_q)


def test_a_bank_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    save_bank(latents(4, 6), path)

    def full(tensors, name, **options):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("lexel.quantizers.vqgan_lc.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_bank(latents(8, 6), path)
    assert torch.equal(load_bank(path), latents(4, 6))
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


@counts
def test_a_damaged_bank_is_read_or_refused_in_one_line(tmp_path, count):
    save_bank(latents(4, 3), tmp_path / "bank.safetensors")

    def right(bank):
        assert bank.ndim == 2
        assert bank.dtype == torch.float32
        assert bank.isfinite().all()

    survives(load_bank, tmp_path / "bank.safetensors", 1, count, right)
