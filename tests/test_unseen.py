"""Estimates of codes not yet seen, against hand counts and a simulation whose truth is known."""

import math

import pytest
import torch
from torch import Tensor

from lexel.metrics.unseen import NEVER, CodeIncidence


def counted(pictures: list[list[int]], codebook_size: int = 8) -> CodeIncidence:
    counts = CodeIncidence(codebook_size)
    for number, tokens in enumerate(pictures):
        counts.add(torch.tensor([tokens]), torch.tensor([number]))
    return counts


def test_counts_of_three_pictures_are_those_by_hand():
    counts = counted([[0, 0, 1, 2], [0, 1, 1, 1], [0, 3, 3, 3]])
    assert counts.tokens.tolist() == [4, 4, 1, 3, 0, 0, 0, 0]
    assert counts.pictures.tolist() == [3, 2, 1, 1, 0, 0, 0, 0]
    assert counts.first.tolist()[:4] == [0, 0, 0, 2]
    assert counts.first[4] == NEVER
    unseen = counts.unseen()
    assert unseen[:6] == (3, 12, 8, 4, 2, 1)
    assert unseen.share == pytest.approx((1 + 3) / 12)  # tokens of the codes in one picture only
    assert unseen.more == 2 - 1 + 1  # Q1 - Q2 + Q3
    assert unseen.reachable == pytest.approx(4 + 2 / 3 * 2**2 / 2)
    assert unseen.rarity == pytest.approx(1 - 0.05 ** (1 / 3))


def test_good_turing_is_the_share_of_each_picture_that_the_others_do_not_show():
    """Leaving one picture out and asking the rest is the definition; counting gives the same without the loop."""
    pictures = torch.randint(40, (12, 6), generator=torch.Generator().manual_seed(0))
    left_out = []
    for number, tokens in enumerate(pictures):
        others = torch.cat([pictures[:number], pictures[number + 1 :]]).flatten()
        left_out.append(float((~torch.isin(tokens, others)).double().mean()))
    assert counted(pictures.tolist(), 40).unseen().share == pytest.approx(sum(left_out) / 12, abs=1e-12)


def test_order_batches_and_parts_do_not_show():
    pictures = torch.randint(30, (20, 5), generator=torch.Generator().manual_seed(1))
    whole = counted(pictures.tolist(), 30)
    first, second = CodeIncidence(30), CodeIncidence(30)
    second.add(pictures[11:], torch.arange(11, 20))
    first.add(pictures[:11].flip(0), torch.arange(11).flip(0))
    restored = CodeIncidence(30)
    restored.load_state_dict(second.state_dict())
    restored.merge(first)
    assert restored.unseen() == whole.unseen()
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in whole.state_dict().items())


def test_every_book_has_codes_of_its_own():
    counts = CodeIncidence(4, books=2)
    counts.add(torch.tensor([[[0, 1], [3, 3]]]), torch.tensor([0]))
    assert counts.tokens.tolist() == [1, 1, 0, 0, 0, 0, 0, 2]
    assert counts.used.tolist() == [True, True, False, True]


def test_before_the_first_picture_nothing_is_claimed():
    unseen = CodeIncidence(4).unseen()
    assert math.isnan(unseen.share)
    assert (unseen.seen, unseen.reachable_high, unseen.rarity) == (0, 4.0, 1.0)


class Simulation:
    """Pictures of 16 tokens whose codes are alike: each picks a topic, and repeats few of the topic's codes."""

    CODES, TOPICS = 1500, 60

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.popularity = 1 / torch.arange(1.0, self.TOPICS + 1)
        rank = 1 / torch.arange(1.0, self.CODES + 1) ** 1.1
        self.codes = torch.stack(
            [rank[torch.randperm(self.CODES, generator=generator)] for _ in range(self.TOPICS)]
        )  # (topics, codes), not normalised

    def draw(self, pictures: int, generator: torch.Generator) -> Tensor:
        topics = self.popularity.multinomial(pictures, True, generator=generator)
        few = self.codes[topics].multinomial(4, True, generator=generator)  # four draws a picture,
        return few.repeat_interleave(4, 1)  # each four times

    def share_of(self, unseen: Tensor) -> float:
        """The expected share of a further picture's tokens that are these codes."""
        p = (self.popularity / self.popularity.sum()) @ (self.codes / self.codes.sum(1, keepdim=True))
        return float(p[unseen].sum())


def test_the_interval_holds_the_true_share_about_as_often_as_it_says():
    world, inside, bias, naive, more_inside = Simulation(), 0, 0.0, 0.0, 0
    trials, pictures = 120, 200
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        tokens = world.draw(2 * pictures, generator)
        counts = CodeIncidence(world.CODES)
        counts.add(tokens[:pictures], torch.arange(pictures))
        unseen = counts.unseen()
        truth = world.share_of(counts.pictures == 0)
        inside += unseen.share_low <= truth <= unseen.share_high
        bias += (unseen.share - truth) / trials
        naive += (float((counts.tokens == 1).sum()) / int(counts.tokens.sum()) - truth) / trials
        added = len(tokens[pictures:].unique()) - len(
            set(tokens[pictures:].unique().tolist()) & set(tokens[:pictures].unique().tolist())
        )
        more_inside += unseen.more_low <= added <= unseen.more_high
    assert inside / trials > 0.9
    assert abs(bias) < 0.005
    assert naive < -0.2  # single tokens: no code occurs once, so nothing would be missing
    assert more_inside / trials > 0.9


def test_the_number_of_codes_that_can_occur_is_bounded_from_below():
    world, generator = Simulation(), torch.Generator().manual_seed(3)
    counts = CodeIncidence(world.CODES)
    counts.add(world.draw(400, generator), torch.arange(400))
    unseen = counts.unseen()
    assert unseen.seen < unseen.reachable_low < unseen.reachable < unseen.reachable_high
    assert unseen.reachable_low < world.CODES
