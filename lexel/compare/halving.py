"""Successive halving (https://arxiv.org/abs/1502.07943): many quantizers train briefly, the better half goes on.

Round 1 trains every candidate for a small part of the recipe's steps, each later round the better half of the round
before for twice as many, the last two or so for all of them. Every training is a whole one with its own schedule, not
the beginning of a longer one: a schedule that has not come down says little. Who starts slowly can lose here; the
result says of each candidate when it was dropped and how far behind it was, and no more than that is known of it.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexel.compare.plan import Variant, as_table, expand
from lexel.compare.run import METRICS, compare
from lexel.compare.summary import table
from lexel.config import check
from lexel.errors import UsageError, unknown
from lexel.evaluate import write_result
from lexel.report import Section, write_page
from lexel.train.session import Progress
from lexel.train.tokenizer import TokenizerRecipe

# Student's t at 97.5 % for 1, 2, ... degrees of freedom: of two or three seeds, two standard deviations are not 95 %.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
CRITERIA = {"psnr": 1, "ssim": 1, "lpips_vgg": -1}  # what decides, and its sign: 1 where more is better


class Dropped(NamedTuple):
    """A candidate that did not go on."""

    quantizer: str
    steps: int  # of the round it lost
    value: float | None  # its mean there; None where it could not be measured, as after a NaN
    behind: float | None  # the last that went on, how much better: at least 0


class Halving(NamedTuple):
    """The result of a successive halving."""

    page: Path  # halving.html
    rounds: list[list[dict[str, Any]]]  # the rows of each finished round, best first
    dropped: list[Dropped]
    winner: str | None  # None until the last round is done
    margin: float | None  # of the winner over the next, in units of the criterion
    noise: float | None  # the standard deviation of that margin over seeds; None with one seed
    verdict: str  # in words
    finished: bool  # False when a signal ended it early: the same call goes on from there


def lengths(candidates: int, steps: int) -> list[tuple[int, int]]:
    """Candidates and steps of each round, from the first to the last.

    >>> lengths(7, 4000)
    [(7, 1000), (4, 2000), (2, 4000)]
    """
    counts = [candidates]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    return [(count, max(1, round(steps / 2 ** (len(counts) - 1 - number)))) for number, count in enumerate(counts)]


def halving(
    recipe: TokenizerRecipe,
    quantizers: Sequence[str],
    out: str | Path,
    *,
    by: str = "psnr",
    seeds: Sequence[int] = (0,),
    variants: Mapping[str, Variant] | None = None,
    metrics: Sequence[str] = METRICS,
    limit: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int, str, Progress], None] | None = None,
) -> Halving:
    """Finds the best of several quantizers at the recipe's codebook size; called again it goes on.

    Args:
        recipe: what to train; its number of steps is that of the last round.
        quantizers: two or more keys of QUANTIZERS, names of `variants`.
        out: a folder: `round_1`, `round_2`, ..., each a comparison, and `halving.json`, `halving.html`.
        by: what decides, "psnr", "ssim" or "lpips_vgg", as a mean over seeds on held-out pictures.
        seeds: of every round.
        variants: as in `compare`.
        metrics: as in `compare`; what decides must be among them.
        limit: as in `compare`.
        device: as in `compare`.
        progress: as in `compare`, of the round at hand.

    Raises:
        UsageError: as in `compare`; the recipe counts epochs, or what decides is not measured.
    """
    if by not in CRITERIA:
        raise unknown("criterion", by, CRITERIA)
    if by.split("_")[0] not in metrics:
        raise UsageError(f"{by} decides, and metrics leaves it out; add {by.split('_')[0]}")
    if len(quantizers) < 2:
        raise UsageError(f"halving chooses among two candidates or more, got {', '.join(quantizers) or 'none'}")
    if recipe.train.steps is None:
        raise UsageError("halving counts steps; give the recipe steps (--set train.epochs=none --set train.steps=5000)")
    expand(recipe, quantizers, seeds=seeds, variants=variants)  # refuses what cannot work before anything is trained
    out, remaining = Path(out), list(quantizers)
    rounds: list[list[dict[str, Any]]] = []
    dropped: list[Dropped] = []
    plan = lengths(len(quantizers), recipe.train.steps)
    finished = True
    for number, (_, steps) in enumerate(plan, 1):
        found = compare(
            shortened(recipe, steps),
            remaining,
            out / f"round_{number}",
            seeds=seeds,
            variants=variants,
            metrics=metrics,
            limit=limit,
            device=device,
            progress=progress,
        )
        if not found.finished:
            finished = False
            break
        rows = ranked(found.rows, by)
        rounds.append(rows)
        if number < len(plan):
            kept, lost = rows[: plan[number][0]], rows[plan[number][0] :]
            dropped += [_dropped(row, kept[-1], steps, by) for row in lost]
            remaining = [label for label in remaining if label in {row["quantizer"] for row in kept}]
    result = _result(out, rounds, dropped, by, plan, finished)
    _write(out, recipe, result, by, plan)
    return result


def shortened(recipe: TokenizerRecipe, steps: int) -> TokenizerRecipe:
    """The recipe at another number of steps: lengths within it change in proportion."""
    assert recipe.train.steps is not None
    share = steps / recipe.train.steps
    table = as_table(recipe)
    train = table["train"]
    train["steps"] = steps
    train["schedule"]["warm_up"] *= share
    train["schedule"]["drops"] = [length * share for length in train["schedule"]["drops"]]
    if "discriminator" in train:
        train["discriminator"]["start"] *= share
    for name in ("log_every", "validate_every", "save_every"):
        train[name] = max(1, min(round(train[name] * share), steps))
    return check(table, TokenizerRecipe, f"the recipe at {steps} steps")


def ranked(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The rows from the best to the worst; those that were not measured, or ended early, last."""

    def key(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = mean_of(row, by)
        return value is None, 0.0 if value is None else -CRITERIA[by] * value

    return sorted(rows, key=key)


def mean_of(row: Mapping[str, Any], by: str) -> float | None:
    """The mean over seeds of what decides; None where a training ended early."""
    number = row.get(by)
    if row["stopped"] or number is None or number["mean"] is None or not math.isfinite(number["mean"]):
        return None
    return float(number["mean"])


def margin_and_noise(first: Mapping[str, Any], second: Mapping[str, Any], by: str) -> tuple[float, float | None]:
    """The first row's lead, and the standard deviation of that difference's mean over seeds.

    Seeds are paired: two rows with the same seed have seen the same pictures from the same start.
    """
    pairs = zip(first[by]["values"], second[by]["values"], strict=True)
    differences = [CRITERIA[by] * (a - b) for a, b in pairs]
    count = len(differences)
    noise = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return statistics.fmean(differences), noise


def verdict(first: Mapping[str, Any], second: Mapping[str, Any], by: str) -> str:
    """Which of the two best rows to take, in words: the first, where chance over seeds gives such a lead in 5 %."""
    margin, noise = margin_and_noise(first, second, by)
    lead = f"{first['quantizer']} is ahead of {second['quantizer']} by {margin:.3g} ({by})"
    if noise is None:
        return f"take {first['quantizer']}: {lead}, in one seed, so that it is not known what the lead is worth"
    seeds = len(first[by]["values"])
    bound = STUDENT[min(seeds - 1, len(STUDENT)) - 1] * noise
    if margin > bound:
        return f"take {first['quantizer']}: {lead}, ± {bound:.2g} at 95 % over {seeds} seeds"
    return f"take either: {lead}, ± {bound:.2g} at 95 % over {seeds} seeds; the cheaper one will do"


def _dropped(row: Mapping[str, Any], last: Mapping[str, Any], steps: int, by: str) -> Dropped:
    value, kept = mean_of(row, by), mean_of(last, by)
    behind = None if value is None or kept is None else CRITERIA[by] * (kept - value)
    return Dropped(row["quantizer"], steps, value, behind)


def _result(
    out: Path,
    rounds: list[list[dict[str, Any]]],
    dropped: list[Dropped],
    by: str,
    plan: Sequence[tuple[int, int]],
    finished: bool,
) -> Halving:
    result = Halving(out / "halving.html", rounds, dropped, None, None, None, "", finished)
    if not finished:
        return result._replace(verdict=f"{len(rounds)} of {len(plan)} rounds are done")
    first, second = rounds[-1][:2]
    if mean_of(first, by) is None:
        return result._replace(verdict="no training of the last round came to its end: nothing can be recommended")
    result = result._replace(winner=first["quantizer"])
    if mean_of(second, by) is None:
        return result._replace(verdict=f"take {result.winner}: {second['quantizer']} did not come to its end")
    margin, noise = margin_and_noise(first, second, by)
    return result._replace(margin=margin, noise=noise, verdict=verdict(first, second, by))


def _write(out: Path, recipe: TokenizerRecipe, result: Halving, by: str, plan: Sequence[tuple[int, int]]) -> None:
    summary = {**result._asdict(), "dropped": [each._asdict() for each in result.dropped], "by": by, "plan": plan}
    del summary["page"]
    write_result(out / "halving.json", summary)
    sections = [
        Section(
            f"Round {number}: {steps:,} steps",
            f"{len(rows)} of {plan[0][0]} candidates; a comparison of its own in round_{number}.",
            table=table(rows),
        )
        for number, (rows, (_, steps)) in enumerate(zip(result.rounds, plan, strict=False), 1)
    ]
    if result.dropped:
        note = (
            f"Behind is the distance ({by}) to the last that went on. What they reach in longer trainings is not known."
        )
        lines = [["quantizer", "steps", by, "behind"]]
        lines += [
            [each.quantizer, f"{each.steps:,}", _number(each.value), _number(each.behind)] for each in result.dropped
        ]
        sections.append(Section("Dropped on the way", note, table=lines))
    lead = f"{recipe.data.source} at {recipe.data.size} pixels, successive halving by {by}: {result.verdict}."
    write_page(result.page, "One quantizer of several", lead, sections)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
