"""The laws every quantizer keeps, over the whole table QUANTIZERS: a new entry is covered at once."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from thorough import thorough
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS, Quantizer, build, frozen_statistics
from lexel.quantizers.base import GRADIENTS

K, D = 64, 8
SIZES = [(64, 8), (1024, 64), (16, 4), (64, 4), (4096, 3), (2, 1)]  # with D above, at and below log2 K
GRIDS = [(), (7,), (3, 5), (2, 3, 4)]
KINDS = sorted(QUANTIZERS)


class Law(NamedTuple):
    """What is particular to a method; the defaults are those of a table that the loss alone moves."""

    by_decoder: frozenset[str] | set[str] = frozenset()  # parameters that the decoder's gradient reaches
    by_loss: frozenset[str] | set[str] = frozenset()  # and those that the loss terms reach
    identity: bool = True  # latents get the decoder's gradient as it is, not through a norm, a tanh or a softmax
    moves_latents: bool = True  # some loss term has a gradient for the latents
    rows_of_codebook: bool = True  # z_q is the sum of the rows that the indices name
    baked: bool = True  # a table can be searched in the method's place
    own_nearest: bool = True  # a code is the best one for itself in what the method compares
    rows_x_codes: bool = False  # a tensor of latents x codes is the method's definition
    differentiable_once: bool = False  # a second derivative is an error, not a wrong number
    refused: frozenset[str] | set[str] = frozenset()  # torch.func's transforms that it does not have
    refused_in_evaluation: frozenset[str] | set[str] = frozenset()
    wide_options: Mapping[str, Any] = {}  # for very many codes


LAWS = {
    "vq": Law(by_loss={"weight"}),
    "cosine": Law(by_loss={"weight"}, identity=False),
    "gumbel": Law(
        by_decoder={"weight", "logits.weight", "logits.bias"},
        by_loss={"logits.weight", "logits.bias"},
        identity=False,
        baked=False,
        own_nearest=False,
        rows_x_codes=True,
    ),
    "ema": Law(refused={"grad", "vmap", "jvp"}),  # its averages cannot move inside a transform
    "soft": Law(
        by_decoder={"weight"},
        identity=False,
        moves_latents=False,
        own_nearest=False,
        differentiable_once=True,
        refused={"vmap", "jvp"},
    ),
    "ibq": Law(
        by_decoder={"weight"},
        by_loss={"weight"},
        identity=False,
        own_nearest=False,
        differentiable_once=True,
        refused={"vmap", "jvp"},
        refused_in_evaluation={"vmap", "jvp"},
        wide_options={"rows": 64},
    ),
    "bsq": Law(identity=False),
    "fsq": Law(identity=False, moves_latents=False, baked=False, own_nearest=False),
    "vqgan_lc": Law(by_loss={"projector.0.weight", "projector.0.bias"}, wide_options={"feature_dim": 8}),
    "simvq": Law(by_loss={"projection.weight", "projection.bias"}),
    # The rest is behind the zero start.
    "fvq": Law(by_loss={"bridge.recover.weight", "bridge.recover.bias"}, wide_options={"width": 16, "patch": 8}),
    "affine": Law(by_loss={"weight"}, refused={"grad", "vmap", "jvp"}),
    "ibq_affine": Law(
        by_decoder={"weight"},
        by_loss={"weight"},
        identity=False,
        differentiable_once=True,
        refused={"grad", "vmap", "jvp"},
        refused_in_evaluation={"vmap", "jvp"},
        wide_options={"rows": 64},
    ),
    "residual": Law(by_loss={f"levels.{q}.weight" for q in range(4)}, own_nearest=False),
    "nested": Law(by_loss={f"levels.{q}.weight" for q in range(4)}, identity=True, own_nearest=False),
    "multiscale": Law(
        by_loss={"base.weight", *(f"smoothers.{i}.{name}" for i in range(4) for name in ("weight", "bias"))},
        rows_of_codebook=False,
        own_nearest=False,
    ),
    "product": Law(by_loss={f"levels.{q}.weight" for q in range(2)}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def law(kind) -> Law:
    return LAWS.get(kind, Law())


@pytest.fixture
def quantizer(kind) -> Quantizer:
    return spread(QUANTIZERS[kind](codebook_size=K, codebook_dim=D))


def spread(quantizer: Quantizer) -> Quantizer:
    """Moves parameters off a degenerate start, so that indices differ (FVQ starts with all codes at 0)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return quantizer


def latents(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def books(quantizer: Quantizer) -> list[Tensor]:
    return list(quantizer.codebook) if quantizer.books is not None else [quantizer.codebook]


def test_the_table_has_the_published_keys():
    simple = {"vq", "ema", "cosine", "gumbel", "soft", "ibq", "lfq", "bsq", "fsq", "vqgan_lc", "simvq", "fvq"}
    assert simple | {"residual", "product"} <= set(QUANTIZERS)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_entry_is_built_from_its_size_alone_and_works(kind, size):
    codebook_size, codebook_dim = size
    quantizer = QUANTIZERS[kind](codebook_size=codebook_size, codebook_dim=codebook_dim)
    z_q, indices, losses = quantizer(latents(2, codebook_dim, 3, 2))
    assert z_q.shape == (2, codebook_dim, 3, 2)
    assert indices.min() >= 0
    assert indices.max() < codebook_size
    assert {book.shape for book in books(quantizer)} == {(codebook_size, codebook_dim)}
    assert set(losses) == set(quantizer.LOSS_WEIGHTS)
    assert all(term.shape == () and term.isfinite() for term in losses.values())


def test_a_quantizer_can_be_built_without_memory_and_filled_later(quantizer, kind):
    with torch.device("meta"):
        empty = QUANTIZERS[kind](K, D)
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in quantizer.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_indices_are_int64_on_any_grid(quantizer, grid):
    z = latents(2, D, *grid)
    z_q, indices, _ = quantizer(z)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, *quantizer.index_shape(grid))
    assert quantizer.assign(z).shape == indices.shape
    assert quantizer.latent_grid(indices.shape[1:]) == grid
    assert torch.equal(quantizer.indices_to_codes(indices, grid), quantizer.indices_to_codes(indices))
    assert z_q.shape == (2, D, *grid)
    assert quantizer.indices_to_codes(indices).shape == (2, D, *grid)


@pytest.mark.parametrize("training", [True, False])
def test_indices_name_the_codes(quantizer, training):
    if training and not quantizer.exact_in_training:
        pytest.skip("z_q is an average of codes in training, by the method's definition")
    quantizer.train(training)
    z_q, indices, _ = quantizer(latents(2, D, 3, 5))
    torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q, atol=1e-6, rtol=1e-6)


def test_forward_and_assign_choose_the_same_indices(quantizer):
    quantizer.eval()
    z = latents(3, D, 4, 4)
    assert torch.equal(quantizer.assign(z), quantizer(z).indices)


def test_indices_are_rows_of_the_codebook(quantizer, law):
    if not law.rows_of_codebook:
        pytest.skip("rows are enlarged and smoothed")
    quantizer.eval()
    z_q, indices, _ = quantizer(latents(2, D, 3, 5))
    each = indices.unbind(1) if quantizer.books is not None else [indices]
    codes = sum(book[index] for book, index in zip(books(quantizer), each, strict=True))
    torch.testing.assert_close(codes.movedim(-1, 1), z_q, atol=1e-6, rtol=1e-6)


@pytest.fixture
def drawn_in_float64() -> Iterator[None]:
    """Among 4096 numbers of float32 drawn in one channel two are often equal by chance; in float64 none are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("drawn_in_float64")
@pytest.mark.parametrize("size", [(64, 8), (1024, 64), (16, 4), (4096, 4)], ids=str)
def test_every_index_has_its_own_code(kind, size):
    quantizer = QUANTIZERS[kind](*size)
    if kind == "fvq":  # starts with all codes at zero, by design
        assert not quantizer.codebook.any()
        spread(quantizer)
    for book in books(quantizer):
        assert len(torch.unique(book, dim=0)) == size[0]


def test_codes_are_in_reach_of_their_own_index(quantizer, law):
    if not law.own_nearest:
        pytest.skip("a code may lie nearer to another one in what this method compares")
    quantizer.eval()
    everything = torch.arange(K)
    if quantizer.books is not None:
        everything = everything[:, None].expand(K, quantizer.books)
    assert torch.equal(quantizer.assign(quantizer.indices_to_codes(everything)), everything)


def test_the_decoders_gradient_reaches_what_the_method_says_and_nothing_else(quantizer, law):
    z = latents(2, D, 3, 5).requires_grad_()
    gradient = latents(2, D, 3, 5, seed=3)
    quantizer(z).z_q.backward(gradient)
    assert reached(quantizer) == law.by_decoder
    assert z.grad.abs().sum() > 0
    assert z.grad.isfinite().all()
    if law.identity:
        torch.testing.assert_close(z.grad, gradient)


def test_the_loss_reaches_what_the_method_says_and_nothing_else(kind, law):
    quantizer = QUANTIZERS[kind](K, D)
    z = latents(2, D, 3, 5).requires_grad_()
    loss = quantizer.loss(quantizer(z).losses)
    if loss.requires_grad:
        loss.backward()
    assert reached(quantizer) == law.by_loss
    assert (z.grad is not None) == law.moves_latents


def reached(quantizer: Quantizer) -> set[str]:
    return {name for name, p in quantizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("term, other", [("codebook", "commitment"), ("commitment", "codebook")])
@pytest.mark.parametrize("kind", [k for k in KINDS if set(QUANTIZERS[k].LOSS_WEIGHTS) == {"codebook", "commitment"}])
def test_codebook_moves_codes_and_commitment_moves_latents(kind, term, other):
    quantizer = QUANTIZERS[kind](K, D)
    z = latents(2, D, 3, 5).requires_grad_()
    quantizer.loss(quantizer(z).losses, {term: 1.0, other: 0.0}).backward()
    moved = z.grad is not None and bool(z.grad.abs().sum() > 0)
    assert moved == (term == "commitment")
    assert bool(reached(quantizer)) == (term == "codebook")


@pytest.mark.parametrize("training", [True, False])
def test_images_of_a_batch_do_not_influence_each_other(quantizer, training):
    if training and quantizer.batch_dependent:
        pytest.skip("in training this method learns from the batch or draws noise, by its definition")
    quantizer.train(training)
    z = latents(3, D, 4, 2)
    together = quantizer(z)
    for i in range(3):
        alone = quantizer(z[i : i + 1])
        assert torch.equal(alone.indices, together.indices[i : i + 1])
        torch.testing.assert_close(alone.z_q, together.z_q[i : i + 1])


def test_autocast_does_not_change_an_index(quantizer):
    quantizer.eval()
    z = latents(16, D, 8, 8)
    expected = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = quantizer(z)
        again = quantizer.assign(z)
    assert torch.equal(given.indices, expected.indices)
    assert torch.equal(again, expected.indices)
    assert given.z_q.dtype == torch.float32
    torch.testing.assert_close(given.z_q, expected.z_q)
    assert quantizer(z.bfloat16()).z_q.dtype == torch.float32  # half precision comes out as float32
    quantizer.train()
    expected_codes = quantizer.codebook
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.codebook, expected_codes)


ALL = [*itertools.product(DTYPES, DTYPES)]
SOME = [*zip(DTYPES, DTYPES, strict=True), *zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True)]  # each meets two


@pytest.mark.parametrize(("training", "precisions"), [(True, SOME), *thorough((True, ALL), (False, ALL))])
def test_any_precision_of_latents_meets_any_precision_of_weights(kind, training, precisions):
    for module, given in precisions:
        case = f"{given} latents, {module} weights"
        quantizer = QUANTIZERS[kind](K, D).to(module).train(training)
        z = latents(2, D, 3).to(given).requires_grad_()
        z_q, indices, losses = quantizer(z)
        wide = torch.promote_types(given, torch.float32)
        assert z_q.dtype in (wide, torch.promote_types(wide, module)), case
        total = z_q.sum() + quantizer.loss(losses).to(wide)
        assert total.isfinite(), case
        if total.requires_grad:
            total.backward()
        assert quantizer.assign(z).shape == indices.shape, case
        assert quantizer.indices_to_codes(indices).shape == z_q.shape, case


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_is_refused_before_anything_moves(quantizer, training):
    quantizer.train(training)(latents(2, D, 3))
    before = copy.deepcopy(quantizer.state_dict())
    for empty in (latents(0, D, 3, 3), latents(2, D, 0)):
        for use in (quantizer, quantizer.assign):
            with pytest.raises(UsageError, match="an empty batch cannot be quantized"):
                use(empty)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    none = torch.zeros(0, *quantizer.index_shape((3, 3)), dtype=torch.int64)
    assert quantizer.indices_to_codes(none, (3, 3)).shape == (0, D, 3, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"])
def test_a_copy_and_a_pickle_are_the_same_quantizer(quantizer, copied):
    quantizer.anneal(0.3)
    quantizer(latents(2, D, 3))
    quantizer.eval()(latents(2, D, 3))  # what is kept in evaluation is there
    other = copied(quantizer)
    results = []
    for each in (quantizer, other):
        torch.manual_seed(5)
        results.append(each.train()(latents(2, D, 4, 4, seed=6)))
    assert torch.equal(results[0].indices, results[1].indices)
    assert torch.equal(results[0].z_q, results[1].z_q)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("built_inside", [True, False])
def test_a_quantizer_works_in_inference_mode_and_after_it(kind, built_inside, training):
    quantizer = spread(QUANTIZERS[kind](K, D))
    z = latents(2, D, 3)
    with torch.inference_mode():
        quantizer = copy.deepcopy(quantizer) if built_inside else quantizer
        quantizer.train(training)
        torch.manual_seed(0)
        z_q, indices, _ = quantizer(z)
        if not training:
            assert torch.equal(quantizer.assign(z), indices)
            torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q)
    if not built_inside:
        z_q, _, losses = quantizer(latents(2, D, 3).requires_grad_())
        total = z_q.sum() + quantizer.loss(losses)
        if total.requires_grad:
            total.backward()


def test_new_values_are_seen_in_inference_mode(quantizer):
    with torch.inference_mode():
        other = copy.deepcopy(quantizer).eval()
        before = other.codebook.clone()
        for parameter in other.parameters():
            parameter += 1
        if any(True for _ in other.parameters()):
            assert not torch.equal(other.codebook, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        quantizer, layer = spread(QUANTIZERS[kind](K, D)), torch.nn.Conv1d(D, D, 1)

        def forward(z, quantizer=quantizer, layer=layer):
            z_q, _, losses = quantizer(layer(z))
            return z_q.square().sum() + quantizer.loss(losses)

        outcome = {}
        for step in range(2):
            z = latents(2, D, 5, seed=step).requires_grad_()
            torch.manual_seed(step)
            (checkpoint(forward, z, use_reentrant=reentrant) if checkpointed else forward(z)).backward()
            outcome[f"z{step}"] = z.grad
        outcomes.append({**outcome, **quantizer.state_dict(), "layer": layer.weight.grad})
    for name, value in outcomes[0].items():
        assert torch.equal(outcomes[1][name], value), name


def test_a_look_ahead_moves_no_statistics(quantizer):
    before = copy.deepcopy(quantizer.state_dict())
    with frozen_statistics():
        quantizer(latents(2, D, 5))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def energy(quantizer: Quantizer, z: Tensor) -> Tensor:
    z_q, _, losses = quantizer(z)
    return z_q.pow(3).sum() + quantizer.loss(losses)


def test_a_second_derivative_is_finite_or_refused(quantizer, law):
    z = latents(2, D, 3).double().requires_grad_()
    quantizer.double()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(energy(quantizer, z), z, create_graph=True)
    if law.differentiable_once:
        with pytest.raises(UsageError, match="has no second derivatives"):
            gradient.square().sum().backward()
    else:
        gradient.square().sum().backward()
        assert z.grad.isfinite().all()


TRANSFORMS = {
    "grad": lambda quantizer, z: torch.func.grad(lambda z: energy(quantizer, z))(z),
    "vmap": lambda quantizer, z: torch.func.vmap(lambda row: quantizer(row[None]).z_q[0], randomness="different")(z),
    "jvp": lambda quantizer, z: torch.func.jvp(lambda z: energy(quantizer, z), (z,), (z,))[1],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, in forward mode
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_function_transform_works_or_is_refused_in_one_line(quantizer, law, transform, training):
    quantizer.train(training)
    z = latents(3, D, 4)
    refused = law.refused if training else law.refused_in_evaluation
    if transform in refused:
        with pytest.raises(UsageError, match=r"torch\.func"):
            TRANSFORMS[transform](quantizer, z)
        return
    given = TRANSFORMS[transform](quantizer, z)
    assert given.isfinite().all()
    if transform == "vmap" and not quantizer.training:
        torch.testing.assert_close(given, quantizer(z).z_q)


def test_indices_are_the_same_under_vmap(quantizer):
    z = latents(3, D, 4)
    assert torch.equal(torch.func.vmap(lambda row: quantizer.assign(row[None])[0])(z), quantizer.assign(z))


def test_float64_stays_float64(quantizer):
    quantizer.double().eval()
    z_q, indices, losses = quantizer(latents(2, D, 3).double())
    assert z_q.dtype == quantizer.codebook.dtype == torch.float64
    assert quantizer.indices_to_codes(indices).dtype == torch.float64
    assert all(term.dtype == torch.float64 for term in losses.values())


@pytest.mark.parametrize("training", [True, False])
def test_a_state_dict_makes_a_new_quantizer_the_same(quantizer, kind, training):
    quantizer.anneal(0.5)
    quantizer(latents(4, D, 3, 3))  # moves the statistics of those that have some
    other = QUANTIZERS[kind](K, D)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    results = []
    for each in (quantizer, other):
        each.train(training)
        torch.manual_seed(5)
        results.append(each(latents(2, D, 4, 4, seed=6)))
    assert torch.equal(results[0].indices, results[1].indices)
    assert torch.equal(results[0].z_q, results[1].z_q)


def test_a_table_in_evaluation_follows_new_weights(quantizer):
    quantizer.eval()
    before = quantizer.codebook.clone()
    changed = {
        name: value + 1 if value.is_floating_point() else value for name, value in quantizer.state_dict().items()
    }
    quantizer.load_state_dict(changed)
    fresh = copy.deepcopy(quantizer).train()
    torch.testing.assert_close(quantizer.codebook, fresh.codebook)
    if any(True for _ in quantizer.parameters()):
        assert not torch.equal(quantizer.codebook, before)


def test_baking_keeps_indices_and_vectors(quantizer, kind, law):
    z = latents(8, D, 6, 6)
    quantizer(z)
    quantizer.eval()
    if not law.baked:
        with pytest.raises(UsageError, match="table"):
            quantizer.bake()
        return
    baked = quantizer.bake()
    expected = quantizer(z)
    assert torch.equal(baked(z).indices, expected.indices)
    torch.testing.assert_close(baked(z).z_q, expected.z_q)
    assert not list(baked.parameters())
    if "base" in inspect.signature(QUANTIZERS[kind]).parameters:
        rebuilt = build(
            kind,
            {"codebook_size": K, "codebook_dim": D, "base": "table", "base_options": {"similarity": baked.similarity}},
        )
    else:
        rebuilt = build("table", {"codebook_size": K, "codebook_dim": D, "similarity": baked.similarity})
    rebuilt.load_state_dict(baked.state_dict())
    assert torch.equal(rebuilt(z).indices, expected.indices)


def test_latents_with_other_channels_are_refused_in_one_line(quantizer):
    for method in (quantizer, quantizer.assign):
        with pytest.raises(UsageError, match=r"latents must be \(B, 8, \*grid\), got \(2, 9, 3\)"):
            method(latents(2, D + 1, 3))


@pytest.mark.parametrize("size, what", [((1, 8), "codebook_size"), ((64, 0), "codebook_dim")])
def test_a_size_that_means_nothing_is_refused(kind, size, what):
    with pytest.raises(UsageError, match=what):
        QUANTIZERS[kind](*size)


def test_an_unknown_gradient_is_refused_with_the_choices(kind):
    if "gradient" not in QUANTIZERS[kind].__init__.__code__.co_varnames:
        pytest.skip("this method has one gradient")
    with pytest.raises(UsageError, match="unknown gradient 'rotate'; choose from rotation, straight_through"):
        QUANTIZERS[kind](K, D, gradient="rotate")
    assert QUANTIZERS[kind](K, D, gradient="rotation").gradient in GRADIENTS


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_latents_times_codes_is_made(kind, law):
    if law.rows_x_codes:
        pytest.skip("its softmax over all codes is its definition")
    codes, count = 2**13, 384
    quantizer = spread(build(kind, {"codebook_size": codes, "codebook_dim": 4, **law.wide_options}))
    z = latents(1, 4, count).requires_grad_()
    with Largest() as largest:
        z_q, _, losses = quantizer(z)
        (z_q.sum() + quantizer.loss(losses)).backward()
        quantizer.eval()(z.detach())
    assert largest.elements < codes * count
