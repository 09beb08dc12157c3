"""Evaluation by the field's protocols: tokenizers by their reconstructions, generated images by their statistics.

Images stream: what stays in memory are sums, histograms and, where pairs are needed, features; never the images. Sums
are float64, so that batch size, order, interruptions and the number of processes do not show in a result. Samples go by
their numbers: processes share them without padding, and an interrupted evaluation goes on with those not yet measured.

Networks other than FID's Inception give numbers that carry the network's name: `fd_efficientnet_lite0`, never `fid`.
"""

from lexel.evaluate.classifiers import PROBES, ProbeConfig
from lexel.evaluate.measure import Options, measure, results_of
from lexel.evaluate.metric import Batch, Context, Metric, SamplePlan, Values
from lexel.evaluate.metrics import METRICS
from lexel.evaluate.prefixes import evaluate_prefixes
from lexel.evaluate.probe import probe
from lexel.evaluate.reconstructions import evaluate_tokenizer
from lexel.evaluate.references import reference_statistics
from lexel.evaluate.results import Difference, compare_results, read_result, write_result
from lexel.evaluate.samples import evaluate_samples
from lexel.evaluate.sources import ImageTokenizer, Pictures
from lexel.metrics.protocols import PROTOCOLS, Protocol

__all__ = [
    "METRICS",
    "PROBES",
    "PROTOCOLS",
    "Batch",
    "Context",
    "Difference",
    "ImageTokenizer",
    "Metric",
    "Options",
    "Pictures",
    "ProbeConfig",
    "Protocol",
    "SamplePlan",
    "Values",
    "compare_results",
    "evaluate_prefixes",
    "evaluate_samples",
    "evaluate_tokenizer",
    "measure",
    "probe",
    "read_result",
    "reference_statistics",
    "results_of",
    "write_result",
]
