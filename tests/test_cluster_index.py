"""Approximate search: what it finds, what it misses, and that nothing uses it unasked."""

from pathlib import Path

import pytest
import torch

import lexel
from lexel.errors import UsageError
from lexel.kernels import ClusterIndex, nearest


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("similarity", ["l2", "dot", "cosine"])
def test_all_clusters_looked_through_are_the_exact_search(similarity):
    codebook, z = normal(200, 6), normal(300, 6, seed=1)
    index = ClusterIndex(codebook, similarity, clusters=9, probes=9)
    assert torch.equal(index.nearest(z), nearest(z, codebook, similarity))
    assert index.miss_rate(z) == 0


def test_misses_are_counted_against_the_exact_search_and_fall_with_the_probes():
    codebook, z = normal(400, 6), normal(500, 6, seed=1)
    rates = []
    for probes in (1, 2, 4, 20):
        index = ClusterIndex(codebook, probes=probes)
        exact = torch.cdist(z, codebook).argmin(1)
        rates.append(index.miss_rate(z))
        assert rates[-1] == (index.nearest(z) != exact).double().mean()
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.1
    assert rates[-1] == 0


def test_an_approximate_index_does_not_depend_on_the_batch():
    index, z = ClusterIndex(normal(300, 5), probes=3), normal(40, 5, seed=1)
    assert torch.equal(index.nearest(z), torch.cat([index.nearest(row[None]) for row in z]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 31}, r"clusters must be in \[1, 30\], got 31"),
        ({"clusters": 4, "probes": 5}, r"probes must be in \[1, 4\], got 5"),
        ({"probes": 0}, r"probes must be in \[1, 5\], got 0"),
        ({"similarity": "l1"}, "l1"),
    ],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ClusterIndex(normal(30, 5), **{"probes": 2, **options})


def test_nothing_in_the_package_searches_approximately_unasked():
    users = [
        path.name
        for path in Path(lexel.__file__).parent.rglob("*.py")
        if "ClusterIndex" in path.read_text(encoding="utf-8")
    ]
    assert sorted(users) == ["__init__.py", "cluster_index.py"]
