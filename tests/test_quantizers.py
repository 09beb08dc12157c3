"""The laws every quantizer keeps, over the whole table QUANTIZERS: a new entry is covered at once."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS, Quantizer, Soft, build
from lexel.quantizers.base import GRADIENTS
from lexel.quantizers.stacked import Stacked

K, D = 64, 8
SIZES = [(64, 8), (1024, 64), (16, 4), (64, 4), (4096, 3), (2, 1)]  # with D above, at and below log2 K
GRIDS = [(), (7,), (3, 5), (2, 3, 4)]
KINDS = sorted(QUANTIZERS)

# What a method learns by the decoder's gradient, and what by its loss terms; buffers never have gradients.
BY_DECODER = {
    "gumbel": {"weight", "logits.weight", "logits.bias"},
    "soft": {"weight"},
    "ibq": {"weight"},
}
BY_LOSS = {
    "vq": {"weight"},
    "cosine": {"weight"},
    "gumbel": {"logits.weight", "logits.bias"},
    "ibq": {"weight"},
    "vqgan_lc": {"projector.0.weight", "projector.0.bias"},
    "simvq": {"projection.weight", "projection.bias"},
    "fvq": {"bridge.recover.weight", "bridge.recover.bias"},  # the rest is behind the zero start
    "affine": {"weight"},
    "residual": {f"levels.{q}.weight" for q in range(4)},
    "product": {f"levels.{q}.weight" for q in range(2)},
}
# Methods whose latents get the decoder's gradient as it is (the others: through a norm, a tanh or a softmax).
IDENTITY = {"vq", "ema", "lfq", "simvq", "vqgan_lc", "fvq", "affine", "residual", "product"}
# Methods whose training looks at the whole batch (averages) or at chance (noise).
SHARED_IN_TRAINING = {"ema", "gumbel", "affine"}
# Methods with no table to search.
UNBAKED = {"gumbel", "fsq"}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    torch.manual_seed(0)
    return request.param


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
    return list(quantizer.codebook) if isinstance(quantizer, Stacked) else [quantizer.codebook]


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
    z_q, indices, _ = quantizer(latents(2, D, *grid))
    extra = (quantizer.books,) if isinstance(quantizer, Stacked) else ()
    assert indices.dtype == torch.int64
    assert indices.shape == (2, *extra, *grid)
    assert z_q.shape == (2, D, *grid)
    assert quantizer.indices_to_codes(indices).shape == (2, D, *grid)


@pytest.mark.parametrize("training", [True, False])
def test_indices_name_the_codes(quantizer, training):
    if training and isinstance(quantizer, Soft):
        pytest.skip("z_q is an average of codes in training, by the method's definition")
    quantizer.train(training)
    z_q, indices, _ = quantizer(latents(2, D, 3, 5))
    torch.testing.assert_close(quantizer.indices_to_codes(indices), z_q, atol=1e-6, rtol=1e-6)


def test_forward_and_assign_choose_the_same_indices(quantizer):
    quantizer.eval()
    z = latents(3, D, 4, 4)
    assert torch.equal(quantizer.assign(z), quantizer(z).indices)


def test_indices_are_rows_of_the_codebook(quantizer):
    quantizer.eval()
    z_q, indices, _ = quantizer(latents(2, D, 3, 5))
    each = indices.unbind(1) if isinstance(quantizer, Stacked) else [indices]
    codes = sum(book[index] for book, index in zip(books(quantizer), each, strict=True))
    torch.testing.assert_close(codes.movedim(-1, 1), z_q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(64, 8), (1024, 64), (16, 4), (4096, 3)], ids=str)
def test_every_index_has_its_own_code(kind, size):
    quantizer = QUANTIZERS[kind](*size)
    if kind == "fvq":  # starts with all codes at zero, by design
        assert not quantizer.codebook.any()
        spread(quantizer)
    for book in books(quantizer):
        assert len(torch.unique(book, dim=0)) == size[0]


def test_codes_are_in_reach_of_their_own_index(quantizer, kind):
    if kind in {"gumbel", "soft", "ibq", "fsq", "residual"}:
        pytest.skip("a code may lie nearer to another one in what this method compares")
    quantizer.eval()
    if isinstance(quantizer, Stacked):
        everything = torch.arange(K)[:, None].expand(K, quantizer.books)
    else:
        everything = torch.arange(K)
    assert torch.equal(quantizer.assign(quantizer.indices_to_codes(everything)), everything)


def test_the_decoders_gradient_reaches_what_the_method_says_and_nothing_else(quantizer, kind):
    z = latents(2, D, 3, 5).requires_grad_()
    gradient = latents(2, D, 3, 5, seed=3)
    quantizer(z).z_q.backward(gradient)
    assert reached(quantizer) == BY_DECODER.get(kind, set())
    assert z.grad.abs().sum() > 0
    assert z.grad.isfinite().all()
    if kind in IDENTITY:
        torch.testing.assert_close(z.grad, gradient)


def test_the_loss_reaches_what_the_method_says_and_nothing_else(kind):
    quantizer = QUANTIZERS[kind](K, D)
    z = latents(2, D, 3, 5).requires_grad_()
    loss = quantizer.loss(quantizer(z).losses)
    if loss.requires_grad:
        loss.backward()
    assert reached(quantizer) == BY_LOSS.get(kind, set())
    assert (z.grad is not None) == (kind not in {"soft", "fsq"})


def reached(quantizer: Quantizer) -> set[str]:
    return {name for name, p in quantizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("term, other", [("codebook", "commitment"), ("commitment", "codebook")])
@pytest.mark.parametrize("kind", ["vq", "cosine", "simvq", "fvq", "vqgan_lc", "affine", "residual", "product"])
def test_codebook_moves_codes_and_commitment_moves_latents(kind, term, other):
    quantizer = QUANTIZERS[kind](K, D)
    z = latents(2, D, 3, 5).requires_grad_()
    quantizer.loss(quantizer(z).losses, {term: 1.0, other: 0.0}).backward()
    moved = z.grad is not None and bool(z.grad.abs().sum() > 0)
    assert moved == (term == "commitment")
    assert bool(reached(quantizer)) == (term == "codebook")


@pytest.mark.parametrize("training", [True, False])
def test_images_of_a_batch_do_not_influence_each_other(quantizer, kind, training):
    if training and kind in SHARED_IN_TRAINING:
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


def test_baking_keeps_indices_and_vectors(quantizer, kind):
    z = latents(8, D, 6, 6)
    quantizer(z)
    quantizer.eval()
    if kind in UNBAKED:
        with pytest.raises(UsageError, match="table"):
            quantizer.bake()
        return
    baked = quantizer.bake()
    expected = quantizer(z)
    assert torch.equal(baked(z).indices, expected.indices)
    torch.testing.assert_close(baked(z).z_q, expected.z_q)
    assert not list(baked.parameters())
    if isinstance(quantizer, Stacked):
        tables = [level.codebook for level in baked]
        assert [table.shape for table in tables] == [level.codebook.shape for level in quantizer]
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
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_latents_times_codes_is_made(kind):
    if kind == "gumbel":
        pytest.skip("its softmax over all codes is its definition")
    codes, count = 2**15, 384
    options = {"vqgan_lc": {"feature_dim": 8}, "fvq": {"width": 16, "patch": 8}}.get(kind, {})
    quantizer = spread(build(kind, {"codebook_size": codes, "codebook_dim": 4, **options}))
    z = latents(1, 4, count).requires_grad_()
    with Largest() as largest:
        z_q, _, losses = quantizer(z)
        (z_q.sum() + quantizer.loss(losses)).backward()
        quantizer.eval()(z.detach())
    assert largest.elements < codes * count


WORKER = """
import sys, torch, torch.distributed as dist
from lexel.quantizers import QUANTIZERS
rank, where, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
models = {}
for together in (False, True):  # quantizers are built before there are processes, too
    if together:
        dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    for kind in QUANTIZERS:
        for options in [{}, {"start": "kmeans"}, {"restart_below": 0.995}] if kind == "ema" else [{}]:
            name = kind + "".join(options)
            if not together:
                torch.manual_seed(0)
                models[name] = QUANTIZERS[kind](64, 8, **options)
                continue
            q, result = models[name], {}
            for step in range(3):
                z = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step))[2 * rank:2 * rank + 2]
                q.zero_grad()
                _, indices, losses = q(z.requires_grad_())
            if "entropy_batch" in losses and kind != "ibq":
                losses["entropy_batch"].backward()
                dist.all_reduce(z.grad)
                result["batch"] = losses["entropy_batch"].detach()
            models[name] = {**q.state_dict(), **result}
torch.save(models, f"{out}.{rank}")
"""


def test_two_processes_keep_the_statistics_of_one(tmp_path: Path):
    command = [sys.executable, "-c", WORKER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet"), str(tmp_path / "out")], env=environment)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    for name, state in first.items():
        for key, value in state.items():
            assert torch.equal(value, second[name][key]), f"{name}: {key} differs between processes"

    for name, kind, options in [
        ("ema", "ema", {}),
        ("emastart", "ema", {"start": "kmeans"}),
        ("emarestart_below", "ema", {"restart_below": 0.995}),
        ("affine", "affine", {}),
    ]:
        torch.manual_seed(0)
        one = QUANTIZERS[kind](64, 8, **options)
        start = one.codebook.clone()
        for step in range(3):
            one(latents(4, 8, 6, seed=step))
        assert not torch.equal(one.codebook, start)
        for key, value in one.state_dict().items():
            torch.testing.assert_close(first[name][key], value, msg=f"{name}: {key}")
    for name in ("lfq", "bsq"):
        batch = QUANTIZERS[name](64, 8)(latents(4, 8, 6, seed=2)).losses["entropy_batch"]
        torch.testing.assert_close(first[name]["batch"], batch)
