"""IBQ as a module: each option reaches what it names."""

import pytest
import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.kernels import tiled
from lexel.quantizers import IBQ


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantizer(**options) -> IBQ:
    made = IBQ(40, 6, **options).double()
    with torch.no_grad():
        made.weight.copy_(normal(40, 6, seed=1))
    return made


def latent_gradient(ibq: IBQ, z: Tensor, g: Tensor) -> Tensor:
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
