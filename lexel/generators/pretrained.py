"""Folders of generators: the network's weights, and in `tokenizer/` the tokenizer of its tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators.config import GeneratorConfig, read_config
from lexel.model_folder import FILES_OF_GENERATORS, GENERATOR, TOKENIZER, Pretrained
from lexel.quantizers import Quantizer
from lexel.regular import expanded
from lexel.tokenizer import Tokenizer


class WithTokenizer(Pretrained):
    """A generator that is saved to folders and read from them, with the tokenizer it belongs to.

    Args:
        config: network, tokenizer, class names.
    """

    KIND = GENERATOR
    FILES = FILES_OF_GENERATORS
    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self._tokenizer: list[Tokenizer] = []  # in a list, so that its weights are not this module's
        self._folder: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return next(self.parameters()).dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose tokens these are.

        Raises:
            UsageError: the generator has none, or the one in its folder is not the one it was trained with.
        """
        if not self._tokenizer:
            if self._folder is None or not self.has_tokenizer():
                raise UsageError(
                    "this generator has no tokenizer beside it; decode with the tokenizer of fingerprint "
                    f"{self.config.tokenizer or '(not recorded)'}"
                )
            found = Tokenizer.from_pretrained(self._folder / TOKENIZER)
            self.check_tokenizer(found.fingerprint(), f"the tokenizer in {self._folder}")
            self._tokenizer.append(found)
        return self._tokenizer[0]

    def find_tokenizer_in(self, folder: Path) -> None:
        """Takes the tokenizer in a folder where the generator's is needed."""
        self._folder = folder

    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer with the generator, or in its folder."""
        return bool(self._tokenizer) or (self._folder is not None and (self._folder / TOKENIZER).is_dir())

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Makes `tokenizer` the generator's own.

        Raises:
            UsageError: the generator was trained with another one.
        """
        self.check_tokenizer(tokenizer.fingerprint(), "the tokenizer")
        self._tokenizer = [tokenizer]

    def attach(self, tokenizer: Tokenizer) -> None:
        """Makes `tokenizer` the one whose tokens these are, and records its fingerprint."""
        self.config = self.config.model_copy(update={"tokenizer": tokenizer.fingerprint()})
        self._tokenizer = [tokenizer]

    def quantizer(self) -> Quantizer:
        """The tokenizer's quantizer, on the device of the generator.

        Raises:
            UsageError: there is no tokenizer.
        """
        tokenizer = self.tokenizer
        if next(tokenizer.parameters()).device != self.device:
            tokenizer.to(self.device)
        return tokenizer.quantizer

    def check_tokenizer(self, fingerprint: str, what: str) -> None:
        """Refuses tokens of another tokenizer; `what` names where they come from."""
        expected = self.config.tokenizer
        if expected is not None and fingerprint != expected:
            raise UsageError(
                f"{what} has fingerprint {fingerprint[:12]}, the generator was trained with tokenizer {expected[:12]}; "
                "use the tokenizer it was trained with"
            )

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes `config.json`, `model.safetensors` and, if there is one, the tokenizer in `tokenizer/`.

        Args:
            folder: made if it does not exist.
            tokenizer: the tokenizer whose tokens these are; by default the one that came with the generator.
            provenance: where the weights come from (recipe, step, source file), kept in `config.json`.

        Raises:
            UsageError: it is not the tokenizer of these tokens.
        """
        if tokenizer is not None:
            self.check_tokenizer(tokenizer.fingerprint(), "the tokenizer to save")
        elif self.has_tokenizer():
            tokenizer = self.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(folder) / TOKENIZER, tokenizer.provenance)
        self.save_folder(folder, provenance)

    @classmethod
    def from_folder(cls, source: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        generator = super().from_folder(source, config, tensors)
        generator.find_tokenizer_in(expanded(source))
        return generator

    @classmethod
    def read_config(cls, options: Mapping[str, Any], source: str) -> GeneratorConfig:
        return read_config(options, source)
