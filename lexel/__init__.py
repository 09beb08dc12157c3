"""Lexel: image tokenizers, their quantizers, and generators over their tokens."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lexel.errors import UsageError
    from lexel.generators import Generator
    from lexel.loading import load
    from lexel.tokenizer import Tokenizer

# Names are imported when first used: `lexel --help` must not wait for torch.
_HOMES = {
    "Tokenizer": "lexel.tokenizer",
    "Generator": "lexel.generators",
    "load": "lexel.loading",
    "UsageError": "lexel.errors",
}

__all__ = ["Generator", "Tokenizer", "UsageError", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lexel' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
