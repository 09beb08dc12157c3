"""IBQ as a module: each option reaches what it names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lexel.errors import UsageError
from lexel.kernels import tiled
from lexel.quantizers import IBQ, IBQAffine, frozen_statistics
from lexel.quantizers.ibq_affine import power_of_two


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantizer(**options) -> IBQ:
    made = IBQ(40, 6, **options).double()
    with torch.no_grad():
        made.weight.copy_(normal(40, 6, seed=1))
    return made


def latent_gradient(ibq: IBQ | IBQAffine, z: Tensor, g: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad((ibq(z).z_q * g).sum(), z)[0]


@pytest.mark.parametrize("grid", [(3, 5), (7,), (2, 3, 2), ()])
def test_latents_of_any_grid_are_quantized_where_they_stand(grid):
    z, ibq = normal(2, 6, *grid), quantizer()
    z_q, indices, losses = ibq(z)
    assert z_q.shape == z.shape
    assert indices.shape == (2, *grid)
    torch.testing.assert_close(ibq.indices_to_codes(indices), z_q, rtol=0, atol=0)
    assert torch.equal(ibq.assign(z), indices)
    assert losses.keys() == IBQ.LOSS_WEIGHTS.keys()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_latents_gradient_is_the_covariance_of_the_codes_over_the_temperature(temperature):
    z, g, ibq = normal(3, 6), normal(3, 6, seed=2), quantizer(temperature=temperature)
    codes = ibq.codebook.detach()
    p = (z @ codes.T / temperature).softmax(1)
    second_moment = torch.einsum("nk,ki,kj->nij", p, codes, codes)
    mean = p @ codes
    covariance = second_moment - mean[:, :, None] * mean[:, None, :]
    expected = (covariance @ g[:, :, None]).squeeze(2) / temperature
    torch.testing.assert_close(latent_gradient(ibq, z, g), expected)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_identity_share_reaches_the_latents_and_nothing_else(share):
    z, g = normal(2, 6, 4), normal(2, 6, 4, seed=2)
    plain, blended = quantizer(), quantizer(identity=share)
    torch.testing.assert_close(latent_gradient(blended, z, g), latent_gradient(plain, z, g) + share * g)
    assert torch.equal(blended(z).z_q, plain(z).z_q)
    for name, term in plain(z).losses.items():
        assert torch.equal(blended(z).losses[name], term)
    gradients = [torch.autograd.grad((ibq(z).z_q * g).sum(), ibq.weight)[0] for ibq in (plain, blended)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
def test_the_similarity_chooses_the_code(similarity):
    z = normal(5, 6)
    ibq = quantizer(similarity=similarity)
    codes = ibq.codebook.detach()
    scores = {
        "dot": z @ codes.T,
        "l2": -torch.cdist(z, codes),
        "cosine": torch.nn.functional.cosine_similarity(z[:, None], codes[None], dim=2),
    }[similarity]
    assert torch.equal(ibq(z).indices, scores.argmax(1))


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
def test_the_entropy_temperature_reaches_the_entropies(similarity):
    z = normal(5, 6)
    ibq = quantizer(similarity=similarity, entropy_temperature=0.7)
    codes = ibq.codebook.detach()
    logits = {
        "dot": z @ codes.T,
        "l2": -torch.cdist(z, codes).square(),
        "cosine": torch.nn.functional.cosine_similarity(z[:, None], codes[None], dim=2),
    }[similarity]
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy().mean()
    torch.testing.assert_close(ibq(z).losses["entropy_sample"], expected)


def test_entropies_can_be_left_out():
    ibq = quantizer(entropy=False)
    losses = ibq(normal(2, 6)).losses
    assert losses.keys() == {"quantization", "commitment", "codebook"}
    assert ibq.loss(losses) > 0  # a weight without a term is no error


def test_the_row_block_reaches_the_backward_pass(monkeypatch):
    seen = []
    real = tiled.backward

    def backward(problem, *rest):
        seen.append(problem.rows)
        return real(problem, *rest)

    monkeypatch.setattr(tiled, "backward", backward)
    z, g = normal(9, 6), normal(9, 6, seed=2)
    torch.testing.assert_close(latent_gradient(quantizer(rows=2), z, g), latent_gradient(quantizer(), z, g))
    assert seen[0] == 2
    assert seen[1] > 2


def test_every_code_learns_from_the_output_alone():
    ibq = quantizer()
    ibq(normal(1, 6)).z_q.sum().backward()
    assert (ibq.weight.grad.abs().sum(1) > 0).all()


def test_each_term_moves_what_it_names():
    z, ibq = normal(2, 6, 3).requires_grad_(), quantizer()
    losses = ibq(z).losses
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[ibq.assign(z).flatten()] = True
    for name, moves_latents, moves in [
        ("quantization", True, torch.ones(40, dtype=torch.bool)),
        ("commitment", True, torch.zeros(40, dtype=torch.bool)),
        ("codebook", False, chosen),
    ]:
        d_z, d_codes = torch.autograd.grad(
            losses[name], (z, ibq.weight), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert d_z.any() == moves_latents, name
        assert torch.equal(d_codes.abs().sum(1) > 0, moves), name


def test_half_precision_latents_are_decided_in_float32():
    ibq = IBQ(500, 16)
    z = normal(2, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, _ = ibq(z)
    assert z_q.dtype == torch.float32
    assert torch.equal(indices, ibq.assign(z.float()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"entropy_temperature": -0.1}, "entropy_temperature must be above 0, got -0.1"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"identity": 2}, "identity must be from 0 to 1, got 2"),
        ({"similarity": "angle"}, "unknown similarity 'angle'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        IBQ(8, 4, **options)


def test_an_empty_batch_is_refused():
    with pytest.raises(UsageError, match="empty batch"):
        quantizer()(torch.zeros(0, 6, 2, 2, dtype=torch.float64))


def _reduced_gradient(rank: int, port: int, results) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ibq = torch.nn.parallel.DistributedDataParallel(quantizer(entropy=False))
    z_q, _, losses = ibq(normal(4, 6)[2 * rank : 2 * rank + 2])
    (z_q.sum() + ibq.module.loss(losses)).backward()
    results[rank] = ibq.module.weight.grad
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_both_halves():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_reduced_gradient, (port, results), nprocs=2)
        found = [results[rank] for rank in range(2)]
    ibq = quantizer(entropy=False)
    total = 0
    for half in normal(4, 6).split(2):
        z_q, _, losses = ibq(half)
        total = total + (z_q.sum() + ibq.loss(losses)) / 2
    total.backward()
    for gradient in found:
        torch.testing.assert_close(gradient, ibq.weight.grad)


def dense_mixture(table: Tensor, z: Tensor, g: Tensor, width: float, identity: float) -> tuple[Tensor, Tensor]:
    """The gradients of latents (N, D) and of codes (K, D) as the formulas of IBQAffine read."""
    p = (-torch.cdist(z, table).square() / (2 * width**2)).softmax(1)
    pull = p * (g @ table.T - (p * (g @ table.T)).sum(1, keepdim=True)) / width**2  # of the logits, times 1 / width^2
    through = pull @ table
    codes = (1 - identity) * (pull.T @ z - pull.sum(0)[:, None] * table)
    codes.index_add_(0, torch.cdist(z, table).argmin(1), g)
    return (1 - identity) * through + identity * g, codes


@pytest.mark.parametrize("identity", [0.0, 0.5, 1.0])
def test_on_the_affine_table_gradients_are_those_of_the_softmax_at_the_measured_width(identity):
    made = IBQAffine(40, 6, identity=identity, mixing="blend").double()
    for seed in range(3):
        made(normal(4, 6, 10, seed=seed))
    with frozen_statistics():
        z, g = normal(2, 6, 9, seed=7).requires_grad_(), normal(2, 6, 9, seed=8)
        table = made.codebook.detach().requires_grad_()
        made.project = lambda: table  # the gradient of the codes themselves
        found = torch.autograd.grad((made(z).z_q * g).sum(), (z, table))
        width = float(made._statistics()[2])
    rows = [x.detach().movedim(1, -1).flatten(0, 1) for x in (z, g)]
    expected = dense_mixture(table.detach(), *rows, width, identity)
    torch.testing.assert_close(found[0].movedim(1, -1).flatten(0, 1), expected[0])
    torch.testing.assert_close(found[1], expected[1])


def turns(step: int, z: Tensor, g: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The gradients of latents and of codes of one table with `options`, as the step with this number has them."""
    made = IBQAffine(40, 6, **options).double()
    with torch.no_grad():
        made.weight.copy_(normal(40, 6, seed=1))
    for seed in range(3):
        made(normal(4, 6, 12, seed=seed))
    with frozen_statistics():
        made.steps.fill_(step)
        z = z.clone().requires_grad_()
        return torch.autograd.grad((made(z).z_q * g).sum(), (z, made.weight))


@pytest.mark.parametrize("grid", [(12,), (3, 4)])
def test_latents_that_take_turns_get_the_mean_of_the_blend_over_the_steps(grid):
    z, g = normal(2, 6, *grid, seed=7), normal(2, 6, *grid, seed=8)
    blended = turns(4, z, g, identity=0.75, mixing="blend")
    each = [turns(4 + step, z, g, identity=0.75) for step in range(4)]
    for number, expected in enumerate(blended):
        torch.testing.assert_close(torch.stack([found[number] for found in each]).mean(0), expected)
    straight = torch.stack([(found[0] == g).flatten(2).all(1) for found in each])  # (steps, B, places)
    assert (straight.sum(0) == 3).all()  # once in four steps through the softmax


@pytest.mark.parametrize(("identity", "places", "expected"), [(0.0, 5, 5), (0.75, 4, 1), (0.75, 9, 2), (0.5, 7, 4)])
def test_of_the_places_the_share_left_by_the_straight_gradient_take_their_turn(identity, places, expected):
    z, g = normal(3, 6, places, seed=7), normal(3, 6, places, seed=8)
    found = turns(4, z, g, identity=identity)[0]
    assert ((found != g).any(1).sum(1) == expected).all()


@pytest.mark.parametrize("places", [1, 3])
def test_grids_too_small_for_turns_are_blended(places):
    z, g = normal(3, 6, places, seed=7), normal(3, 6, places, seed=8)
    for found, expected in zip(turns(4, z, g), turns(4, z, g, mixing="blend"), strict=True):
        assert torch.equal(found, expected)


def test_where_codes_are_dense_index_backpropagation_alone_hands_the_gradient_on_as_it_is():
    made = IBQAffine(4096, 2, identity=0.0)
    for seed in range(20):
        made(normal(1, 2, 500, seed=seed).float())
    z, g = 0.5 * normal(1, 2, 200, seed=50).float(), normal(1, 2, 200, seed=51).float()
    found = latent_gradient(made, z, g)
    assert F.cosine_similarity(found, g, dim=1).mean() > 0.95
    assert 0.9 < found.norm() / g.norm() < 1.25  # 1.04 to 1.24 over 12 tables: the width is rounded to a power of two


def test_the_affine_tables_gradients_and_indices_do_not_see_the_scale_of_the_latents():
    found = []
    for scale in (1.0, 2.0**12, 2.0**-12):
        made = IBQAffine(64, 4)
        with torch.no_grad():
            made.weight.copy_(normal(64, 4, seed=3))
        for seed in range(5):
            made(scale * normal(2, 4, 50, seed=seed).float())
        z = scale * normal(2, 4, 50, seed=9).float()
        found.append((made.assign(z), latent_gradient(made, z, normal(2, 4, 50, seed=10).float())))
    for indices, gradient in found[1:]:
        assert torch.equal(indices, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-4)


def test_the_width_is_the_nearest_power_of_two():
    values = torch.tensor([1.0, 0.75, 0.70, 1.42, 3e-20, 5e12])
    found = power_of_two(values)
    assert found.tolist() == [1.0, 1.0, 0.5, 2.0, 2.0**-65, 2.0**42]
    assert torch.equal(values / found * found, values)


def test_a_recomputed_pass_of_the_affine_table_has_the_width_of_the_first():
    straight, again = IBQAffine(64, 4), IBQAffine(64, 4)
    again.load_state_dict(straight.state_dict())
    gradients = []
    for made in (straight, again):
        for seed in range(3):  # the error changes from step to step
            z = (8.0**seed * normal(2, 4, 30, seed=seed).float()).requires_grad_()
            run = (
                (lambda x, made=made: checkpoint(lambda y: made(y).z_q, x, use_reentrant=False))
                if made is again
                else (lambda x, made=made: made(x).z_q)
            )
            made.zero_grad()
            run(z).square().sum().backward()
        gradients.append((z.grad, made.weight.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
