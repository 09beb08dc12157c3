"""Next-token generators: an autoregressive transformer in raster order, and how it is decoded fast."""

from lexel.generators.next_token.config import NextTokenConfig
from lexel.generators.next_token.generator import NextToken, NextTokenOptions

__all__ = ["NextToken", "NextTokenConfig", "NextTokenOptions"]
