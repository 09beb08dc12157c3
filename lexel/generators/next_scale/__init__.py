"""Tokens scale by scale (VAR)."""

from lexel.generators.next_scale.generator import NextScale, NextScaleConfig

__all__ = ["NextScale", "NextScaleConfig"]
