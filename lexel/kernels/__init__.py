"""Nearest-code search and index backpropagation, without a tensor of N x K."""

from lexel.kernels.cluster_index import ClusterIndex
from lexel.kernels.index_backpropagation import index_backpropagation
from lexel.kernels.inputs import (
    IMPLEMENTATIONS,
    PRODUCTS,
    SIMILARITIES,
    Implementation,
    Products,
    Similarity,
    has_half_products,
)
from lexel.kernels.nearest import nearest

__all__ = [
    "IMPLEMENTATIONS",
    "PRODUCTS",
    "SIMILARITIES",
    "ClusterIndex",
    "Implementation",
    "Products",
    "Similarity",
    "has_half_products",
    "index_backpropagation",
    "nearest",
]
