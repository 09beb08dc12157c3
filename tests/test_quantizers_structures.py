"""Multi-scale and nested residual quantization, soft targets, spherical IBQ: what is particular to each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError
from lexel.quantizers import EMA, IBQ, QUANTIZERS, Multiscale, Nested, Residual

SIMPLE = [
    "vq",
    "ema",
    "cosine",
    "ibq",
    "soft",
    "gumbel",
    "lfq",
    "bsq",
    "fsq",
    "simvq",
    "fvq",
    "vqgan_lc",
    "affine",
    "ibq_affine",
]
SCALES = [1, 2, 4]


def latents(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_list_of_simple_quantizers_is_whole():
    assert {*SIMPLE, "residual", "product", "multiscale", "nested"} == set(QUANTIZERS)


# multi-scale


@pytest.mark.parametrize("base", SIMPLE)
@pytest.mark.parametrize("structure", ["multiscale", "nested"])
def test_any_simple_quantizer_goes_inside(structure, base):
    options = {"scales": SCALES} if structure == "multiscale" else {}
    quantizer = QUANTIZERS[structure](16, 4, base=base, **options)
    z = latents(3, 4, 4, 4).requires_grad_()
    z_q, indices, losses = quantizer(z)
    assert set(losses) == set(quantizer.LOSS_WEIGHTS)
    (z_q.square().sum() + quantizer.loss(losses)).backward()
    assert z.grad.isfinite().all()
    if quantizer.exact_in_training:
        torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)
    quantizer.eval()
    z_q, indices, _ = quantizer(z)
    assert torch.equal(quantizer.assign(z), indices)
    torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)


def test_var_has_680_tokens_on_16_by_16_and_its_scales_follow_other_grids():
    var = Multiscale(4096, 32)
    assert var.index_shape((16, 16)) == (680,)
    assert var.token_grids((16, 16))[:3] == ((1, 1), (2, 2), (3, 3))
    assert var.latent_grid((680,)) == (16, 16)
    assert var.token_grids((32, 16))[-2:] == ((26, 13), (32, 16))
    assert var.token_grids((4, 4))[0] == (1, 1)
    wide = Multiscale(16, 4, scales=[1, 2, 3, 4, 6, 9, 13, 18, 24, 32])
    assert wide.index_shape((32, 32)) == (2240,)


def test_without_smoothing_a_single_scale_is_the_base():
    quantizer = Multiscale(16, 4, scales=[4], smoothing=0.0)
    z = latents(2, 4, 4, 4)
    alone = quantizer.base(z)
    result = quantizer(z)
    assert torch.equal(result.indices, alone.indices.flatten(1))
    torch.testing.assert_close(result.z_q, alone.z_q)
    for name, term in alone.losses.items():
        torch.testing.assert_close(result.losses[name], term)


def test_every_scale_quantizes_what_the_coarser_ones_left():
    quantizer = Multiscale(64, 4, scales=SCALES).eval()
    z = latents(2, 4, 4, 4)
    indices = quantizer.assign(z)
    rest = z
    for scale, (part, total) in enumerate(zip(quantizer.split(indices), quantizer.partial_sums(indices), strict=True)):
        side = SCALES[scale]
        assert torch.equal(part, quantizer.base.assign(F.adaptive_avg_pool2d(rest, side)))
        rest = z - total
    torch.testing.assert_close(quantizer.indices_to_codes(indices), total)
    # what a generator is fed: the sums so far, averaged down to the next scale
    fed = quantizer.next_inputs(indices)
    assert fed.shape == (2, 4 + 16, 4)
    first = quantizer.partial_sums(indices)[0]
    torch.testing.assert_close(fed[:, :4], F.adaptive_avg_pool2d(first, 2).flatten(2).transpose(1, 2))
    torch.testing.assert_close(
        quantizer.refine(first, 1, quantizer.split(indices)[1]), quantizer.partial_sums(indices)[1]
    )


def test_frames_are_quantized_each_by_itself():
    quantizer = Multiscale(16, 4, scales=[1, 2]).eval()
    z = latents(2, 4, 3, 2, 2)  # three frames
    indices = quantizer.assign(z)
    assert quantizer.index_shape((3, 2, 2)) == (15,)
    alone = torch.stack([quantizer.assign(z[:, :, frame]) for frame in range(3)], 1)  # (B, 3, 5)
    assert torch.equal(indices[:, :3], alone[:, :, 0])  # the coarse tokens of all frames come first
    assert torch.equal(indices[:, 3:].view(2, 3, 4), alone[:, :, 1:])


def test_a_row_of_tokens_that_fits_no_or_several_grids_asks_for_one():
    quantizer = Multiscale(16, 4, scales=[1, 2]).eval()
    with pytest.raises(UsageError, match=r"indices \(B, 8\) are those of no square grid .*; name the grid"):
        quantizer.indices_to_codes(torch.zeros(1, 8, dtype=torch.int64))
    tall, wide = latents(1, 4, 3, 2), latents(1, 4, 2, 3)
    first = quantizer.assign(tall)
    assert quantizer.indices_to_codes(first).shape == tall.shape  # the one that was quantized here
    second = quantizer.assign(wide)
    assert first.shape == second.shape
    with pytest.raises(UsageError, match=r"tokens are those of grids \(2, 3\), \(3, 2\); name the grid"):
        quantizer.indices_to_codes(first)
    assert quantizer.indices_to_codes(first, (3, 2)).shape == tall.shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": []}, "scales must be ascending sides"),
        ({"scales": [4, 2]}, "scales must be ascending sides"),
        ({"scales": [0, 2]}, "a side in scales must be at least 1, got 0"),
        ({"smoothing": 1.5}, "smoothing must be from 0 to 1, got 1.5"),
        ({"smoothers": 0}, "smoothers must be at least 1, got 0"),
        ({"base": "residual"}, "unknown base quantizer 'residual'"),
    ],
)
def test_what_multiscale_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Multiscale(16, 4, **options)


# nested


def test_the_decoder_sees_a_prefix_and_every_level_learns():
    quantizer = Nested(16, 4, depth=4)
    z = latents(200, 4, 3).requires_grad_()
    z_q, indices, losses = quantizer(z)
    prefixes = [quantizer.indices_to_codes(indices[:, :q]) for q in (1, 2, 3, 4)]
    kept = torch.stack([(z_q - prefix).abs().amax((1, 2)) < 1e-6 for prefix in prefixes])
    assert (kept.sum(0) == 1).all()
    assert (kept.sum(1) > 25).all()  # each number of levels, for about a quarter of the images
    quantizer.loss(losses).backward()
    assert all(level.weight.grad.abs().sum() > 0 for level in quantizer)
    assert torch.equal(quantizer.eval()(z).z_q, quantizer.indices_to_codes(quantizer.assign(z)))


def test_prefixes_get_better_with_every_level():
    quantizer = Nested(64, 4, depth=4).eval()
    with torch.no_grad():
        for q, level in enumerate(quantizer):
            level.weight.normal_(std=0.8 * 0.6**q)
    z = latents(8, 4, 50)
    indices = quantizer.assign(z)
    errors = [F.mse_loss(quantizer.indices_to_codes(indices[:, :q]), z).item() for q in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_how_many_levels_are_kept_follows_the_options():
    device = torch.device("cpu")
    assert set(Nested(16, 4, depth=6).dropout.draw(500, device).tolist()) == {1, 2, 3, 4, 5, 6}
    assert set(Nested(16, 4, depth=6, keep="powers").dropout.draw(500, device).tolist()) == {1, 2, 4, 6}
    assert sorted(Nested(16, 4, depth=6, keep="rounded").prefix_lengths) == [1, 2, 4, 4, 6, 6]  # 1 to 6, rounded up
    assert set(Nested(16, 4, depth=6, least=4).dropout.draw(500, device).tolist()) == {4, 5, 6}
    assert set(Nested(16, 4, depth=6, full=1.0).dropout.draw(500, device).tolist()) == {6}
    share = (Nested(16, 4, depth=2, full=0.5).dropout.draw(4000, device) == 2).float().mean().item()
    assert share == pytest.approx(0.75, abs=0.03)
    with pytest.raises(UsageError, match="least must be at most 4, got 5"):
        Nested(16, 4, least=5)
    with pytest.raises(UsageError, match=r"indices must have 1 to 4 levels, got \(1, 5, 3\)"):
        Nested(16, 4).indices_to_codes(torch.zeros(1, 5, 3, dtype=torch.int64))


# soft targets


def test_soft_targets_follow_the_rest_along_the_chosen_codes():
    quantizer = Residual(8, 3, depth=2).double().eval()
    with torch.no_grad():
        for level in quantizer:
            level.weight.normal_()
    z = latents(2, 3, 5).double()
    targets = quantizer.soft_targets(z, temperature=0.7)
    assert targets.shape == (2, 2, 5, 8)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 2, 5).double())
    assert torch.equal(targets.argmax(-1), quantizer.assign(z))
    rest = z - quantizer[0].indices_to_codes(quantizer.assign(z)[:, 0])
    distances = torch.cdist(rest.transpose(1, 2), quantizer[1].codebook[None]).square()
    torch.testing.assert_close(targets[:, 1], (-distances / 0.7).softmax(-1))


# the released order of EMA


def test_looking_up_first_gives_the_codes_before_they_move():
    one, other = EMA(16, 4, decay=0.5), EMA(16, 4, decay=0.5, order="look_up_first")
    other.load_state_dict(one.state_dict())
    before, z = one.codebook.clone(), latents(2, 4, 9)
    moved, met = one(z), other(z)
    assert torch.equal(moved.indices, met.indices)
    torch.testing.assert_close(met.z_q, F.embedding(met.indices, before).movedim(-1, 1))
    torch.testing.assert_close(one.codebook, other.codebook)
    assert not torch.allclose(moved.z_q, met.z_q)


# spherical IBQ


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("normalize", ["latents", "codes", "both"])
def test_normalised_ibq_is_plain_ibq_on_normalised_tensors(normalize, similarity):
    quantizer = IBQ(16, 4, normalize=normalize, similarity=similarity).double()
    plain = IBQ(16, 4, similarity=similarity).double()
    z, g = latents(2, 4, 5).double().requires_grad_(), latents(2, 4, 5, seed=3).double()
    unit = F.normalize(z, dim=1) if normalize != "codes" else z
    weight = quantizer.weight.detach().requires_grad_()
    table = F.normalize(weight, dim=1) if normalize != "latents" else weight
    expected = torch.func.functional_call(plain, {"weight": table}, (unit,))
    result = quantizer(z)
    assert torch.equal(result.indices, expected.indices)
    torch.testing.assert_close(result.z_q, expected.z_q)
    total, wanted = ((r.z_q * g).sum() + quantizer.loss(r.losses) for r in (result, expected))
    ours = torch.autograd.grad(total, [z, quantizer.weight])
    for mine, theirs in zip(ours, torch.autograd.grad(wanted, [z, weight]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(quantizer.assign(z), result.indices)
    torch.testing.assert_close(quantizer.indices_to_codes(result.indices), result.z_q)
    if normalize == "latents" and similarity == "l2":
        with pytest.raises(UsageError, match="has no table to search"):
            quantizer.bake()
    else:
        assert torch.equal(quantizer.bake()(z).indices, result.indices)
