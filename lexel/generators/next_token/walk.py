"""Orders in which a next-token generator fills an image: token after token, or rows in a wavefront."""

from typing import NamedTuple

import torch
from torch import Tensor

from lexel.generators.base import FREE
from lexel.generators.batch import SampleBatch
from lexel.generators.next_token.decoding import Decoder
from lexel.generators.next_token.fused import CacheWrite, KVCache
from lexel.generators.next_token.heads import join_tokens


class Walk(NamedTuple):
    """A batch of images and the decoder that makes them."""

    decoder: Decoder
    batch: SampleBatch
    random: Tensor  # (B, T, sub-tokens) float64 in [0, 1)

    def start(self, slots: int) -> KVCache:
        """Caches of the conditions and, with guidance, of as many null conditions after them."""
        return self.decoder.start(torch.cat(self.batch.conditions), slots)

    def choose(self, cache: KVCache, hidden: Tensor, position: int) -> Tensor:
        """The tokens at a position, (B,); hidden is (B, C), or (2 B, C) with the unguided rows after the others."""
        parts: list[Tensor] = []
        for part in range(len(self.batch.filters)):
            first = parts[0].repeat(len(hidden) // len(self.batch.tokens)) if parts else None
            logits = self.decoder.logits(cache, hidden, first)
            parts.append(self.batch.draw(logits, position, self.random[:, position, part], part))
        return join_tokens(parts, self.decoder.transformer.vocabularies)


def raster(walk: Walk) -> Tensor:
    """Token after token. Null rows run only where guidance is on, and catch up in one pass before."""
    decoder, tokens, count = walk.decoder, walk.batch.tokens, len(walk.batch.tokens)
    free = tokens == FREE
    wanted = free.any(0).tolist()  # positions where any image needs a token
    whole = walk.start(tokens.shape[1])
    conditional = whole.rows(0, count)
    unconditional = whole.rows(count, 2 * count)
    ran = {"conditional": 0, "unconditional": 0}  # positions whose keys and values are in the cache

    def decode(cache: KVCache, end: int, *names: str) -> Tensor:
        known = tokens.repeat(len(names), 1)
        hidden = decoder.decode(cache, known, ran[names[0]], end)
        ran.update(dict.fromkeys(names, end))
        return hidden

    for position in range(tokens.shape[1]):
        walk.batch.report(position / tokens.shape[1])
        if not wanted[position]:
            continue  # its keys and values follow with the next token that is sampled
        if not walk.batch.guided_at(position):
            hidden, cache = decode(conditional, position + 1, "conditional"), conditional
        else:
            cache = whole
            for name, half in (("conditional", conditional), ("unconditional", unconditional)):
                if ran[name] < position:
                    decode(half, position, name)
            hidden = decode(whole, position + 1, "conditional", "unconditional")
        found = walk.choose(cache, hidden, position)
        tokens[:, position] = torch.where(free[:, position], found, tokens[:, position])
    return tokens


def wavefront(walk: Walk, window: int) -> Tensor:
    """Row after row, overlapping: at a step, every row under way gets one token (https://arxiv.org/abs/2412.04062).

    The token before a row's first is the last of the row above, which is not there yet. Until it is, the newest token
    of the row above stands in for it, at its position; keys and values of the stand-in are not kept.
    """
    decoder, tokens = walk.decoder, walk.batch.tokens
    (rows, columns), length, device = decoder.transformer.config.shape, tokens.shape[1], tokens.device
    window = min(window, columns)
    free = tokens == FREE
    halves = 2 if walk.batch.guided else 1
    # Slot s is the input at position s (the token before token s); stand-ins use the slots after these, one a row.
    cache = walk.start(length + rows)
    filled = torch.zeros(length + rows, dtype=torch.bool, device=device)
    steps = columns + (rows - 1) * window
    late: list[int] = []  # positions whose true input is known by now and not in the cache yet

    for step in range(steps):
        walk.batch.report(step / steps)
        at = [(row, step - row * window) for row in range(rows) if 0 <= step - row * window < columns]
        inputs, positions, slots = [], [], []
        for position in late:
            inputs.append(tokens[:, position - 1])
            positions.append(position)
            slots.append(position)
        for row, column in at:
            position = row * columns + column
            stands_in = row > 0 and column == 0
            source = (row - 1) * columns + window - 1 if stands_in else position - 1
            inputs.append(tokens[:, max(source, 0)])
            positions.append(position)
            slots.append(length + row if stands_in else position)

        x = decoder.embed_tokens(torch.stack(inputs, 1).clamp(min=0).repeat(halves, 1))
        if positions[0] == 0:
            x = torch.cat([cache.start, x[:, 1:]], 1)
        position_of = torch.tensor(positions, device=device)
        slot_of = torch.tensor(slots, device=device)
        filled[slot_of[slot_of < length]] = True
        # An input sees what stands before it in raster order and is there, and itself: a stand-in itself alone, even if
        # the token it stands in for has come by now.
        ahead = torch.arange(len(filled), device=device) - position_of[:, None]
        seen = filled & torch.where((slot_of < length)[:, None], ahead <= 0, ahead < 0)
        seen[torch.arange(len(slots), device=device), slot_of] = True
        hidden = decoder.run(cache, x, position_of, CacheWrite(slot_of, len(filled), seen))

        for (row, column), state in zip(at, hidden[:, len(late) :].unbind(1), strict=True):
            position = row * columns + column
            found = walk.choose(cache, state, position)
            tokens[:, position] = torch.where(free[:, position], found, tokens[:, position])
        # The last token of a row is the input of the next row's first position, where a stand-in has been.
        late = [(row + 1) * columns for row, column in at if column == columns - 1 and row + 1 < rows]
    return tokens
