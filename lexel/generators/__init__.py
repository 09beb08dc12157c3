"""Generators: models of the tokens of images, from which new images are sampled.

`GENERATORS` has the families by name, a recipe's `generator.kind`.
"""

from lexel.generators.base import FREE, Generator, Predicted, TrainingLosses
from lexel.generators.batch import SampleBatch
from lexel.generators.config import GENERATORS, GeneratorConfig, NetworkConfig, NetworkOptions, family_of, read_config
from lexel.generators.continuous import Continuous
from lexel.generators.flow import Flow
from lexel.generators.masked import Masked, MaskedConfig
from lexel.generators.next_scale import NextScale
from lexel.generators.next_token import Draft, NextToken, NextTokenConfig
from lexel.generators.random_order import RandomOrder, RandomOrderConfig
from lexel.generators.residual import ResidualGenerator

GENERATORS["next_token"] = NextToken
GENERATORS["masked"] = Masked
GENERATORS["random_order"] = RandomOrder
GENERATORS["next_scale"] = NextScale
GENERATORS["residual"] = ResidualGenerator
GENERATORS["continuous"] = Continuous
GENERATORS["flow"] = Flow

__all__ = [
    "FREE",
    "GENERATORS",
    "Draft",
    "Generator",
    "GeneratorConfig",
    "Masked",
    "MaskedConfig",
    "NetworkConfig",
    "NetworkOptions",
    "NextToken",
    "NextTokenConfig",
    "Predicted",
    "RandomOrder",
    "RandomOrderConfig",
    "SampleBatch",
    "TrainingLosses",
    "family_of",
    "read_config",
]
