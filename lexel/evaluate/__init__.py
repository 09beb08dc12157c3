"""One evaluator for the field's protocols: tokenizers by their reconstructions, generated images by their statistics.

Images stream: what stays in memory are sums, histograms and, where pairs are needed, features; never the images. Sums
are float64, so that batch size, order, interruptions and the number of processes do not show in a result. Samples go by
their numbers: processes share them without padding, and a run that was stopped goes on with those not yet taken in.

Networks other than FID's Inception give numbers that carry the network's name: `fd_efficientnet_lite0`, never `fid`.
"""

from lexel.evaluate.reconstructions import evaluate_tokenizer
from lexel.evaluate.results import Difference, compare_results, read_result, write_result
from lexel.evaluate.samples import evaluate_samples, reference_statistics

__all__ = [
    "Difference",
    "compare_results",
    "evaluate_samples",
    "evaluate_tokenizer",
    "read_result",
    "reference_statistics",
    "write_result",
]
