"""Codes that come and go: laws over QUANTIZERS of pruning, growing and restarting."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from test_quantizers import KINDS, D, K, books, latents, spread
from torch import Tensor

from lexel.checkpoint import load_strict
from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS, Levels, Quantizer, build
from lexel.quantizers.living import Recoded

FIXED = {"lfq", "bsq", "fsq"}  # codes follow from their index
BY_PROJECTION = {"simvq", "fvq", "vqgan_lc", "affine", "ibq_affine"}  # pruned to a plain table of their codes
GROWS = {"vq", "ema", "cosine", "soft", "ibq", "simvq", "affine", "ibq_affine"}
RESTARTS = [kind for kind in KINDS if "restart_below" in inspect.signature(QUANTIZERS[kind]).parameters]
TABLE = {"codebook_size": K, "codebook_dim": D}


def trained(kind: str, **options) -> Quantizer:
    torch.manual_seed(0)
    quantizer = spread(QUANTIZERS[kind](K, D, **options))
    quantizer(latents(2, D, 4, 4))  # running statistics have moved
    return quantizer.eval()


def rebuilt(recoded: Recoded) -> Quantizer:
    """As a model folder is read: built from its table, without weights, then loaded strictly."""
    options = dict(recoded.table)
    kind = options.pop("kind")
    quantizer = build(kind, options)
    load_strict(quantizer, recoded.state, "recoded")
    return quantizer.eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED])
def test_pruning_keeps_the_bits_of_every_code_that_stays(kind):
    quantizer, z = trained(kind), latents(2, D, 4, 4, seed=9)
    indices = quantizer.assign(z)
    kept = indices.unique()
    assert 2 <= len(kept) < K
    new_number = torch.full((K,), -1).index_put((kept,), torch.arange(len(kept)))
    pruned = rebuilt(quantizer.prune({"kind": kind, **TABLE}, kept))
    assert pruned.codebook_size == len(kept)
    mapped = new_number[indices]
    assert torch.equal(pruned.indices_to_codes(mapped, (4, 4)), quantizer.indices_to_codes(indices, (4, 4)))
    for new, old in zip(books(pruned), books(quantizer), strict=True):
        assert torch.equal(new, old[kept])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED | {"residual", "nested", "multiscale"}])
def test_latents_choose_the_code_they_chose_before_pruning(kind):
    """But for structures: there a book may drop a code that another keeps, and the rest that is left changes."""
    quantizer, z = trained(kind), latents(2, D, 4, 4, seed=9)
    indices = quantizer.assign(z)
    kept = indices.unique()
    pruned = rebuilt(quantizer.prune({"kind": kind, **TABLE}, kept))
    assert torch.equal(kept[pruned.assign(z)], indices)


@pytest.mark.parametrize("kind", sorted(FIXED))
def test_codes_that_follow_from_their_index_are_neither_dropped_nor_added(kind):
    quantizer = QUANTIZERS[kind](K, D)
    with pytest.raises(UsageError, match=r"dropped: its codes are no rows of a table"):
        quantizer.prune({"kind": kind, **TABLE}, torch.arange(4))
    with pytest.raises(UsageError, match=r"added: its codes are no rows of a table"):
        quantizer.grow({"kind": kind, **TABLE}, torch.arange(K), quantizer.codebook)


@pytest.mark.parametrize("base", ["ema", "cosine", "simvq"])
def test_a_residual_quantizer_is_pruned_whatever_its_base(base):
    quantizer = trained("residual", base=base, depth=3, shared=base == "ema", shrink=0.5)
    table = {"kind": "residual", **TABLE, "base": base, "depth": 3, "shared": base == "ema", "shrink": 0.5}
    kept = torch.tensor([1, 5, 7, 30])
    pruned = rebuilt(quantizer.prune(table, kept))
    indices = torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pruned.indices_to_codes(indices), quantizer.indices_to_codes(kept[indices]))


def test_levels_are_pruned_together():
    torch.manual_seed(0)
    levels = Levels([build("vq", TABLE), build("vq", TABLE)], (1, 4)).eval()
    kept = torch.tensor([3, 4, 60])
    recoded = levels.prune({"kind": "vq", **TABLE}, kept)
    pruned = Levels([build("vq", {"codebook_size": 3, "codebook_dim": D}) for _ in range(2)], (1, 4))
    load_strict(pruned, recoded.state, "levels")
    indices = torch.tensor([[0, 1, 2, 2, 0]])
    assert recoded.table == {"kind": "vq", "codebook_size": 3, "codebook_dim": D}
    assert torch.equal(pruned.indices_to_codes(indices), levels.indices_to_codes(kept[indices]))


def test_running_counts_are_pruned_and_grown_with_their_codes():
    quantizer = trained("vq", restart_below=0.5)
    quantizer.counts.copy_(torch.arange(K))
    table = {"kind": "vq", **TABLE, "restart_below": 0.5}
    assert rebuilt(quantizer.prune(table, torch.tensor([2, 9]))).counts.tolist() == [2.0, 9.0]
    parents = torch.cat([torch.arange(K), torch.tensor([8])])
    counts = rebuilt(quantizer.grow(table, parents, quantizer.codebook[parents])).counts
    assert (counts[8], counts[K], counts[9]) == (4.0, 4.0, 9.0)


# ------------------------------------------------------------------------------------------------------ grow


@pytest.mark.parametrize("kind", sorted(GROWS))
def test_growing_gives_the_codes_asked_for_and_keeps_the_rest_to_the_bit(kind):
    quantizer = trained(kind)
    parents = torch.cat([torch.arange(K), torch.tensor([3, 5])])
    codes = quantizer.codebook.detach()[parents].clone()
    asked = F.normalize(latents(4, D, seed=4), dim=1)  # unit vectors are what every method can have
    codes[[3, 5, K, K + 1]] = asked
    grown = rebuilt(quantizer.grow({"kind": kind, **TABLE}, parents, codes))
    assert grown.codebook_size == K + 2
    torch.testing.assert_close(grown.codebook[[3, 5, K, K + 1]], asked, atol=2e-5, rtol=1e-4)
    others = torch.tensor([k for k in range(K) if k not in (3, 5)])
    torch.testing.assert_close(grown.codebook[others], quantizer.codebook[others], atol=1e-6, rtol=1e-6)
    for name in quantizer.code_tables[:1]:
        assert torch.equal(grown.state_dict()[name][others], quantizer.state_dict()[name][others])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GROWS])
def test_every_other_method_says_why_it_cannot_grow(kind):
    quantizer = QUANTIZERS[kind](K, D)
    with pytest.raises(UsageError, match=r"cannot grow|can be added: its codes"):
        quantizer.grow({"kind": kind, **TABLE}, torch.arange(K), latents(K, D))


# ------------------------------------------------------------------------------------------------------ restart


def learn(quantizer: Quantizer, steps: range) -> None:
    """Plain training on latents that live on one side only; half of the codes start on the other."""
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-3) if list(quantizer.parameters()) else None
    for step in steps:
        quantizer.anneal(step / 100)
        if optimizer is not None:
            optimizer.zero_grad()
        z_q, _, losses = quantizer(side(step))
        if optimizer is not None:
            (quantizer.loss(losses) + (z_q - side(step)).square().mean()).backward()
            optimizer.step()


def side(step: int) -> Tensor:
    return latents(4, D, 32, seed=step) + 4 * torch.arange(D).eq(0).float()[:, None]


@pytest.mark.parametrize("kind", RESTARTS)
def test_restarting_brings_dead_codes_into_use(kind):
    used = {}
    for restart in (0.0, 0.9):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[kind](K, D, restart_below=restart)
        with torch.no_grad():
            quantizer.weight[4:, 0] = -10  # on the other side, but for four codes
        learn(quantizer, range(30))
        used[restart] = len(quantizer.eval()(side(1000)).indices.unique())
    assert used[0.9] > used[0.0] + K // 4, used


@pytest.mark.parametrize("kind", RESTARTS)
def test_a_resumed_training_restarts_the_same_codes(kind):
    def new() -> Quantizer:
        torch.manual_seed(0)
        return QUANTIZERS[kind](K, D, restart_below=0.995)

    whole, first, second = new(), new(), new()
    start = whole.state_dict()["weight"].clone()
    for quantizer, steps in ((whole, range(6)), (first, range(3))):
        for step in steps:
            quantizer.anneal(step / 6)
            quantizer(side(step))
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.anneal(step / 6)
        second(side(step))
    assert (whole.weight != start).any(1).sum() > K // 4
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in RESTARTS if kind != "ema"])
def test_a_shared_book_restarts_between_steps_and_never_inside_one(kind):
    torch.manual_seed(0)
    quantizer = build(
        "residual", {**TABLE, "depth": 3, "base": kind, "shared": True, "base_options": {"restart_below": 0.995}}
    )
    for step in range(3):
        quantizer.anneal(step / 3)
        z = side(step).requires_grad_()
        z_q, _, losses = quantizer(z)
        (quantizer.loss(losses) + z_q.square().mean()).backward()  # raises where a table changed inside the graph
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("kind", RESTARTS)
def test_without_the_option_the_state_is_what_it_was(kind):
    assert {"counts", "counted"} & QUANTIZERS[kind](K, D).state_dict().keys() == (
        {"counts"} if kind == "ema" else set()
    )
    with pytest.raises(UsageError, match="restart_below must be at least 0"):
        build(kind, {**TABLE, "restart_below": -1.0})


@pytest.mark.parametrize("kind", ["vq", "cosine"])
def test_clustering_brings_every_code_into_use_and_leaves_alone_those_that_are(kind):
    torch.manual_seed(0)
    quantizer = build(kind, {**TABLE, "clustering": True})
    with torch.no_grad():
        quantizer.weight[4:, 0] = -10  # on the other side, but for four codes
        quantizer.use[0] = 1.0  # chosen so often that it stays where it is
    first = quantizer.weight[0].clone()
    quantizer(side(0))
    assert torch.equal(quantizer.weight[0], first)
    rows = side(0).movedim(1, -1).flatten(0, -2)
    ones_left = torch.cdist(quantizer.weight[4:], rows).amin(1)
    assert ones_left.max() < 0.1  # exp(-0.001) of the way in one step
    assert quantizer.use.sum() == pytest.approx(0.99 + 0.01)
    other = build(kind, TABLE)
    assert "use" not in other.state_dict()
    kept = torch.tensor([0, 5, 7])
    assert torch.equal(quantizer.prune({"kind": kind, **TABLE}, kept).state["use"], quantizer.use[kept])
    with pytest.raises(UsageError, match="clustering = 1 is not true or false"):
        build(kind, {**TABLE, "clustering": 1})


def test_a_shared_book_clusters_without_a_fault_in_the_graph():
    torch.manual_seed(0)
    options = {**TABLE, "depth": 3, "base": "vq", "shared": True, "base_options": {"clustering": True}}
    quantizer = build("residual", options)
    z_q, _, losses = quantizer(side(0).requires_grad_())
    (quantizer.loss(losses) + z_q.square().mean()).backward()
