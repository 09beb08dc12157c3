"""Residual codes by position and depth (RQ-Transformer)."""

from lexel.generators.residual.generator import ResidualConfig, ResidualGenerator

__all__ = ["ResidualConfig", "ResidualGenerator"]
