"""Usage of a codebook over any number of pictures in one pass, and estimates of what is unseen."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lexel.data import Transform
from lexel.data.tokens import INDEX, TokenSet
from lexel.data.unreadable import check_unreadable, counted
from lexel.distributed import join
from lexel.errors import UsageError
from lexel.evaluate import Options
from lexel.evaluate.measure import measure
from lexel.evaluate.metric import Batch, Context, SamplePlan
from lexel.evaluate.metrics.unseen import UnseenCodes
from lexel.evaluate.sources import Pictures, open_set, resized
from lexel.evaluate.stream import discard_partial
from lexel.loading import own_transform
from lexel.memory import check_memory
from lexel.metrics.protocols import protocol
from lexel.metrics.unseen import CodeIncidence, Unseen
from lexel.runtime import exact_float32, runtime
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer

AT_ONCE = 4096  # pictures of a token set


class CodeUsage(NamedTuple):
    """Which codes pictures use, and what they say about the others."""

    counts: CodeIncidence
    fingerprint: str  # of the tokenizer
    unreadable: dict[str, str]  # pictures that could not be used, with the reason

    @property
    def unseen(self) -> Unseen:
        """Estimates about the codes that were not seen."""
        return self.counts.unseen()

    @property
    def kept(self) -> Tensor:
        """The codes that occur, in any of the books: int64, ascending."""
        return self.counts.used.nonzero().flatten()

    def rows(self) -> list[tuple[str, str]]:
        """For people: names and what they mean here."""
        unseen = self.unseen
        if not unseen.pictures:
            return [("pictures", "0")]
        share = f"{100 * unseen.share:.3g} %, {100 * unseen.share_low:.3g} to {100 * unseen.share_high:.3g} %"
        return [
            ("pictures, tokens", f"{unseen.pictures:,}, {unseen.tokens:,}"),
            ("codes used", f"{unseen.seen:,} of {unseen.codes:,} ({100 * unseen.seen / unseen.codes:.2f} %)"),
            ("  in one picture only", f"{unseen.in_one_picture:,}"),
            ("tokens of further pictures that are other codes", f"{share} (95 %)"),
            (
                "as many pictures again would add",
                f"{unseen.more:,.0f} codes, {_span(unseen.more_low, unseen.more_high)}",
            ),
            (
                "codes that such pictures use at all",
                f"{unseen.reachable:,.0f} or more, {_span(unseen.reachable_low, unseen.reachable_high)}",
            ),
            ("a code not seen occurs in fewer pictures than", f"{100 * unseen.rarity:.3g} % (95 %)"),
        ]

    def table(self) -> dict[str, Any]:
        """As plain data, for a file."""
        unseen = self.unseen
        table = {"tokenizer": self.fingerprint, "usage": unseen.seen / unseen.codes, **unseen._asdict()}
        return table | {"unreadable": counted(self.unreadable)}


def _span(low: float, high: float) -> str:
    return f"{low:,.0f} to {high:,.0f} (95 %)"


def usage(
    source: str | Path | TokenSet,
    tokenizer: Tokenizer | None = None,
    *,
    size: int | None = None,
    transform: str | None = None,
    split: str | None = None,
    options: Options | None = None,
) -> CodeUsage:
    """Counts the codes of a token set, or of pictures through a tokenizer.

    Pictures are read one batch after the other and never held; with `options.resume` the same call goes on where it was
    stopped, and under torch.distributed processes share the pictures.

    Args:
        source: a token set or its folder, or pictures.
        tokenizer: for pictures; with a token set it must be the one that made it.
        size, transform: of the squares cut from pictures; by default as the tokenizer was trained.
        split: of pictures, if they have any.
        options: batch size, device, limit, resume and so on.

    Raises:
        UsageError: pictures came without a tokenizer, tokens of another one, or nothing can be read.
    """
    options = options or Options()
    if isinstance(source, TokenSet) or (Path(source) / INDEX).is_file():
        tokens = source if isinstance(source, TokenSet) else TokenSet.open(source)
        if tokenizer is not None:
            tokens.require(tokenizer.fingerprint())
        return usage_of_tokens(tokens, options)
    if tokenizer is None:
        raise UsageError(f"{source} holds no tokens; pictures need a tokenizer: --model MODEL")
    return usage_of_pictures(source, tokenizer, own_transform(tokenizer, size, transform), split, options)


def usage_of_tokens(tokens: TokenSet, options: Options) -> CodeUsage:
    """Counts the codes of a token set; all versions of a picture count as one picture.

    Raises:
        UsageError: it holds no picture, or lacks more than `max_unreadable` of those that were encoded.
    """
    counts = CodeIncidence(tokens.codebook_size, tokens.books)
    numbers = evenly_spaced(len(tokens), options.limit)
    if not numbers:
        raise UsageError(f"{tokens.folder} holds no tokens")
    check_unreadable(tokens.unreadable, len(tokens) + len(tokens.unreadable), options.max_unreadable)
    done = 0
    for chosen in tokens.alike(tokens.by_grid(numbers), AT_ONCE):
        versions = [tokens.tokens(chosen, crop) for crop in range(tokens.crops)]
        # Versions side by side, after the books: (B, books, crops, ...).
        counts.add(torch.stack(versions, 1 if tokens.books is None else 2), torch.from_numpy(chosen))
        done += len(chosen)
        if options.progress is not None:
            options.progress(done, len(numbers))
    return CodeUsage(counts, tokens.fingerprint, dict(tokens.unreadable))


def usage_of_pictures(
    source: str | Path, tokenizer: Tokenizer, transform: Transform, split: str | None, options: Options
) -> CodeUsage:
    """Counts the codes of pictures; see `usage`."""
    if tokenizer.continuous:
        raise UsageError("a continuous tokenizer has no codes to count")
    where = runtime(join(options.device), options.precision)
    rules = resized(protocol("lexel"), transform.size)
    check_memory(tokenizer, where, transform.size, transform.size, options.batch_size)
    images = open_set(source, split, transform.size, tokenizer.channels, options.pixel_limit, options.max_unreadable)
    pictures = Pictures(images, rules, transform, options.workers, evenly_spaced(len(images), options.limit))
    tokenizer = tokenizer.to(where.device).eval()
    spec = tokenizer.token_spec(transform.size, transform.size)
    context = Context(
        rules,
        SamplePlan.of(len(pictures), rules),
        pictures.size,
        where.device,
        codebook_size=spec.codebook_size,
        books=spec.books,
    )
    metric = UnseenCodes(context)

    def encoded(images: Tensor, numbers: Tensor) -> Batch:
        with where.autocast():
            return Batch(rules, numbers, images, indices=tokenizer.encode(images.to(where.device)))

    fingerprint = tokenizer.fingerprint()
    identity = {
        "kind": "usage",
        "tokenizer": fingerprint,
        "transform": [type(transform).__name__, transform.size],
        "source": pictures.listing(),
        "precision": options.precision,
    }
    with exact_float32(where.device.type):
        visited = measure(pictures, {"unseen_codes": metric}, encoded, options, identity, least=1)
    discard_partial(options.resume)
    return CodeUsage(metric.states["codes"], fingerprint, dict(visited.unreadable))
