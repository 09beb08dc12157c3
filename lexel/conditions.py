"""Conditions: what an image is generated from - nothing, a class, or the features of a caption.

A condition is a module of its own: it checks what a caller gives, embeds it, and knows what classifier-free guidance
(https://arxiv.org/abs/2207.12598) needs, the null condition to which it is dropped in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel import registry
from lexel.errors import UsageError


class Condition(nn.Module):
    """The condition of an image: embedded as rows before the tokens, (B, length, width).

    A condition travels as one tensor with an image a row (`check` makes it), so that every loop can cut it into
    batches without knowing its kind.

    Args:
        width: channels of the network.
    """

    name: ClassVar[str]  # of the module inside a network, and so in the names of its tensors
    kind: ClassVar[str]  # its name in CONDITIONS
    rotated = False  # whether its rows keep their queries and keys under rotary positions
    length = 1  # rows before the tokens
    dropout = 0.0  # the share that training drops to the null condition
    guided: bool = True  # whether there is a null condition to guide by

    def check(self, given: Any) -> Tensor:
        """The condition given by a caller, as a tensor (B, ...).

        Raises:
            UsageError: it is not what the condition takes.
        """
        raise NotImplementedError

    def of_batch(self, batch: Any) -> Tensor:
        """The condition of a training batch (a `TokenBatch`), unchecked, where the batch is."""
        raise NotImplementedError

    def example(self, count: int) -> Tensor:
        """A condition of so many images, for estimates and for batches that hold nothing."""
        return torch.zeros(count, dtype=torch.long)

    def shown(self, count: int) -> Any:
        """Conditions for a report's samples, as `check` takes them."""
        return self.example(count)

    def null(self, like: Tensor) -> Tensor:
        """The null condition for each row of a checked condition."""
        raise NotImplementedError

    def forward(self, prepared: Tensor) -> Tensor:
        """Rows (B, length, width) of a checked condition (B, ...)."""
        raise NotImplementedError

    def pooled(self, rows: Tensor) -> Tensor:
        """One vector an image, (B, 1, width), of `forward`'s rows: what modulates norms."""
        return rows if self.length == 1 else rows.mean(1, keepdim=True)

    def drop(self, prepared: Tensor) -> Tensor:
        """In training, replaces each image's condition by the null condition with probability `dropout`."""
        if not self.training or self.dropout == 0:
            return prepared
        dropped = torch.rand(prepared.shape[:1], device=prepared.device) < self.dropout
        return torch.where(dropped.view(-1, *[1] * (prepared.dim() - 1)), self.null(prepared), prepared)


class ClassLabels(Condition, nn.Embedding):
    """A class of an image, by number. Conditions are int64 (B,); number `classes` is the null class.

    Args:
        width: channels of the network.
        classes: how many, the null class not counted.
        dropout: the share of labels that training replaces by the null class.
        null_class: whether there is a null class; without one nothing is dropped and guidance is refused.
    """

    name = "classes"
    kind = "class"

    def __init__(self, width: int, classes: int = 1000, dropout: float = 0.1, null_class: bool = True) -> None:
        if classes < 1 or not 0 <= dropout <= 1:
            raise UsageError(f"a class condition needs classes >= 1 and dropout in [0, 1], got {classes} and {dropout}")
        nn.Embedding.__init__(self, classes + null_class, width)
        self.classes, self.dropout, self.guided = classes, dropout if null_class else 0.0, null_class

    def check(self, given: Any) -> Tensor:
        labels = torch.as_tensor(given, dtype=torch.long if isinstance(given, Sequence) and not given else None)
        if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise UsageError(f"class_labels must be integers (B,), got {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.num_embeddings):
            null = f"[0, {self.classes}] ({self.classes} is the null class)" if self.guided else f"[0, {self.classes})"
            raise UsageError(f"class_labels must be in {null}, got {int(labels.min())} to {int(labels.max())}")
        return labels.to(self.weight.device, torch.long)

    def shown(self, count: int) -> Tensor:
        return torch.arange(count) % self.classes

    def of_batch(self, batch: Any) -> Tensor:
        """Labels; without them all images are of class 0."""
        return self.example(len(batch.indices)) if batch.labels is None else batch.labels

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.classes)

    def forward(self, prepared: Tensor) -> Tensor:
        return F.embedding(prepared, self.weight)[:, None]


class Unconditional(Condition):
    """No condition: one learned start vector. Callers give how many images they want; it travels as zeros, int64 (B,).

    Args:
        width: channels of the network.
    """

    name = "start"
    kind = "none"
    guided = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width).mul_(0.02))

    def check(self, given: Any) -> Tensor:
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise UsageError(f"an unconditional generator takes how many images to make, got {_described(given)}")
        return torch.zeros(given, dtype=torch.long, device=self.weight.device)

    def shown(self, count: int) -> int:
        return count

    def of_batch(self, batch: Any) -> Tensor:
        return self.example(len(batch.indices))

    def null(self, like: Tensor) -> Tensor:
        return like

    def forward(self, prepared: Tensor) -> Tensor:
        return self.weight.expand(len(prepared), 1, -1)


class CaptionWords(Condition, nn.Embedding):
    """A caption as numbers of its words in a vocabulary, with learned vectors: int64 (B, length).

    Captions are padded to `length` by the text tokenizer that made the numbers. There is no null condition.

    Args:
        width: channels of the network.
        vocabulary: how many words there are.
        length: words of a caption.
    """

    name = "words"
    kind = "words"
    rotated = True
    guided = False

    def __init__(self, width: int, vocabulary: int, length: int) -> None:
        if vocabulary < 1 or length < 1:
            raise UsageError(f"a condition of words needs vocabulary >= 1 and length >= 1, got {vocabulary}, {length}")
        nn.Embedding.__init__(self, vocabulary, width)
        self.vocabulary, self.length = vocabulary, length

    def check(self, given: Any) -> Tensor:
        words = torch.as_tensor(given)
        if words.dim() != 2 or words.shape[1] != self.length or words.dtype.is_floating_point:
            raise UsageError(f"words of captions must be integers (B, {self.length}), got {_described(given)}")
        if words.numel() and (int(words.min()) < 0 or int(words.max()) >= self.vocabulary):
            raise UsageError(f"words must be in [0, {self.vocabulary}), got {int(words.min())} to {int(words.max())}")
        return words.to(self.weight.device, torch.long)

    def of_batch(self, batch: Any) -> Tensor:
        words: Tensor | None = getattr(batch, "captions", None)
        if words is None:
            raise UsageError("a condition of words needs captions beside the tokens, and there are none")
        return words

    def example(self, count: int) -> Tensor:
        return torch.zeros(count, self.length, dtype=torch.long)

    def null(self, like: Tensor) -> Tensor:
        return like

    def forward(self, prepared: Tensor) -> Tensor:
        return F.embedding(prepared, self.weight)


class CaptionFeatures(Condition):
    """A caption, as features of its tokens from a text encoder, projected by a small network.

    Conditions are float (B, length, features). Rows of zeros are padding (no encoder gives such), which one learned
    vector a row stands for; the null condition is nothing but padding.

    Args:
        width: channels of the network.
        features: channels of the text encoder.
        length: rows; shorter captions are padded, longer ones refused.
        dropout: the share of captions that training replaces by the null condition.
    """

    name = "captions"
    kind = "text"
    rotated = True

    def __init__(self, width: int, features: int, length: int = 77, dropout: float = 0.1) -> None:
        super().__init__()
        if features < 1 or length < 1 or not 0 <= dropout <= 1:
            raise UsageError(
                "a text condition needs features >= 1, length >= 1 and dropout in [0, 1], "
                f"got {features}, {length} and {dropout}"
            )
        self.features, self.length, self.dropout = features, length, dropout
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, width)
        self.padding = nn.Parameter(torch.randn(length, width).mul_(0.02))

    def check(self, given: Any) -> Tensor:
        """Features (B, length', features), or a list of (length_i, features), each at most `length` long."""
        captions = list(given) if isinstance(given, Tensor | Sequence) and not isinstance(given, str) else None
        if captions is None or not all(isinstance(caption, Tensor) for caption in captions):
            raise UsageError(f"a text condition takes features (B, length, {self.features}), got {_described(given)}")
        prepared = torch.zeros(len(captions), self.length, self.features, device=self.padding.device)
        for row, caption in enumerate(captions):
            if caption.dim() != 2 or caption.shape[1] != self.features or not caption.dtype.is_floating_point:
                raise UsageError(
                    f"features of a caption must be float (length, {self.features}), "
                    f"got {caption.dtype} {tuple(caption.shape)}"
                )
            if len(caption) > self.length and bool(caption[self.length :].any()):
                raise UsageError(f"a caption has {len(caption)} rows; the generator takes {self.length}")
            caption = caption[: self.length]
            prepared[row, : len(caption)] = caption.to(prepared)
        if not bool(prepared.isfinite().all()):
            raise UsageError("features of captions must be finite")
        return prepared

    def of_batch(self, batch: Any) -> Tensor:
        features: Tensor | None = getattr(batch, "captions", None)
        if features is None:
            raise UsageError("a text condition needs features of captions beside the tokens, and there are none")
        length, channels = features.shape[1:]
        if channels != self.features or length > self.length:
            raise UsageError(
                f"the captions beside the tokens have {length} rows of {channels} features, the condition takes "
                f"{self.length} of {self.features}; set generator.condition.length and .features to theirs"
            )
        return F.pad(features, (0, 0, 0, self.length - length))

    def example(self, count: int) -> Tensor:
        return torch.zeros(count, self.length, self.features)

    def null(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def forward(self, prepared: Tensor) -> Tensor:
        prepared = prepared.to(self.padding.dtype)
        rows: Tensor = self.fc2(F.gelu(self.fc1(prepared), approximate="tanh"))
        return torch.where((prepared != 0).any(-1, keepdim=True), rows, self.padding)


CONDITIONS: dict[str, type[Condition]] = {
    "none": Unconditional,
    "class": ClassLabels,
    "text": CaptionFeatures,
    "words": CaptionWords,
}


def build_condition(width: int, table: Mapping[str, Any]) -> Condition:
    """The condition that a recipe's table describes: its `kind` and the options of that.

    Raises:
        UsageError: the kind or an option is unknown, missing or wrong.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError(f"condition needs a kind: {', '.join(registry.names(CONDITIONS, 'lexel.conditions'))}")
    constructor = registry.lookup(CONDITIONS, kind, "condition", "lexel.conditions")
    if "width" in options:
        raise UsageError("condition has no option 'width'; it is the network's")
    return registry.build(constructor, kind, {"width": width, **options}, "condition")


def _described(given: Any) -> str:
    shape = getattr(given, "shape", None)
    return repr(given)[:60] if shape is None else f"{type(given).__name__} {tuple(shape)}"
