"""Models that are saved to folders and read from them, each as `config.json` and `model.safetensors`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lexel import __version__, checkpoint
from lexel.errors import UsageError
from lexel.provenance import of_folder as provenance_of_folder
from lexel.runtime import without_weights

GENERATOR = "generator"  # `model` in the `config.json` of a generator
TOKENIZER = "tokenizer"  # and of a tokenizer; the folder inside a generator's that holds the tokenizer it belongs to
FILES = (checkpoint.CONFIG, checkpoint.WEIGHTS)
FILES_OF_GENERATORS = (*FILES, f"{TOKENIZER}/*")  # patterns
BESIDE = ("model", "lexel", "provenance")  # what `config.json` says beside a model's options


class Pretrained(nn.Module):
    """A model with a folder: what tokenizers and generators have in common.

    Args:
        config: its options.
    """

    KIND: ClassVar[str]  # GENERATOR or TOKENIZER
    FILES: ClassVar[tuple[str, ...]] = FILES  # patterns; of a hub repository
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = {}  # where the weights come from, as `save_pretrained` was told

    def save_folder(self, folder: str | Path, provenance: Mapping[str, Any] | None) -> None:
        """Writes `config.json` and `model.safetensors`, with the model's own provenance if none is given."""
        given = self.provenance if provenance is None else provenance
        options = self.config.model_dump(mode="json")
        config = {"model": self.KIND, "lexel": __version__, **options, "provenance": dict(given)}
        checkpoint.save_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """A model in evaluation mode, from a folder or a hub id; `provenance` says where it comes from.

        Raises:
            UsageError: the folder is not there, not whole, or holds something else.
        """
        folder = checkpoint.find_folder(source, cls.FILES)
        return cls.from_folder(folder, *checkpoint.load_folder(folder))

    @classmethod
    def from_folder(cls, source: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """A model from the two parts of its folder, which is `source`."""
        if config.get("model") != cls.KIND:
            raise UsageError(f"{source} holds a {config.get('model', 'model of another library')}, not a {cls.KIND}")
        options = {name: value for name, value in config.items() if name not in BESIDE}
        model = cls.with_weights(cls.read_config(options, f"{source}/config.json"), tensors, source)
        model.provenance = provenance_of_folder(config, f"{source}/config.json")
        return model

    @classmethod
    def read_config(cls, options: Mapping[str, Any], source: str) -> Any:
        """The options of a folder that any version of Lexel wrote, checked; `source` names them in errors."""
        raise NotImplementedError

    @classmethod
    def with_weights(cls, config: Any, tensors: Mapping[str, Tensor], source: str | Path) -> Self:
        """A model in evaluation mode that takes over `tensors`, so that nothing is held twice."""
        with without_weights():
            model = cls(config)
        checkpoint.load_strict(model, tensors, source)
        model.compute_buffers()
        return model.eval()

    def compute_buffers(self) -> None:
        """Makes tables that are computed, never saved, where the model was made without weights; by default none."""

    def fingerprint(self) -> str:
        """Names these weights in token sets and result files: the same for equal weights, whatever their history."""
        return checkpoint.fingerprint(self.config.model_dump(mode="json"), self.state_dict())
