"""Speculative decoding: a cheap generator proposes tokens, the generator itself scores several in one pass.

The law of the images is the generator's own (https://arxiv.org/abs/2211.17192): a proposal x is kept with probability
min(1, p(x) / q(x)), and what takes the place of a refused one is drawn from max(p - q, 0). Here p and q are what is
left of both after guidance, temperature and filters.

Every position has random numbers of its own for the proposal, the test and the replacement, and no position goes
untested. What stands there then depends on the tokens before it and on these numbers alone, so an image is the same
whatever the number of proposals and whatever else is in its batch.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators.base import FREE, Generator
from lexel.generators.next_token.fused import CacheWrite, KVCache
from lexel.generators.next_token.heads import join_tokens, split_tokens
from lexel.generators.next_token.walk import Walk
from lexel.generators.sampling import sample_index

if TYPE_CHECKING:
    from lexel.generators.next_token.decoding import Decoder
    from lexel.generators.next_token.generator import NextToken

DRAWS = 3  # random numbers of a sub-token: proposal, test, replacement
CONDITION = ("kind", "classes", "features", "length", "vocabulary")  # what two conditions must have in common


class Draft:
    """What proposes tokens to a next-token generator: `generator.sample(labels, draft=Draft(small))`.

    Args:
        generator: a next-token generator of the same tokens and conditions; None is the one that samples, decoded by
            another `implementation`.
        tokens: proposals for each pass of the generator that samples. They change the time and not the images.
        implementation: how the draft is decoded, of `decoding.IMPLEMENTATIONS`.

    Attributes:
        tested: proposals that were looked at, over all calls.
        kept: how many of them stand in the images.
        passes: of the generator that samples, counted for each image.

    Raises:
        UsageError: the generator is of another family, or there are no proposals.
    """

    def __init__(self, generator: Generator | None = None, tokens: int = 4, implementation: str = "auto") -> None:
        kind = "next_token" if generator is None else generator.config.transformer.kind
        if kind != "next_token":
            raise UsageError(f"a draft must be a next_token generator, got a {kind} one")
        if tokens < 1:
            raise UsageError(f"a draft proposes at least 1 token, got tokens = {tokens}")
        self.generator, self.tokens, self.implementation = generator, tokens, implementation
        self.tested = self.kept = self.passes = 0

    def fingerprint(self) -> str:
        """Tells drafts apart that lead to other images."""
        whose = "itself" if self.generator is None else self.generator.fingerprint()
        return f"{whose}, {self.implementation}"

    def summary(self) -> str:
        """What came of the proposals, in a line."""
        share = self.kept / max(self.tested, 1)
        return f"draft: {share:.0%} of {self.tested:,} proposals stood, in {self.passes:,} passes over an image"

    def decoder(self, target: "NextToken", own: "Decoder", dtype: torch.dtype | None) -> "Decoder":
        """The decoder that proposes to `target`, which is decoded by `own`.

        Raises:
            UsageError: the draft's tokens, conditions or device are others.
        """
        generator: NextToken = target if self.generator is None else self.generator  # type: ignore[assignment]
        self._check(generator, target)
        found = generator.decoder(self.implementation, None if self.implementation == "int8" else dtype, own)
        if found is own:
            raise UsageError(
                f"a generator that drafts for itself needs another implementation than {own.implementation!r}, such as "
                "int8; or give a smaller generator as the draft"
            )
        return found

    @staticmethod
    def _check(draft: "NextToken", target: "NextToken") -> None:
        theirs, ours = draft.settings, target.settings
        facts = {
            "codes": (theirs.codebook_size, ours.codebook_size),
            "sub-vocabularies": (list(theirs.vocabularies), list(ours.vocabularies)),
            "a grid of": (list(draft.grid), list(target.grid)),
            "the device": (str(draft.device), str(target.device)),
        }
        facts |= {
            f"the condition's {name}": (getattr(draft.condition, name, None), getattr(target.condition, name, None))
            for name in CONDITION
        }
        for name in ("tokenizer", "class_names"):
            pair = (getattr(draft.config, name), getattr(target.config, name))
            if None not in pair:
                facts[name.replace("_", " ")] = pair
        for name, (its, wanted) in facts.items():
            if its != wanted:
                raise UsageError(f"the draft has {name} {_short(its)}, the generator {_short(wanted)}; they must agree")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def speculative(walk: Walk, drafter: "Decoder", draft: Draft) -> Tensor:
    """Fills a batch by proposals of `drafter`, and adds to the counters of `draft`.

    Args:
        walk: the images; `random` is (B, T, sub-tokens, DRAWS).
        drafter: decodes the draft.
        draft: how many tokens it proposes at once.
    """
    batch, free = walk.batch, walk.batch.tokens == FREE
    if not bool(free.any()):
        return batch.tokens
    images = _Images(walk, draft.tokens)
    target, proposer = images.reader(walk.decoder), images.reader(drafter)
    begin = int(free.any(0).nonzero()[0])  # what is given before runs at once
    for reader in (target, proposer):
        reader.prefill(begin)
    settled = torch.full((len(free),), begin, device=walk.random.device)
    length = free.shape[1]
    while (least := int(settled.min())) < length:
        batch.report(least / length)
        at = settled[:, None] + torch.arange(min(draft.tokens, length - least), device=settled.device)
        q = images.propose(proposer, at)
        hidden = target.states(at)
        p, stays = images.judge(target, hidden, at, q)
        before = stays.cumprod(1).sum(1)  # how many proposals of an image stay before one that does not
        refused = before < at.shape[1]
        images.replace(target, hidden, at, before.clamp(max=at.shape[1] - 1), refused, p, q)

        tested = ~images.fixed.gather(1, at) & (torch.arange(at.shape[1], device=at.device) <= before[:, None])
        draft.tested += int(tested.sum())
        draft.kept += int((tested & stays).sum())
        draft.passes += int((settled < length).sum())
        settled = (settled + before + refused).clamp(max=length)
        done = torch.arange(length, device=settled.device) < settled[:, None]
        batch.tokens.copy_(torch.where(free, torch.where(done, images.tokens[:, :length], FREE), batch.tokens))
    return batch.tokens


class _Images:
    """The tokens of a batch under way: settled ones, and after them the draft's proposals.

    Places after the end, where images that are done wait for the others, count as given.

    Attributes:
        tokens: (B, T + ahead) int64, on the device of the random numbers.
        fixed: (B, T + ahead) bool, where a token is given.
    """

    def __init__(self, walk: Walk, ahead: int) -> None:
        device = walk.random.device
        given = walk.batch.tokens.to(device)
        self.walk, self.batch, self.length = walk, walk.batch, given.shape[1]
        self.tokens = F.pad(given.clamp(min=0), (0, ahead))
        self.fixed = F.pad(given != FREE, (0, ahead), value=True)
        self.random = F.pad(walk.random, (0, 0, 0, 0, 0, ahead))
        self.rows = torch.arange(len(given), device=device)
        self.parts = range(len(walk.batch.filters))
        self.vocabularies = walk.decoder.transformer.vocabularies

    def reader(self, decoder: "Decoder") -> "_Reader":
        """A generator that reads these images."""
        return _Reader(self, decoder, decoder.start(torch.cat(self.batch.conditions), self.tokens.shape[1]))

    def propose(self, reader: "_Reader", at: Tensor) -> list[Tensor]:
        """Writes the draft's tokens to positions at (B, n), one after the other; their laws (B, n, V), by sub-token."""
        laws: list[list[Tensor]] = [[] for _ in self.parts]
        for place in at.split(1, 1):
            hidden = reader.states(place)
            parts: list[Tensor] = []
            for part in self.parts:
                laws[part].append(reader.law(hidden, place, part, parts[0] if part else None))
                uniform = self.random[self.rows, place[:, 0], part, 0]
                parts.append(sample_index(laws[part][-1][:, 0], uniform)[:, None])
            kept = torch.where(self.fixed.gather(1, place), self.tokens.gather(1, place), self._join(parts))
            self.tokens.scatter_(1, place, kept)
        return [torch.cat(each, 1) for each in laws]

    def judge(self, reader: "_Reader", hidden: Tensor, at: Tensor, q: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The laws (B, n, V) of the generator at positions at (B, n), and whether what stands there stays (B, n)."""
        proposals = split_tokens(self.tokens.gather(1, at), self.vocabularies)
        p: list[Tensor] = []
        stays = torch.ones_like(at, dtype=torch.bool)
        for part in self.parts:
            p.append(reader.law(hidden, at, part, proposals[0] if part else None))
            stays &= _stays(p[part], q[part], proposals[part], self.random[self.rows[:, None], at, part, 1])
        return p, stays | self.fixed.gather(1, at)

    def replace(
        self,
        reader: "_Reader",
        hidden: Tensor,
        at: Tensor,
        number: Tensor,
        refused: Tensor,
        p: list[Tensor],
        q: list[Tensor],
    ) -> None:
        """Draws anew the number-th (B,) of each image's proposals, where it is refused (B,)."""
        place = at.gather(1, number[:, None])
        proposals = split_tokens(self.tokens.gather(1, place)[:, 0], self.vocabularies)
        state = hidden[torch.arange(len(hidden)), number.repeat(len(self.batch.conditions)).to(hidden.device)][:, None]
        parts: list[Tensor] = []
        agreed = torch.ones_like(refused)  # whether the sub-tokens before stayed
        for part in self.parts:
            theirs, ours = q[part][self.rows, number], p[part][self.rows, number]
            if part:  # after another first sub-token the second has another law
                ours = reader.law(state, place, part, parts[0])[:, 0]
            _, test, draw = self.random[self.rows, place[:, 0], part].unbind(-1)
            stayed = agreed & _stays(ours, theirs, proposals[part], test)
            drawn = sample_index(_residual(ours, theirs, agreed), draw)
            parts.append(torch.where(stayed, proposals[part], drawn)[:, None])
            agreed = stayed
        kept = torch.where(refused[:, None], self._join(parts), self.tokens.gather(1, place))
        self.tokens.scatter_(1, place, kept)

    def _join(self, parts: list[Tensor]) -> Tensor:
        return join_tokens(parts, self.vocabularies)


class _Reader:
    """A generator that reads images under way, each as far as it has got.

    Nothing is taken back from its cache: a position is run again, and written over, before any after it is looked at.
    """

    def __init__(self, images: _Images, decoder: "Decoder", cache: KVCache) -> None:
        self.images, self.decoder, self.cache = images, decoder, cache
        self.device = cache.start.device
        self.halves = len(images.batch.conditions)

    def prefill(self, end: int) -> None:
        """Runs positions [0, end)."""
        if end:
            self.decoder.decode(self.cache, self._doubled(self.images.tokens), 0, end)

    def states(self, at: Tensor) -> Tensor:
        """Hidden states (R, n, C) at positions at (B, n), whose first are those that each image has got to."""
        first, last = int(at[:, 0].min()), int(at[:, -1].max())
        if first == last:
            return self.decoder.decode(self.cache, self._doubled(self.images.tokens), first, last + 1)[:, None]
        before = self.images.tokens.gather(1, (at - 1).clamp(min=0))
        x = self.decoder.embed_tokens(self._doubled(before))
        at = self._doubled(at)
        x = torch.where((at == 0)[..., None], self.cache.start, x)
        seen = torch.arange(last + 1, device=self.device) <= at[..., None]
        write = CacheWrite(at, last + 1, seen[:, None])
        if last - first < at.shape[1]:  # all have got to the same place
            at = at[0]
            write = CacheWrite(at, last + 1, seen[0])
        return self.decoder.run(self.cache, x, at.clamp(max=self.images.length - 1), write)

    def law(self, hidden: Tensor, at: Tensor, part: int, first: Tensor | None) -> Tensor:
        """Log-probabilities (B, n, V) of a sub-token at positions at (B, n), given the first (B, n) of two."""
        logits = self.decoder.logits(self.cache, hidden, None if first is None else self._doubled(first))
        return self.images.batch.law(logits, at.clamp(max=self.images.length - 1), part)

    def _doubled(self, rows: Tensor) -> Tensor:
        """Rows for each image, as rows for each of its conditions, on the generator's device."""
        return rows.to(self.device).repeat(self.halves, 1)


def _stays(p: Tensor, q: Tensor, x: Tensor, uniform: Tensor) -> Tensor:
    """Whether proposals x (...,) stay, by log-probabilities p and q (..., V) and random numbers (...,)."""
    ratio = (p.gather(-1, x[..., None]) - q.gather(-1, x[..., None])).exp()[..., 0]
    return uniform < ratio


def _residual(p: Tensor, q: Tensor, agreed: Tensor) -> Tensor:
    """Logits (B, V) of max(p - q, 0); of p where the proposal was another's (`agreed` (B,) is false)."""
    rest = (p.exp() - q.exp()).clamp(min=0)
    # Laws that are equal up to rounding may leave nothing where, exactly, nothing can be refused.
    alone = ~agreed | (rest.sum(-1) <= 0)
    return torch.where(alone[:, None], p, rest.log())
