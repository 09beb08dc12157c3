"""Masked autoregression over latents with a diffusion head (MAR)."""

from lexel.generators.continuous.generator import Continuous, ContinuousConfig

__all__ = ["Continuous", "ContinuousConfig"]
