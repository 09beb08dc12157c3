"""Training recipes of generators: the typed sections of their TOML file."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lexel.config import Config
from lexel.data.config import DataConfig
from lexel.generators import Generator, GeneratorConfig, NetworkOptions, family_of
from lexel.train.evaluations import SampleEvaluationConfig
from lexel.train.recipes import Beta, LoopConfig, buildable, refuse_unused


class TokensConfig(Config):
    """Data of a generator: a token set, or images that a tokenizer turns into tokens on the way."""

    REPLACES: ClassVar[dict[str, str]] = {"tokens": "images", "images": "tokens"}

    tokens: str | None = None  # a folder that `lexel encode` wrote
    validation: str | Annotated[float, Field(gt=0, lt=1)] = 0.05  # another such folder, or the share to hold out
    images: DataConfig | None = None  # instead of tokens: a fresh random crop of each image in every epoch
    tokenizer: str | None = None  # a run, a folder or a hub id; needed for images, and kept beside the generator
    # Of images, for a text condition: a file with the features of their captions (.npy or .npz), or a text encoder of
    # transformers (a folder or hub id) that makes them of the captions that the source has. Token sets keep theirs.
    captions: str | None = None
    text_encoder: str | None = None
    caption_length: Annotated[int, Field(ge=1)] = 77  # with text_encoder: tokens of a caption at most

    @model_validator(mode="after")
    def _one_source(self) -> "TokensConfig":
        if (self.tokens is None) == (self.images is None):
            raise ValueError("give either tokens (a token set) or images (a section like a tokenizer's data)")
        if self.images is not None and self.tokenizer is None:
            raise ValueError("images need the tokenizer that turns them into tokens")
        refuse_unused(self, ("validation",), self.tokens is not None, "tokens (for images set images.validation)")
        refuse_unused(self, ("captions", "text_encoder"), self.images is not None, "images (a token set keeps its own)")
        refuse_unused(self, ("caption_length",), self.text_encoder is not None, "text_encoder")
        if self.captions and self.text_encoder:
            raise ValueError("give features of captions by captions, or a text_encoder that makes them")
        return self


class GeneratorTrainConfig(LoopConfig):
    """Training options of a generator."""

    betas: list[Beta] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.05, ge=0)
    weight_decay_end: float | None = Field(default=None, ge=0)  # reached on a cosine; None is the same throughout
    decay_norms: bool = True  # decay norms and biases too, as the published code does
    clip: float | None = Field(default=1.0, gt=0)  # the largest norm of the gradient
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False  # spread weights, gradients and optimizer over the processes
    # With fsdp: every process writes what it holds, while training goes on; read on any number of processes.
    sharded_checkpoints: bool = False
    # Of an exponential average of the weights, which is then what is measured and exported (MAR, DiT, SiT: 0.9999).
    average_decay: float | None = Field(default=None, ge=0, lt=1)
    average_warm_up: bool = False  # lowers the decay to (1 + n) / (10 + n) at the n-th step
    evaluations: list[SampleEvaluationConfig] = []  # protocols to measure samples by, every so many steps

    @model_validator(mode="after")
    def _sharded(self) -> "GeneratorTrainConfig":
        if self.average_warm_up and self.average_decay is None:
            raise ValueError("average_warm_up has no effect without average_decay; set it, or leave this out")
        if self.fsdp and self.average_decay is not None:
            raise ValueError("fsdp keeps no average of the weights; leave average_decay out, or set fsdp to false")
        if self.fsdp and self.precision == "fp16":
            raise ValueError("fsdp has no loss scaling; use precision bf16 or float32")
        if self.fsdp and self.evaluations:
            raise ValueError(
                "fsdp spreads the weights, evaluations sample with all of them; evaluate its checkpoints instead"
            )
        for evaluation in self.evaluations:
            evaluation.check()
        if self.sharded_checkpoints and not self.fsdp:
            raise ValueError("sharded_checkpoints goes with fsdp = true: without it every process holds everything")
        return self

    def decay(self, step: int, steps: int) -> float:
        """The weight decay at a step."""
        if self.weight_decay_end is None:
            return self.weight_decay
        fall = 0.5 + 0.5 * math.cos(math.pi * step / max(steps - 1, 1))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * fall


class GeneratorInitConfig(Config):
    """The generator a training starts from."""

    source: str  # a run, a generator folder, a published checkpoint or a hub id, of the same network
    what: Literal["all"] = "all"


class GeneratorRecipe(Config):
    """All that decides a generator: the network, the tokens, the training."""

    generator: NetworkOptions
    data: TokensConfig
    train: GeneratorTrainConfig
    init: GeneratorInitConfig | None = None

    @model_validator(mode="after")
    def _buildable(self) -> "GeneratorRecipe":
        buildable(self.network)
        given = self.data.captions or self.data.text_encoder
        kind = (self.generator.condition or {"kind": "class"}).get("kind")
        if given and kind in ("class", "none", "words"):
            raise ValueError(
                f"data.captions and data.text_encoder have no effect with condition {kind!r}; set generator.condition "
                'to { kind = "text", features = ..., length = ... }, or leave them out'
            )
        if self.data.images is not None and kind == "text" and not given:
            raise ValueError("a text condition over images needs data.captions or data.text_encoder")
        if self.train.evaluations and self.data.tokenizer is None:
            raise ValueError("train.evaluations need data.tokenizer, which makes images of the tokens sampled")
        for evaluation in self.train.evaluations:
            family_of(self.generator).check_settings(evaluation.sampling)
        return self

    def network(self) -> Generator:
        """The generator, with new weights."""
        return Generator(GeneratorConfig(transformer=self.generator))
