"""What quantizers stand on: best-code search and index backpropagation, without a tensor of N x K."""

from lexel.kernels.index_backpropagation import index_backpropagation
from lexel.kernels.inputs import IMPLEMENTATIONS, SIMILARITIES, Implementation, Similarity
from lexel.kernels.search import nearest

__all__ = ["IMPLEMENTATIONS", "SIMILARITIES", "Implementation", "Similarity", "index_backpropagation", "nearest"]
