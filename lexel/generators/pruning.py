"""A generator over fewer codes: rows of embeddings and heads that belong to dropped codes are cut."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators.config import network_config
from lexel.runtime import without_weights

if TYPE_CHECKING:
    from lexel.generators.base import Generator


def pruned(generator: "Generator", kept: Tensor) -> "Generator":
    """The same generator over some of its codes: logits of those that stay are what they were.

    Every tensor that a network of the new size has shorter is cut along that axis: code after code, whatever follows
    them (the mask's row) stays; where an axis holds the codes of several books, each book is cut.

    Args:
        generator: of any family whose tensors follow the numbers of codes.
        kept: int64 (n,), ascending: code i of the result is code kept[i].

    Raises:
        UsageError: the family's weights do not follow its codes one by one.
    """
    config, codes = generator.config, generator.config.transformer.codebook_size
    kind = config.transformer.kind
    try:
        network = network_config(
            {**config.transformer.model_dump(mode="json"), "kind": kind, "codebook_size": len(kept)}
        )
        smaller = config.model_copy(update={"transformer": network, "tokenizer": None})
        with without_weights():
            wanted = type(generator)(smaller).state_dict()
    except UsageError as error:
        raise UsageError(f"this {kind} generator cannot be pruned to {len(kept):,} codes: {error}") from None
    state = generator.state_dict()
    if wanted.keys() != state.keys():
        raise _unlike(kind)
    cut = {name: cut_to(tensor, tuple(wanted[name].shape), codes, kept, kind) for name, tensor in state.items()}
    result = type(generator).with_weights(smaller, cut, "the pruned generator")
    result.provenance = dict(generator.provenance)
    return result


def cut_to(tensor: Tensor, shape: tuple[int, ...], codes: int, kept: Tensor, kind: str) -> Tensor:
    """A tensor with the rows of dropped codes left out, of the shape that a smaller network has.

    Raises:
        UsageError: the shapes do not differ by whole codes.
    """
    kept = kept.to(tensor.device)
    if tensor.dim() != len(shape):
        raise _unlike(kind)
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old == new:
            continue
        if old - new == codes - len(kept) and old >= codes:
            rows = torch.cat([kept, torch.arange(codes, old, device=kept.device)])
        elif old % codes == 0 and new == old // codes * len(kept):
            rows = (codes * torch.arange(old // codes, device=kept.device)[:, None] + kept).flatten()
        else:
            raise _unlike(kind)
        tensor = tensor.index_select(axis, rows)
    return tensor.detach().clone()


def _unlike(kind: str) -> UsageError:
    return UsageError(
        f"this {kind} generator cannot be pruned: its weights do not follow the codes one by one (a factorised head "
        "has rows for parts of a code); prune the tokenizer and train a generator on the new tokens"
    )
