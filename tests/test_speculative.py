"""Speculative decoding: the law of the images is the generator's, and nothing but time depends on the proposals."""

import copy
import itertools
from collections import defaultdict

import pytest
import torch
from test_generator import HOT, LABELS, make
from test_transformer import GPT, PAIRS, START, TINY, shake
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators import FREE, Draft, Generator, GeneratorConfig, Masked, MaskedConfig, NextToken, NextTokenConfig
from lexel.generators.next_token.decoding import Decoder
from lexel.generators.next_token.heads import join_tokens, split_tokens
from lexel.generators.sampling import filter_logits, guide

KINDS = [TINY, PAIRS, START, GPT]
NAMES = ["modulated", "pairs", "start", "gpt"]


def small(config: NextTokenConfig, seed: int = 3, **changes) -> NextToken:
    """A draft of one layer with weights of its own."""
    draft = Generator(GeneratorConfig(transformer=config.model_copy(update={"layers": 1, **changes})))
    shake(draft, seed)
    return draft.double()


# ---------------------------------------------------------------------------------------------- the exact law

FEW = NextTokenConfig(codebook_size=3, grid=[3], classes=2, width=8, layers=2, heads=2)
FEW_PAIRS = FEW.model_copy(update={"codebook_size": 4, "head": "factorised", "factors": [2, 2], "grid": [2]})
SETTINGS = [{}, {"cfg_scale": 1.7}, {"cfg_scale": 2.0, "temperature": 0.7, "top_p": 0.8}, {"top_k": 2, "min_p": 0.01}]


class Law:
    """What whole networks without caches give a sub-token after a prefix."""

    def __init__(self, generator: NextToken, label: int, cfg_scale: float = 1.0, **filters) -> None:
        self.generator, self.label, self.scale, self.filters = generator, label, cfg_scale, filters
        self.vocabularies = generator.transformer.vocabularies
        self.known: dict[tuple, Tensor] = {}

    def __call__(self, prefix: tuple[int, ...], digits: tuple[int, ...] = ()) -> Tensor:
        """Probabilities (V,) of the sub-token after a prefix of tokens and the digits of one that is not whole."""
        if (prefix, digits) not in self.known:
            begun = join_tokens([torch.tensor((*digits, 0)[0]), torch.tensor(0)], self.vocabularies)
            rest = [0] * (self.generator.settings.tokens - len(prefix) - 1)
            tokens, labels = torch.tensor([[*prefix, int(begun), *rest]] * 2), torch.tensor([self.label, 2])
            with torch.no_grad():
                given, null = self.generator(tokens, labels).logits[len(digits)][:, len(prefix)]
            logits = filter_logits(guide(given, null, self.scale)[None], **self.filters)
            self.known[prefix, digits] = logits.softmax(-1)[0]
        return self.known[prefix, digits]

    def of_image(self, tokens: tuple[int, ...]) -> float:
        chance = 1.0
        for position, token in enumerate(tokens):
            digits = [int(digit) for digit in split_tokens(torch.tensor(token), self.vocabularies)]
            for part, digit in enumerate(digits):
                chance *= float(self(tokens[:position], tuple(digits[:part]))[digit])
        return chance


INSIDE = itertools.cycle([1e-9, 0.5, 1 - 1e-9])  # where a random number lies in the interval that it stands for


def in_interval(probabilities: Tensor, chosen: int) -> float:
    start, width = probabilities[:chosen].sum() / probabilities.sum(), probabilities[chosen] / probabilities.sum()
    return float(start + width * next(INSIDE))


def ways_of_a_sub_token(p: Tensor, q: Tensor):
    """Every way a sub-token can come about: random numbers, their probability, its value, whether it was proposed."""
    for x in q.nonzero()[:, 0].tolist():
        stays = min(1.0, float(p[x] / q[x]))
        if stays > 0:
            yield (in_interval(q, x), stays * next(INSIDE), 0.5), float(q[x]) * stays, x, True
        if stays < 1:
            residual = (p - q).clamp(min=0)
            for y in residual.nonzero()[:, 0].tolist():
                chance = float(q[x]) * (1 - stays) * float(residual[y] / residual.sum())
                yield (
                    (in_interval(q, x), stays + (1 - stays) * next(INSIDE), in_interval(residual, y)),
                    chance,
                    y,
                    False,
                )


def ways_of_an_image(p: Law, q: Law):
    """Every way an image can come about: random numbers (T, parts, 3), their probability, its tokens."""
    ways = [([], 1.0, ())]
    for _ in range(p.generator.settings.tokens):
        longer = []
        for numbers, before, tokens in ways:
            for first, chance, x, kept in ways_of_a_sub_token(p(tokens), q(tokens)):
                if len(p.vocabularies) == 1:
                    longer.append(([*numbers, [first]], before * chance, (*tokens, x)))
                    continue
                after = p(tokens, (x,))
                # Where the first is another than the proposal's, the second is drawn from its law alone.
                drawn = [((0.3, 0.0, in_interval(after, y)), float(after[y]), y, False) for y in after.nonzero()[:, 0]]
                for second, more, y, _ in ways_of_a_sub_token(after, q(tokens, (x,))) if kept else drawn:
                    token = x + p.vocabularies[0] * int(y)
                    longer.append(([*numbers, [first, second]], before * chance * more, (*tokens, token)))
        ways = longer
    return ways


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "guided", "guided, cold, top-p", "top-k, min-p"])
@pytest.mark.parametrize("config", [FEW, FEW_PAIRS], ids=["plain", "pairs"])
def test_every_image_has_the_probability_that_the_generator_gives_it(config, settings, monkeypatch):
    target, draft, label = make(config), small(config), 1
    p, q = (Law(each, label, **settings) for each in (target, draft))
    ways = ways_of_an_image(p, q)
    random = torch.tensor([numbers for numbers, _, _ in ways], dtype=torch.float64)
    monkeypatch.setattr("lexel.generators.batch.uniform_stream", lambda *_: random.flatten(1))
    found = target.sample([label] * len(ways), draft=Draft(draft, 2), **settings).flatten(1).tolist()
    assert found == [list(tokens) for _, _, tokens in ways]

    law = defaultdict(float)
    for _, chance, tokens in ways:
        law[tokens] += chance
    for tokens in itertools.product(range(config.codebook_size), repeat=config.tokens):
        assert law[tokens] == pytest.approx(p.of_image(tokens), abs=1e-12)


def test_images_are_as_frequent_as_they_are_probable():
    target, draft, count = make(FEW), small(FEW), 1500
    images = target.sample([0] * count, draft=Draft(draft, 2), cfg_scale=1.5).tolist()
    law, chi_square = Law(target, 0, 1.5), 0.0
    for image in itertools.product(range(3), repeat=3):
        expected = count * law.of_image(image)
        chi_square += (images.count(list(image)) - expected) ** 2 / expected
    assert chi_square < 54.1  # 26 degrees of freedom, 1 in 1,000


# ---------------------------------------------------------------------------------------------- what it depends on


@pytest.mark.parametrize(
    "settings", [{}, HOT, {**HOT, "cfg_schedule": "interval:0.3,0.8"}], ids=["", "hot", "interval"]
)
@pytest.mark.parametrize("config", KINDS, ids=NAMES)
def test_an_image_depends_on_neither_its_batch_nor_the_number_of_proposals(config, settings):
    target, draft = make(config), small(config)
    images = target.sample(LABELS, draft=Draft(draft, 2), **settings)
    assert torch.equal(target.sample(LABELS, draft=Draft(draft, 1), **settings), images)
    assert torch.equal(target.sample(LABELS, draft=Draft(draft, 9), batch_size=2, **settings), images)
    order = [3, 1, 4]
    chosen = target.sample([LABELS[i] for i in order], image_numbers=order, draft=Draft(draft, 4), **settings)
    assert torch.equal(chosen, images[order])


@pytest.mark.parametrize("config", KINDS, ids=NAMES)
def test_greedy_images_are_those_without_a_draft(config):
    target = make(config)
    expected = target.sample(LABELS, top_k=1, cfg_scale=1.5)
    assert torch.equal(target.sample(LABELS, top_k=1, cfg_scale=1.5, draft=Draft(small(config), 3)), expected)


@pytest.mark.parametrize("config", KINDS, ids=NAMES)
def test_a_draft_that_is_the_generator_is_always_right(config):
    target = make(config)
    draft = Draft(copy.deepcopy(target), 3)
    target.sample(LABELS, draft=draft, **HOT)
    assert (draft.tested, draft.kept, draft.passes) == (30, 30, 10)  # 5 images of 6 tokens, 3 a pass


def test_a_draft_that_is_often_wrong_is_counted():
    target, draft = make(TINY), Draft(small(TINY), 3)
    target.sample(LABELS, draft=draft, top_k=2)
    assert 0 < draft.kept < draft.tested == 30
    assert draft.passes < 30


@pytest.mark.parametrize("config", KINDS, ids=NAMES)
def test_caches_after_refusals_are_those_of_the_images_alone(config, monkeypatch):
    target, draft, started = make(config), Draft(small(config), 4), []
    start = Decoder.start
    monkeypatch.setattr(Decoder, "start", lambda *given: started.append((given[0], start(*given))) or started[-1][1])
    tokens = target.sample(LABELS, draft=draft).flatten(1)
    assert draft.kept < draft.tested
    for decoder, cache in started[:2]:
        fresh = start(decoder, torch.tensor(LABELS), tokens.shape[1])
        decoder.decode(fresh, tokens, 0, tokens.shape[1])
        for name in ("keys", "values"):
            for held, expected in zip(getattr(cache, name), getattr(fresh, name), strict=True):
                torch.testing.assert_close(held[:, :, : expected.shape[2]], expected)


def test_given_tokens_stay_and_what_follows_them_is_drawn_as_before():
    target, draft = make(TINY), small(TINY)
    images = target.sample(LABELS, draft=Draft(draft, 2))
    given = images.clone()
    given[:, 1] = FREE
    given[0, 0, 2] = FREE  # one image begins before the others
    assert torch.equal(target.sample(LABELS, draft=Draft(draft, 3), given=given), images)
    given = torch.full_like(images, FREE)
    given[:, 1, 1] = torch.tensor([5, 6, 7, 8, 9])
    assert torch.equal(target.sample(LABELS, draft=Draft(draft, 3), given=given)[:, 1, 1], given[:, 1, 1])
    assert torch.equal(target.sample(LABELS, draft=Draft(draft), given=images), images)


def test_a_generator_can_be_its_own_draft_in_int8():
    target = make(TINY, torch.float32)
    draft = Draft(tokens=3, implementation="int8")
    images = target.sample(LABELS, draft=draft, top_k=1)
    assert draft.kept > 0.7 * draft.tested
    assert torch.equal(images, target.sample(LABELS, top_k=1))


# ---------------------------------------------------------------------------------------------- what is refused


def other(**changes) -> Draft:
    return Draft(small(TINY, **changes))


def named(tokenizer: str) -> Draft:
    draft = small(TINY)
    draft.config = draft.config.model_copy(update={"tokenizer": tokenizer})
    return Draft(draft)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (lambda: other(codebook_size=31), "the draft has codes 31, the generator 30; they must agree"),
        (lambda: other(rows=3), r"the draft has a grid of \[3, 3\], the generator \[2, 3\]"),
        (lambda: other(classes=5), "the draft has the condition's classes 5, the generator 4"),
        (lambda: other(condition={"kind": "none"}), "the draft has the condition's kind none, the generator class"),
        (lambda: Draft(small(PAIRS)), r"the draft has sub-vocabularies \[5, 6\], the generator \[30\]"),
        (lambda: named("b" * 64), "the draft has tokenizer bbbb.*, the generator aaaa"),
        (lambda: Draft(), "a generator that drafts for itself needs another implementation than 'plain', such as int8"),
        (lambda: Draft(tokens=0), "a draft proposes at least 1 token, got tokens = 0"),
        (lambda: Draft(Masked(masked())), "a draft must be a next_token generator, got a masked one"),
        (lambda: "runs/small", "draft = 'runs/small': it should be an instance of Draft"),
    ],
)
def test_drafts_that_do_not_fit_are_refused_in_one_line(draft, message):
    target = make(TINY)
    target.config = target.config.model_copy(update={"tokenizer": "a" * 64})
    with pytest.raises(UsageError, match=message) as told:
        target.sample(LABELS, draft=draft())
    assert "\n" not in str(told.value)


def masked() -> GeneratorConfig:
    return GeneratorConfig(transformer=MaskedConfig(codebook_size=30, rows=2, columns=3, classes=4, width=32))


def test_a_window_and_a_draft_exclude_each_other():
    with pytest.raises(UsageError, match="window and draft are two ways to decode"):
        make(TINY).sample(LABELS, window=1, draft=Draft(small(TINY)))
