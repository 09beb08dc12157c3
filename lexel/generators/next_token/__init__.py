"""Next-token generators: an autoregressive transformer in raster order, and how it is decoded fast."""

from lexel.generators.next_token.config import NextTokenConfig
from lexel.generators.next_token.generator import NextToken, NextTokenOptions
from lexel.generators.next_token.speculative import Draft

__all__ = ["Draft", "NextToken", "NextTokenConfig", "NextTokenOptions"]
