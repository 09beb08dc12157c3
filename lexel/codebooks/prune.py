"""Dropping codes that nothing uses: a compact codebook, the map of indices, tokens and generators that follow it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lexel.checkpoint import atomic_write
from lexel.codebooks.usage import usage
from lexel.data.tokens import TokenSet, remap_tokens
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback
from lexel.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lexel.generators import Generator

CODE_MAP = "code_map.npy"  # int64 (n,): the old number of each code
TOKENS = "tokens"  # the folder beside a pruned model that holds re-mapped token sets


def prune(model: "Tokenizer | Generator", kept: Tensor) -> "Tokenizer | Generator":
    """The same model over the codes `kept` alone; see `prune_tokenizer` and `prune_generator`."""
    return prune_tokenizer(model, kept) if isinstance(model, Tokenizer) else prune_generator(model, kept)


def prune_tokenizer(tokenizer: Tokenizer, kept: Tensor) -> Tokenizer:
    """The same tokenizer over some of its codes: `decode` of re-mapped tokens is equal to the bit.

    `encode` gives the new number of the code it gave before wherever that one stays. Quantizers with several books, and
    tokenizers of several levels, keep the same codes in all of them.

    Args:
        tokenizer: with codes.
        kept: int64 (n,), ascending, without repeats: code i of the result is code kept[i].

    Raises:
        UsageError: its quantizer's codes cannot be dropped, or fewer than two would stay.
    """
    kept = check_kept(kept, tokenizer.codebook_size)
    result = tokenizer.recoded(tokenizer.quantizer.prune(tokenizer.config.quantizer, kept))
    result.provenance = tokenizer.provenance | origin("pruned_from", tokenizer)
    return result


def prune_generator(generator: "Generator", kept: Tensor) -> "Generator":
    """The same generator, and its tokenizer, over some of the codes; heads and embeddings are cut.

    Args:
        generator: with its tokenizer, or without.
        kept: as in `prune_tokenizer`.

    Raises:
        UsageError: its tokenizer's codes cannot be dropped, or its weights do not follow codes one by one.
    """
    kept = check_kept(kept, generator.config.transformer.codebook_size)
    tokenizer = prune_tokenizer(generator.tokenizer, kept)  # first: a generator alone would have no tokens
    result = generator.prune(kept)
    result.attach(tokenizer)
    result.provenance = generator.provenance | origin("pruned_from", generator)
    return result


def write_pruned(
    model: "Tokenizer | Generator",
    kept: Tensor,
    out: str | Path,
    tokens: Sequence[TokenSet] = (),
    progress: ProgressCallback | None = None,
) -> "Tokenizer | Generator":
    """Writes a model over the codes `kept`: an ordinary model folder with `code_map.npy` and re-mapped token sets.

    Args:
        model: any that can be pruned.
        kept: as in `prune_tokenizer`.
        out: the folder. Token sets lie in `tokens/NAME`, by the names of their folders.
        tokens: sets of the model's tokenizer, to be written with the new numbers.
        progress: called with (shards done, shards) of each set.

    Returns:
        The pruned model.

    Raises:
        UsageError: as `prune`; or two token sets have one name, or use a code that is dropped.
    """
    out = Path(out)
    names = [found.folder.resolve().name for found in tokens]
    if len(set(names)) < len(names):
        raise UsageError(f"two token sets are called {max(names, key=names.count)!r}; their copies need two names")
    if out.resolve() in [found.folder.resolve() for found in tokens]:
        raise UsageError(f"{out} holds the tokens; give another folder for the pruned model")
    tokenizer = tokenizer_of(model)
    for found in tokens:
        found.require(tokenizer.fingerprint())
    result = prune(model, kept)
    result.save_pretrained(out, provenance=result.provenance)
    with atomic_write(out / CODE_MAP) as file:
        np.save(file, kept.cpu().numpy())
    smaller = tokenizer_of(result)
    for name, found in zip(names, tokens, strict=True):
        remap_tokens(found, out / TOKENS / name, kept.cpu().numpy(), smaller.fingerprint(), progress)
    return result


def check_kept(kept: Tensor, codebook_size: int) -> Tensor:
    """The codes to keep, checked.

    Raises:
        UsageError: they are no ascending numbers of codes, or fewer than two.
    """
    if kept.dtype != torch.int64 or kept.dim() != 1 or bool((kept.diff() <= 0).any()):
        raise UsageError("the codes to keep must be int64 (n,), ascending and without repeats")
    if len(kept) < 2:
        raise UsageError(f"a codebook has at least 2 codes; {len(kept)} would stay")
    if int(kept[0]) < 0 or int(kept[-1]) >= codebook_size:
        raise UsageError(f"the codes to keep must be in [0, {codebook_size}), got {int(kept[0])} to {int(kept[-1])}")
    return kept.cpu()


def used_codes(
    model: "Tokenizer | Generator", tokens: Sequence[TokenSet], images: str | Path | None = None, **how: Any
) -> Tensor:
    """The codes that token sets or images use: int64, ascending.

    Args:
        model: a tokenizer, or a generator with one.
        tokens: sets of that tokenizer.
        images: pictures, if any.
        how: arguments of `usage`.

    Raises:
        UsageError: there are neither, or a set is of another tokenizer.
    """
    if not tokens and images is None:
        raise UsageError("say which codes are used: give images (DIR), or --tokens DIR")
    tokenizer = tokenizer_of(model)
    sources = [*tokens, *([] if images is None else [images])]
    kept = [usage(source, tokenizer, **how).kept for source in sources]
    return torch.cat(kept).unique()


def tokenizer_of(model: "Tokenizer | Generator") -> Tokenizer:
    """The tokenizer: the model itself, or the one of a generator."""
    return model if isinstance(model, Tokenizer) else model.tokenizer


def codes_of(model: "Tokenizer | Generator") -> int:
    """The number of codes of a model's tokens."""
    return model.codebook_size if isinstance(model, Tokenizer) else model.config.transformer.codebook_size


def origin(how: str, model: "Tokenizer | Generator") -> dict[str, Any]:
    """The provenance of the model that another one was made from."""
    return {how: {"fingerprint": model.fingerprint(), "codebook_size": codes_of(model)}}
