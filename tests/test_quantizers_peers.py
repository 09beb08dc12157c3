"""Where a method exists in vector-quantize-pytorch or diffusers, Lexel's outputs and gradients equal theirs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.quantizers import BSQ, EMA, FSQ, LFQ, VQ, Cosine, Residual, SimVQ
from lexel.quantizers.base import rotate

K, D = 32, 6


def peers() -> Any:
    """vector-quantize-pytorch; it takes seconds to import, which only the process that runs this file should spend."""
    return pytest.importorskip("vector_quantize_pytorch")


def latents(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(z: Tensor) -> Tensor:
    return z.movedim(1, -1).contiguous()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("legacy", [False, True])
def test_vq_equals_diffusers_in_codes_loss_and_gradients(legacy):
    from diffusers.models.autoencoders.vae import VectorQuantizer

    ours, theirs = VQ(K, D), VectorQuantizer(K, D, beta=0.25, legacy=legacy)
    with torch.no_grad():
        ours.weight.mul_(K)  # apart enough for a fair search
        theirs.embedding.weight.copy_(ours.weight)
    z, gradient = latents(2, D, 4, 5), latents(2, D, 4, 5, seed=3)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    result = ours(first)
    z_q, loss, (_, _, indices) = theirs(second)
    # Their default (legacy) swaps the two weights, as taming does.
    weights = {"codebook": 0.25, "commitment": 1.0} if legacy else None
    our_loss = ours.loss(result.losses, weights)
    torch.testing.assert_close(our_loss, loss)
    assert torch.equal(result.indices.flatten(), indices)
    torch.testing.assert_close(result.z_q, z_q)
    ((result.z_q * gradient).sum() + our_loss).backward()
    ((z_q * gradient).sum() + loss).backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.embedding.weight.grad)


def test_ema_keeps_the_averages_of_vector_quantize_pytorch():
    ours = EMA(K, D, decay=0.9)
    theirs = (
        peers()
        .VectorQuantize(dim=D, codebook_size=K, decay=0.9, eps=1e-5, rotation_trick=False, commitment_weight=0.25)
        .train()
    )
    theirs._codebook.embed.copy_(ours.weight[None])
    theirs._codebook.embed_avg.copy_(ours.sums[None])
    for step in range(4):
        before = ours.codebook.clone()
        z = latents(3, D, 7, seed=step)
        result = ours(z)
        z_q, indices, _ = theirs(channels_last(z))
        assert torch.equal(result.indices, indices)
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0])
        torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0])
        # They look codes up before the averages move, we do so after.
        torch.testing.assert_close(F.embedding(result.indices, before), z_q)


def test_cosine_equals_the_cosine_codebook_of_vector_quantize_pytorch():
    ours = Cosine(K, D)
    theirs = peers().VectorQuantize(dim=D, codebook_size=K, use_cosine_sim=True, rotation_trick=False).eval()
    theirs._codebook.embed.copy_(ours.codebook[None])
    z = latents(3, D, 7)
    z_q, indices, _ = theirs(channels_last(z))
    result = ours(z)
    assert torch.equal(result.indices, indices)
    torch.testing.assert_close(channels_last(result.z_q), z_q)


@pytest.mark.parametrize("gradient, rotation", [("straight_through", False), ("rotation", True)])
def test_simvq_equals_vector_quantize_pytorch_in_codes_loss_and_gradients(gradient, rotation):
    ours = SimVQ(K, D, bias=False, gradient=gradient)
    theirs = peers().SimVQ(dim=D, codebook_size=K, rotation_trick=rotation)
    theirs.frozen_codebook.copy_(ours.table)
    theirs.code_transform.load_state_dict(ours.projection.state_dict())
    first, second = (latents(2, D, 7).requires_grad_() for _ in range(2))
    result = ours(first)
    z_q, indices, loss = theirs(channels_last(second))
    assert torch.equal(result.indices, indices)
    torch.testing.assert_close(channels_last(result.z_q), z_q)
    torch.testing.assert_close(ours.loss(result.losses), loss)
    gradient_in = latents(2, D, 7, seed=3)
    ((result.z_q * gradient_in).sum() + ours.loss(result.losses)).backward()
    ((z_q * channels_last(gradient_in)).sum() + loss).backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.projection.weight.grad, theirs.code_transform.weight.grad)


def test_the_rotation_trick_equals_vector_quantize_pytorch():
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    first, second = (latents(9, D).requires_grad_() for _ in range(2))
    target, gradient = latents(9, D, seed=3), latents(9, D, seed=4)
    torch.testing.assert_close(rotate(first, target), rotate_to(second, target))
    rotate(first, target).backward(gradient)
    rotate_to(second, target).backward(gradient)
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("spherical", [False, True])
def test_sign_codes_and_their_entropies_equal_vector_quantize_pytorch(spherical):
    theirs = peers().LFQ(codebook_size=64, dim=6, spherical=spherical, commitment_loss_weight=0.25).train()
    ours = BSQ(64, 6, group_bits=None, temperature=0.05) if spherical else LFQ(64, 6, 0.05, bit_order="high_first")
    ours.epsilon = 0.0
    z = 0.2 * latents(2, 6, 30)
    (z_q, indices, _), breakdown = theirs(channels_last(z), inv_temperature=20.0, return_loss_breakdown=True)
    result = ours(z)
    assert torch.equal(result.indices, indices.long())
    torch.testing.assert_close(channels_last(result.z_q), z_q)
    # Their logarithm stops at 1e-5, ours is exact.
    torch.testing.assert_close(result.losses["entropy_sample"], breakdown.per_sample_entropy, atol=2e-3, rtol=0)
    torch.testing.assert_close(result.losses["entropy_batch"], breakdown.batch_entropy, atol=2e-3, rtol=0)
    # The released BSQ sums the commitment over channels, they average it.
    torch.testing.assert_close(result.losses["commitment"], (6 if spherical else 1) * breakdown.commitment)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 5, 4], [3]], ids=str)
def test_fsq_equals_vector_quantize_pytorch_in_codes_and_gradients(levels):
    theirs = peers().FSQ(levels)
    ours = FSQ(theirs.codebook_size, len(levels), levels)
    first, second = (3 * latents(2, len(levels), 50).requires_grad_() for _ in range(2))
    first.retain_grad()
    second.retain_grad()
    z_q, indices = theirs(channels_last(second))
    result = ours(first)
    assert torch.equal(result.indices, indices.long())
    torch.testing.assert_close(channels_last(result.z_q), z_q)
    result.z_q.square().sum().backward()
    z_q.square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.codebook, theirs.implicit_codebook)


def test_residual_levels_choose_what_vector_quantize_pytorch_chooses():
    ours = Residual(K, D, depth=3, base="ema").eval()
    theirs = peers().ResidualVQ(dim=D, codebook_size=K, num_quantizers=3).eval()
    for level, layer in zip(ours, theirs.layers, strict=True):
        layer._codebook.embed.copy_(level.codebook[None])
    z = latents(2, D, 9)
    z_q, indices, _ = theirs(channels_last(z))
    result = ours(z)
    assert torch.equal(channels_last(result.indices), indices)
    torch.testing.assert_close(channels_last(result.z_q), z_q)
