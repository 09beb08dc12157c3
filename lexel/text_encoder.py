"""Text encoders: captions to features of their tokens, by an encoder of the transformers library."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexel import checkpoint
from lexel.data.captions import CaptionFile, Captions
from lexel.data.images import ImageSet, digest
from lexel.errors import UsageError, optional
from lexel.provenance import public_name
from lexel.runtime import Runtime

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # of a repository; no pickles, no code
LENGTH = 77  # rows of a caption, CLIP's


class TextEncoder:
    """The text model of CLIP, the encoder of T5 and its kin, BERT, ...: captions to rows of features.

    Args:
        source: a folder in the layout of transformers (config, tokenizer, safetensors), or a hub id.
        length: rows; longer captions are cut, with one warning, and where an encoder has fewer positions, at those.
        where: device and precision.
        batch_size: captions at a time.

    Raises:
        UsageError: transformers is not installed, or the source holds no text encoder.
    """

    def __init__(
        self, source: str | Path, length: int = LENGTH, where: Runtime | None = None, batch_size: int = 32
    ) -> None:
        if length < 1 or batch_size < 1:
            raise UsageError(f"a text encoder needs length and batch_size >= 1, got {length} and {batch_size}")
        transformers = _transformers()
        folder = checkpoint.find_folder(source, FILES)
        self.name, self.batch_size = public_name(source), batch_size
        self.where = where or Runtime(torch.device("cpu"), None)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._words: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
            model: Any = transformers.AutoModelForTextEncoding.from_pretrained(folder, use_safetensors=True, **local)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{source} is no text encoder of transformers: {checkpoint.reason(error)}") from None
        self._model = model.to(self.where.device, torch.float32).eval()
        self._cut = False  # whether it has been said that captions are cut
        self.length = min(length, getattr(model.config, "max_position_embeddings", length))
        self.channels = int(model.config.hidden_size)
        if self._words.pad_token is None:
            raise UsageError(f"the tokenizer of {source} has no padding token")

    def fingerprint(self) -> str:
        """Names these weights."""
        return checkpoint.fingerprint({"length": self.length}, self._model.state_dict())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Features of texts: float32 (n, length, channels), rows of zeros behind the end of each."""
        found = np.zeros((len(texts), self.length, self.channels), np.float32)
        for first in range(0, len(texts), self.batch_size):
            part = list(texts[first : first + self.batch_size])
            cut = [text for text in part if len(self._words(text)["input_ids"]) > self.length]
            if cut and not self._cut:
                self._cut = True
                warnings.warn(f"captions are cut at {self.length} tokens, the first {cut[0][:60]!r}", stacklevel=2)
            words = self._words(
                part, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            ).to(self.where.device)
            with self.where.autocast():
                rows = self._model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
            features = rows.last_hidden_state.float() * words["attention_mask"][..., None]
            found[first : first + len(part)] = features.cpu().numpy()
        return found


class TextVocabulary:
    """The vocabulary of a text tokenizer: captions to ids, before an image's in sequences for language models.

    Args:
        source: a folder in the layout of transformers with a tokenizer, or a hub id.

    Raises:
        UsageError: transformers is not installed, or the source holds no tokenizer.
    """

    def __init__(self, source: str | Path) -> None:
        folder = checkpoint.find_folder(source, FILES[:-1])
        try:
            self._words: Any = _transformers().AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{source} holds no tokenizer of transformers: {checkpoint.reason(error)}") from None

    def __len__(self) -> int:
        return len(self._words)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, without those that begin and end it."""
        return list(self._words(text, add_special_tokens=False)["input_ids"])


def _transformers() -> Any:
    return optional("transformers", "text encoders need transformers: pip install 'lexel[text]'")


class EncodedCaptions:
    """Features of texts, made as they are asked for: the captions of a set of images through an encoder.

    Args:
        encoder: as `TextEncoder`.
        texts: one for each image.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        self.encoder, self.texts = encoder, texts
        self.length, self.channels = encoder.length, encoder.channels

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """A SHA-256 of the encoder and the texts."""
        return digest([self.encoder.fingerprint(), list(self.texts)])

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """The features of some captions: float32 (n, length, channels)."""
        return self.encoder.encode([self.texts[number] for number in numbers])


def caption_features(captions: str | Path | TextEncoder | None, images: ImageSet, source: str) -> Captions | None:
    """The features of a caption for each image: of a file (see `CaptionFile`), or made by an encoder; None for None.

    Raises:
        UsageError: a file does not fit, or there are no captions to encode.
    """
    if captions is None:
        return None
    if not isinstance(captions, TextEncoder):
        return CaptionFile(captions).of_images(images.names)
    if images.captions is None:
        raise UsageError(f"the images of {source} have no captions; tar:, parquet:, datasets:, list: and npz: have")
    return EncodedCaptions(captions, images.captions)
