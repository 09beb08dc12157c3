"""Best-code search and index backpropagation against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.kernels import index_backpropagation, nearest, search, tiled, tiled_softmax
from lexel.kernels.inputs import Inputs
from lexel.kernels.oracle import EPS
from lexel.kernels.scores import minus_squares
from lexel.kernels.search import WIDTH, near_codes

TERMS = ["quantization", "commitment", "codebook", "entropy_sample", "entropy_batch"]
WEIGHTS = {"quantization": 1.0, "commitment": 2.0, "codebook": 0.3, "entropy_sample": 5.0, "entropy_batch": -4.0}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outcome(z: Tensor, codebook: Tensor, implementation: str, dtype: torch.dtype = torch.float64, **options):
    """Everything a step sees: z_q, indices, the terms, and the gradients of z and the codebook, for a mixed loss."""
    z, codebook = z.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()
    z_q, indices, terms = index_backpropagation(z, codebook, implementation=implementation, **options)
    g = normal(*z.shape, seed=9).to(z_q) / len(z)
    loss = (z_q * g).sum() + sum(WEIGHTS[name] * term for name, term in terms.items())
    d_z, d_codebook = torch.autograd.grad(loss, (z, codebook))
    return {"z_q": z_q, "indices": indices, **terms, "d_z": d_z, "d_codebook": d_codebook}


@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["listed", "wide"])
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_parts_of_the_rows_have_batch_entropies_of_their_own(similarity, spread):
    z, codebook = spread * normal(30, 8, dtype=torch.float64), normal(100, 8, seed=1, dtype=torch.float64)
    options = {"similarity": similarity, "entropy_temperature": 0.05}
    exact = outcome(z, codebook, "oracle", entropy_parts=3, **options)
    found = outcome(z, codebook, "tiled", entropy_parts=3, **options)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13, msg=name)
    alone = [index_backpropagation(part, codebook, **options)[2]["entropy_batch"] for part in z.split(10)]
    torch.testing.assert_close(found["entropy_batch"], torch.stack(alone).mean())
    with pytest.raises(UsageError, match="entropy_parts must divide the 30 rows, got 4"):
        index_backpropagation(z, codebook, entropy_parts=4)


def test_a_second_derivative_is_refused_in_words_and_the_oracle_has_one():
    z, codebook = normal(5, 4, dtype=torch.float64).requires_grad_(), normal(20, 4, seed=1, dtype=torch.float64)
    for implementation in ("tiled", "oracle"):
        z_q, _, terms = index_backpropagation(z, codebook, implementation=implementation)
        (gradient,) = torch.autograd.grad(z_q.sum() + terms["entropy_sample"], z, create_graph=True)
        if implementation == "tiled":
            with pytest.raises(UsageError, match="index backpropagation has no second derivatives"):
                gradient.sum().backward()
        else:
            gradient.sum().backward()
            assert z.grad.isfinite().all()


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


SHAPES = [(1, 2, 3), (5, 2, 1), (37, 1000, 8), (50, 1025, 16), (1030, 1500, 32), (3, 70, 1024)]


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
@pytest.mark.parametrize(("rows", "size", "dim"), SHAPES)
def test_tiles_agree_with_the_dense_formulas_in_float64(rows, size, dim, similarity):
    z, codebook = normal(rows, dim, dtype=torch.float64), normal(size, dim, seed=1, dtype=torch.float64)
    exact = outcome(z, codebook, "oracle", similarity=similarity, entropy_temperature=0.05)
    found = outcome(z, codebook, "tiled", similarity=similarity, entropy_temperature=0.05)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["broad", "saturated"])
def test_two_passes_over_the_codes_agree_with_the_dense_formulas_in_float64(spread, similarity):
    z, codebook = spread * normal(400, 16), normal(2100, 16, seed=1)  # two blocks of rows, three of codes
    exact, twice = (outcome(z, codebook, way, similarity=similarity, rows=16) for way in ("oracle", "tiled"))
    for name, value in exact.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-9, atol=1e-12, msg=name)
    once, twice = (outcome(z, codebook, "tiled", torch.float32, similarity=similarity, rows=r) for r in (None, 16))
    for name in ("d_z", "d_codebook"):
        assert distance(twice[name], exact[name]) <= 1.1 * distance(once[name], exact[name]) + 1e-7


def cases() -> dict[str, tuple[Tensor, Tensor, dict]]:
    z, codebook = normal(48, 32), normal(700, 32, seed=1)
    return {
        "wide": (z * 0.3, codebook, {}),
        "saturated": (z * 8, codebook, {}),
        "flat": (z * 1e-4, codebook, {}),
        "duplicate codes": (z, codebook[:350].repeat(2, 1), {}),
        "one code": (z, codebook[:1].repeat(40, 1), {}),
        "a zero codebook": (z, torch.zeros(40, 32), {}),
        "tiny norms": (z * 1e-12, codebook * 1e-12, {}),
        "huge norms": (z * 1e4, codebook * 1e2, {}),
        "beyond half precision": (z * 20, codebook * 20, {}),
        "a warm entropy": (z, codebook, {"entropy_temperature": 1.0}),
        "warmer than the softmax": (z, codebook, {"entropy_temperature": 3.0, "temperature": 0.5}),
        "cold": (z, codebook, {"temperature": 0.05}),
        "some rows wide": (torch.cat([z[:24], z[24:] * 1e-4]), codebook, {}),
    }


@pytest.mark.parametrize("together", [1024, 33])
@pytest.mark.parametrize("case", cases())
def test_float32_is_no_further_from_float64_than_the_dense_path(case, together, monkeypatch):
    from lexel.kernels import tiled

    monkeypatch.setattr(tiled, "codes_at_a_time", lambda keys: together)  # 33: codes are taken in several tiles
    z, codebook, options = cases()[case]
    exact = outcome(z, codebook, "oracle", **options)
    dense = outcome(z, codebook, "oracle", torch.float32, **options)
    found = outcome(z, codebook, "tiled", torch.float32, **options)
    assert torch.equal(found["indices"], exact["indices"])
    for name in [*TERMS, "z_q", "d_z", "d_codebook"]:
        assert found[name].isfinite().all(), name
        error, allowed = ((x[name].double() - exact[name]).norm() for x in (found, dense))
        # 1e-9: what the dropped mass of exp(-28) may change of an entropy.
        assert error <= 1.5 * allowed + 3e-6 * exact[name].norm() + 1e-9, name


def test_float32_entropy_gradients_are_thirty_times_closer_than_the_dense_path():
    z, codebook = normal(64, 256) * 3 / 16, normal(4096, 256, seed=1)
    exact = outcome(z, codebook, "oracle")
    dense = outcome(z, codebook, "oracle", torch.float32)
    found = outcome(z, codebook, "tiled", torch.float32)
    for name in ("d_z", "d_codebook"):
        assert 30 * distance(found[name], exact[name]) < distance(dense[name], exact[name]), name


@pytest.mark.parametrize("case", ["soft", "sharp"])
@pytest.mark.parametrize("implementation", ["oracle", "tiled"])
def test_terms_and_gradients_are_the_published_ones(parity, case, implementation):
    fixture = next(f for f in torch.load(parity / "quantizer_terms.pt", weights_only=True) if f["name"] == case)
    z, codebook = fixture["z"].clone().requires_grad_(), fixture["embedding"].clone().requires_grad_()
    z_q, indices, terms = index_backpropagation(
        z.movedim(1, -1).flatten(0, -2),
        codebook,
        entropy_temperature=fixture["temperature"],
        implementation=implementation,
    )
    z_q = z_q.view(z.shape[0], *z.shape[2:], -1).movedim(-1, 1)
    torch.testing.assert_close(z_q, fixture["z_q"], rtol=1e-10, atol=0)
    assert torch.equal(indices, fixture["indices"].flatten())
    quantization, commitment, code, sample, batch = (terms[name] for name in TERMS)
    found = {
        "l_ste": quantization,
        "l_enc": commitment,
        "l_code": code,
        "quant_loss": quantization + commitment + fixture["beta"] * code,
        "sample_entropy": sample,
        "avg_entropy": batch,
        "entropy_loss": sample - batch,
        "downstream": (z_q * fixture["downstream_grad"]).sum(),
    }
    for name, value in found.items():
        expected = fixture["terms"][name]
        assert distance(value, expected["value"]) < 1e-10, name
        grads = torch.autograd.grad(value, (z, codebook), retain_graph=True, allow_unused=True)
        for grad, wanted in zip(grads, (expected["grad_z"], expected["grad_embedding"]), strict=True):
            if wanted is None:
                assert grad is None or not grad.any(), name
            else:
                assert distance(grad, wanted) < 1e-10, name


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("entropy_temperature", [0.05, 2.0])
def test_each_term_alone_has_the_gradient_of_its_formula(name, entropy_temperature):
    z, codebook = normal(20, 6, dtype=torch.float64), normal(90, 6, seed=1, dtype=torch.float64)
    grads = []
    for implementation in ("oracle", "tiled"):
        inputs = (z.clone().requires_grad_(), codebook.clone().requires_grad_())
        _, _, terms = index_backpropagation(
            *inputs, implementation=implementation, entropy_temperature=entropy_temperature
        )
        grads.append(torch.autograd.grad(terms[name], inputs, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-14)


def test_the_entropy_terms_pass_a_numerical_gradient_check():
    z, codebook = normal(4, 3, dtype=torch.float64), normal(7, 3, seed=1, dtype=torch.float64)

    def entropies(z, codebook):
        terms = index_backpropagation(z, codebook, entropy_temperature=0.5)[2]
        return terms["entropy_sample"], terms["entropy_batch"]

    assert torch.autograd.gradcheck(entropies, (z.requires_grad_(), codebook.requires_grad_()))


def test_the_batch_entropy_of_uniform_use_is_known_by_hand():
    eye = torch.eye(8)
    terms = index_backpropagation(eye, eye)[2]
    torch.testing.assert_close(terms["entropy_batch"], -torch.tensor(1 / 8 + EPS).log(), rtol=1e-6, atol=0)
    assert terms["entropy_sample"] < 1e-30  # exp(-100) of mass beside the chosen code


def test_a_flat_softmax_has_the_entropy_of_the_uniform_one():
    terms = index_backpropagation(torch.zeros(3, 4), normal(50, 4))[2]
    torch.testing.assert_close(terms["entropy_sample"], torch.tensor(50.0).log())


def test_backward_runs_twice_through_the_same_graph():
    z, codebook = normal(9, 4).requires_grad_(), normal(30, 4, seed=1).requires_grad_()
    z_q, _, terms = index_backpropagation(z, codebook)
    loss = z_q.square().sum() + sum(terms.values())
    first = torch.autograd.grad(loss, (z, codebook), retain_graph=True)
    second = torch.autograd.grad(loss, (z, codebook))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_agree_to_the_bit():
    z, codebook = normal(600, 16), normal(2000, 16, seed=1)
    first, second = (outcome(z, codebook, "tiled", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_row_block_changes_rounding_only(rows):
    z, codebook = normal(60, 16), normal(900, 16, seed=1)
    z[40:] *= 1e-4  # wide rows are done in blocks too
    whole, blocks = (outcome(z, codebook, "tiled", torch.float32, rows=r) for r in (None, rows))
    for name in whole:
        torch.testing.assert_close(blocks[name], whole[name], rtol=1e-5, atol=1e-7, msg=name)


def test_leaving_out_the_entropies_changes_no_other_term():
    z, codebook = normal(30, 8), normal(200, 8, seed=1)
    with_, without = (index_backpropagation(z, codebook, entropy=entropy) for entropy in (True, False))
    assert without[2].keys() == {"quantization", "commitment", "codebook"}
    assert torch.equal(with_[1], without[1])
    assert all(torch.equal(with_[2][name], value) for name, value in without[2].items())


def test_gradients_flow_on_through_a_projected_codebook():
    z, bank, weight = (normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(12, 5), (40, 7), (7, 5)]))
    grads = []
    for implementation in ("oracle", "tiled"):
        projection = weight.clone().requires_grad_()
        z_q, _, terms = index_backpropagation(z, bank @ projection, implementation=implementation)
        grads.append(torch.autograd.grad(z_q.sum() + sum(terms.values()), projection)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_strided_inputs_give_what_contiguous_ones_give():
    z, codebook = normal(8, 30).T, normal(8, 100, seed=1).T
    assert not z.is_contiguous()
    strided, plain = outcome(z, codebook, "tiled"), outcome(z.contiguous(), codebook.contiguous(), "tiled")
    for name in plain:
        torch.testing.assert_close(strided[name], plain[name], msg=name)


def test_autocast_decides_indices_in_float32():
    z, codebook = normal(400, 32), normal(3000, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, terms = index_backpropagation(z, codebook)
        assert torch.equal(nearest(z, codebook, "dot"), indices)
    assert z_q.dtype == torch.float32
    assert torch.equal(indices, index_backpropagation(z, codebook)[1])
    assert all(term.dtype == torch.float32 for term in terms.values())


@pytest.mark.parametrize("entropy", [True, False])
def test_the_state_of_the_forward_pass_has_the_shapes_that_compilers_are_told(entropy):
    inputs = Inputs(normal(8, 6), normal(40, 6), None, True, 1.0, 0.01, entropy, 16, 2, 1)
    told_and_found = zip(tiled.empty_state(inputs), tiled.forward(inputs), strict=True)
    for name, (told, found) in zip(tiled.ForwardState._fields, told_and_found, strict=True):
        assert (told.shape, told.dtype) == (found.shape, found.dtype), name


@pytest.mark.thorough
def test_a_compiled_step_has_no_graph_break():
    def step(z, codebook):
        z_q, indices, terms = index_backpropagation(z * 2, codebook)
        return z_q.square().sum() + sum(terms.values()), indices

    z, codebook = normal(10, 4).requires_grad_(), normal(30, 4, seed=1).requires_grad_()
    plain, indices = step(z, codebook)
    compiled, compiled_indices = torch.compile(step, fullgraph=True, backend="aot_eager")(z, codebook)
    assert torch.equal(compiled_indices, indices)
    torch.testing.assert_close(torch.autograd.grad(compiled, (z, codebook)), torch.autograd.grad(plain, (z, codebook)))


@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("slack", [0.0, 0.4])
@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("dim", [16, 1024])
@pytest.mark.parametrize("coarser", [torch.bfloat16, torch.int8])
def test_a_coarser_scan_lists_the_same_codes_to_the_bit(coarser, dim, distances, slack, scale):
    queries, keys = normal(70, dim) * scale, normal(2500, dim, seed=1)
    bias = minus_squares(keys) if distances else None
    coarse, fine = (near_codes(queries, keys, bias, slack, scan) for scan in (coarser, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(coarse, fine, strict=True))
    scores = queries.double() @ keys.double().T + (0 if bias is None else bias)
    assert torch.equal(fine.best, scores.argmax(1))
    counts = (scores >= scores.amax(1, keepdim=True) - slack).sum(1)
    assert torch.equal(fine.wide, counts > WIDTH)
    assert torch.equal((fine.scores > -torch.inf).sum(1)[~fine.wide], counts[~fine.wide])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_scan_in_int8_leaves_numbers_it_cannot_hold_to_a_finer_one(bad):
    queries, keys = normal(40, 64), normal(1500, 64, seed=1)
    queries[3, 5], queries[7] = bad, 0
    keys[9] = 1e-42  # smaller than any scale
    coarse, fine = (near_codes(queries, keys, None, 0.0, scan) for scan in (torch.int8, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(coarse, fine, strict=True))


@pytest.mark.parametrize("distances", [False, True])
def test_the_error_bounds_of_a_scan_in_int8_hold(distances):
    queries, keys = normal(200, 256), normal(3000, 256, seed=1)
    keys[::7] *= 30  # lengths differ
    bias = minus_squares(keys) if distances else None
    norms, table = search.prepared(keys, torch.int8)
    maxima = search._group_maxima(table, queries, keys, bias, torch.int8).double()
    exact = queries.double() @ keys.double().T + (0 if bias is None else bias)
    padded = torch.nn.functional.pad(exact, (0, -len(keys) % search.TILE), value=-torch.inf)
    groups = padded.view(len(queries), -1, search.GROUP, search.APART).amax(2).flatten(1)
    rows, full = groups.isfinite().nonzero(as_tuple=True)
    error = (maxima - groups)[rows, full].abs()
    of_all = search.scan_error(queries, bias, torch.int8, norms)
    of_groups = search.row_errors(queries, bias, torch.int8).of(*norms.of_groups)(rows, full)
    assert (error <= of_groups).all()
    assert (of_groups <= 1.0001 * of_all[rows]).all()
    assert error.max() > 0.002 * of_all.max()  # and it is no wild guess


def brute_force(z: Tensor, codebook: Tensor, similarity: str) -> Tensor:
    z, codebook = z.double(), codebook.double()
    if similarity == "l2":
        return torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    products = z @ codebook.T
    return (products if similarity == "dot" else products / codebook.norm(dim=1)).argmax(1)


@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
@pytest.mark.parametrize(
    ("rows", "size", "dim"), [(1, 2, 1), (20, 2, 3), (1100, 1025, 8), (33, 5000, 64), (2, 9, 1024)]
)
def test_nearest_is_the_best_of_all_codes(rows, size, dim, similarity):
    z, codebook = normal(rows, dim), normal(size, dim, seed=1)
    expected = brute_force(z, codebook, similarity)
    if dim == 1 and similarity == "cosine":
        expected = nearest(z, codebook, similarity, "oracle")  # all codes of one sign tie
    for implementation in ("tiled", "oracle", "auto"):
        assert torch.equal(nearest(z, codebook, similarity, implementation), expected)


@pytest.mark.parametrize("copies", [2, 3000])
@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
def test_ties_go_to_the_lowest_index(similarity, copies):
    codebook = normal(5, 16)
    indices = nearest(codebook * 2, codebook.repeat(copies, 1), similarity)
    assert torch.equal(indices, nearest(codebook * 2, codebook, similarity))


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_nearest_sees_differences_that_float32_scores_cannot_hold(similarity):
    # A common offset of 1000 costs the scores ten bits and more; the codes still differ in the first place.
    offset, step = torch.full((1, 8), 1000.0), torch.zeros(1, 8)
    step[0, 0] = 2.0**-10
    codebook = offset + step * torch.tensor([[0.0], [3.0], [1.0], [2.0]])
    expected = {"dot": [1, 1, 1, 1], "l2": [0, 1, 2, 3]}[similarity]
    assert nearest(codebook, codebook, similarity).tolist() == expected


def test_a_row_does_not_depend_on_its_batch():
    z, codebook = normal(300, 64), normal(4000, 64, seed=1)
    together = nearest(z, codebook)
    assert torch.equal(together, torch.cat([nearest(row[None], codebook) for row in z]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_indices_stay_in_range_whatever_comes_in(bad):
    z = normal(4, 8)
    z[1, 3] = bad
    indices = nearest(z, normal(50, 8, seed=1))
    assert ((indices >= 0) & (indices < 50)).all()
    assert torch.equal(indices[[0, 2, 3]], nearest(z[[0, 2, 3]], normal(50, 8, seed=1)))


def test_products_beyond_float32_are_decided_all_the_same():
    z, codebook = normal(6, 8), normal(40, 8, seed=1)
    assert torch.equal(nearest(z * 1e20, codebook * 1e20, "dot"), nearest(z, codebook, "dot"))


@pytest.mark.parametrize(
    ("z", "codebook", "options", "message"),
    [
        ((0, 4), (5, 4), {}, "empty batch"),
        ((3, 4), (5, 6), {}, r"same D, got \(3, 4\) and \(5, 6\)"),
        ((3, 4, 2), (5, 4), {}, "z must be"),
        ((3, 4), (0, 4), {}, "codebook has no rows"),
        ((3, 4), (5, 4), {"similarity": "angle"}, "unknown similarity 'angle'; choose from cosine, dot, l2"),
        ((3, 4), (5, 4), {"implementation": "fast"}, "unknown implementation 'fast'; choose from auto, oracle"),
        ((3, 4), (5, 4), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ((3, 4), (5, 4), {"entropy_temperature": -1.0}, "entropy_temperature must be above 0"),
        ((3, 4), (5, 4), {"rows": 0}, "rows must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(z, codebook, options, message):
    with pytest.raises(UsageError, match=message):
        index_backpropagation(torch.zeros(z), torch.zeros(codebook), **options)


def test_integer_latents_are_refused():
    with pytest.raises(UsageError, match="floating point"):
        nearest(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3))


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.largest = max(self.largest, value.numel())
        return result


def test_no_tensor_grows_with_rows_times_codes():
    rows, size, dim = 512, 65536, 4
    z, codebook = normal(rows, dim).requires_grad_(), normal(size, dim, seed=1).requires_grad_()
    with Allocations() as seen:
        inputs = Inputs(z.detach(), codebook.detach(), None, False, 1.0, 0.01, True, 8, 1, 1, False)
        found = tiled.forward(inputs)
        one = torch.ones(())
        tiled.backward(inputs, found, torch.ones(rows, dim), torch.ones(rows, dim), one, one)
    assert seen.largest <= rows * size / 16  # the maxima of groups; the dense path makes nine of rows x size


@pytest.mark.parametrize("together", [1024, 100])
@pytest.mark.parametrize("scale", [16.0, 40.0])
def test_the_softmax_of_the_backward_pass_has_no_denormal_numbers(scale, together, monkeypatch):
    seen = []
    real = torch.softmax

    def softmax(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(result.clone())
        return result

    real_power = Tensor.exp2_

    def power(values):
        result = real_power(values)
        seen.append(result.clone())
        return result

    monkeypatch.setattr(torch, "softmax", softmax)
    monkeypatch.setattr(Tensor, "exp2_", power)
    for module in (tiled, tiled_softmax):
        monkeypatch.setattr(module, "codes_at_a_time", lambda keys: together)
    z, codebook = normal(32, 64) * scale / 8, normal(500, 64, seed=1)
    outcome(z, codebook, "tiled", torch.float32)
    p = torch.cat(seen, dim=1)
    assert p.shape == (32, 500)
    assert ((p > 0) & (p >= torch.finfo(torch.float32).tiny)).all()
    assert p.amin() < 1e-15  # the case is saturated enough to have had some
    assert len(codebook) * torch.tensor(-tiled.FLOOR).exp() < 1e-14  # the mass that the floor adds


@pytest.mark.slow
def test_a_million_codes_give_what_the_dense_formulas_give():
    z, codebook = normal(8, 4), normal(2**20, 4, seed=1)
    exact, dense = outcome(z, codebook, "oracle"), outcome(z, codebook, "oracle", torch.float32)
    found = outcome(z, codebook, "tiled", torch.float32)
    assert torch.equal(found["indices"], exact["indices"])
    for name in [*TERMS, "d_z", "d_codebook"]:
        assert distance(found[name], exact[name]) <= distance(dense[name], exact[name]) + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("rows", "size", "dim"), [(37, 1000, 8), (3000, 5000, 64)])
def test_a_gpu_gives_what_the_cpu_gives(rows, size, dim, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    z, codebook = normal(rows, dim), normal(size, dim, seed=1)
    expected, found = outcome(z, codebook, "tiled"), outcome(z.cuda(), codebook.cuda(), "tiled", torch.float32)
    assert torch.equal(found["indices"].cpu(), expected["indices"])
    for name in ("entropy_sample", "entropy_batch"):
        torch.testing.assert_close(found[name].cpu().double(), expected[name], rtol=1e-6, atol=1e-9)
    for name in ("d_z", "d_codebook"):
        assert distance(found[name].cpu(), expected[name]) < (1e-2 if tf32 else 1e-5), name
    for similarity in ("dot", "l2", "cosine"):
        indices = nearest(z.cuda(), codebook.cuda(), similarity).cpu()
        assert torch.equal(indices, nearest(z.double(), codebook.double(), similarity))
