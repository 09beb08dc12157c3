"""Formulas and accumulators for images, features and indices. Conventions are arguments; protocols.py names sets."""

from lexel.metrics.frechet import frechet_distance, frechet_distance_of_features, frechet_terms
from lexel.metrics.health import CodeHistogram, GradientHealth, gradient_health
from lexel.metrics.inception import ScoreState, contiguous_splits, inception_score, shuffled
from lexel.metrics.intervals import Interval, deal, jackknife
from lexel.metrics.kernel import KernelDistance, gaussian_mmd, kernel_distance, polynomial_mmd
from lexel.metrics.moments import FeatureBank, MeanState, Moments, MomentState
from lexel.metrics.neighbours import PrecisionRecall, precision_recall
from lexel.metrics.pixels import psnr, psnr_of, squared_error, ssim
from lexel.metrics.protocols import PROTOCOLS, Protocol
from lexel.metrics.statistics import (
    NpzImages,
    ReferenceStatistics,
    read_statistics,
    write_statistics,
)
from lexel.metrics.usage import WindowUsage

__all__ = [
    "PROTOCOLS",
    "CodeHistogram",
    "FeatureBank",
    "GradientHealth",
    "Interval",
    "KernelDistance",
    "MeanState",
    "MomentState",
    "Moments",
    "NpzImages",
    "PrecisionRecall",
    "Protocol",
    "ReferenceStatistics",
    "ScoreState",
    "WindowUsage",
    "contiguous_splits",
    "deal",
    "frechet_distance",
    "frechet_distance_of_features",
    "frechet_terms",
    "gaussian_mmd",
    "gradient_health",
    "inception_score",
    "jackknife",
    "kernel_distance",
    "polynomial_mmd",
    "precision_recall",
    "psnr",
    "psnr_of",
    "read_statistics",
    "shuffled",
    "squared_error",
    "ssim",
    "write_statistics",
]
