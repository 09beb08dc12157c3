"""Speculative decoding beside token after token: tokens a second, and how many proposals stand.

    python -m benchmarks speculative RUN --draft SMALL [--draft SMALLER] [--tokens 2,4,8] [--batches 1,8] [--scales 1,2]
    python -m benchmarks speculative --size B

Every way samples whole images, in turns; `int8` is the generator itself as its own draft. With --size the weights are
random (the head's N(0, 0.02)), so that the times are those of that size and the share of proposals that stand is not.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.generator import CLOCKS
from lexel.config import find_recipe, load
from lexel.errors import UsageError
from lexel.generators import Draft, Generator, GeneratorConfig
from lexel.loading import load_generator
from lexel.train.generator_recipe import GeneratorRecipe

INT8 = "int8"


def random_generator(size: str) -> Generator:
    """A generator of a published size with random weights."""
    torch.manual_seed(0)
    config = load(find_recipe(f"generator_{size.lower()}"), GeneratorRecipe).generator
    generator = Generator(GeneratorConfig(transformer=config)).eval()
    torch.nn.init.normal_(generator.transformer.get_submodule("head").get_parameter("weight"), std=0.02)
    return generator


def measure(
    generator: Generator,
    drafts: dict[str, Generator | None],
    proposals: list[int],
    batch: int,
    scale: float,
    rounds: int,
    given: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Seconds of every round of each way, with the share of its proposals that stood and its tokens a pass."""
    classes = getattr(generator.condition, "classes", 0)
    length = generator.settings.tokens
    known = None
    if given:  # the first tokens count as known: a part of a long image is enough to time
        known = torch.full((batch, *generator.grid), -1).flatten(1)
        known[:, :given] = 0
        known = known.view(batch, *generator.grid)
    ways: dict[str, Draft | None] = {"token after token": None}
    for name, draft in drafts.items():
        for tokens in proposals:
            ways[f"{name}, {tokens} proposals"] = Draft(draft, tokens, INT8 if draft is None else "auto")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        condition: Any = [(round_ * batch + image) % classes for image in range(batch)] if classes else batch
        numbers = range(round_ * batch, (round_ + 1) * batch)
        for name, way in ways.items():
            begun = clock()
            generator.sample(
                condition, cfg_scale=scale, image_numbers=numbers, given=known, draft=way, batch_size=batch
            )
            if round_:
                times[name].append(clock() - begun)
    made = batch * (length - given)
    found: dict[str, Any] = {}
    for name, way in ways.items():
        found[name] = {"seconds": [round(each, 4) for each in times[name]], "tokens": made}
        if way is not None:
            found[name] |= {"kept": way.kept / way.tested, "a pass": (rounds + 1) * made / way.passes}
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a next_token generator")
    parser.add_argument("--size", choices=["B", "L", "XL", "XXL"], help="a published size with random weights instead")
    parser.add_argument("--draft", action="append", default=[], help="a smaller generator; may be repeated")
    parser.add_argument("--tokens", default="2,4,8", help="numbers of proposals, separated by commas")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--scales", default="1,2", help="of guidance")
    parser.add_argument("--given", type=int, default=0, help="tokens at the beginning that are not sampled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--clock", default="cpu", choices=list(CLOCKS))
    parser.add_argument("--out", type=Path, default=results.PAGE, help="the page; figures lie beside it as .json")


def run(arguments: argparse.Namespace) -> None:
    """Measures every batch and scale, and adds them to the page."""
    if (arguments.run is None) == (arguments.size is None):
        raise UsageError("give a trained generator's RUN, or --size B for random weights")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    generator = random_generator(arguments.size) if arguments.size else load_generator(arguments.run)
    drafts: dict[str, Generator | None] = {Path(path).name: load_generator(path) for path in arguments.draft}
    drafts[INT8] = None
    proposals, batches = ([int(part) for part in text.split(",")] for text in (arguments.tokens, arguments.batches))
    cases: dict[str, Any] = {}
    for batch in batches:
        for scale in map(float, arguments.scales.split(",")):
            found = measure(generator, drafts, proposals, batch, scale, arguments.rounds, arguments.given, clock)
            cases[f"{batch}, {scale:g}"] = found
            print(*_rows(batch, scale, found), sep="\n", flush=True)
    name = f"{arguments.size}, random weights" if arguments.size else Path(arguments.run).name
    entry = {
        "cases": cases,
        "networks": {name: _shape(generator)} | {one: _shape(each) for one, each in drafts.items() if each is not None},
        "commit": results.commit(),
        "machine": results.machine("cpu", torch.get_num_threads()),
        "clock": clock.__name__,
    }
    figures = results.read(arguments.out)
    figures.setdefault("speculative", {})[name] = entry
    results.write(arguments.out, figures, "speculative", section(figures["speculative"]))


def _shape(generator: Generator) -> str:
    config = generator.settings
    count = sum(parameter.numel() for parameter in generator.parameters())
    return (
        f"{config.layers} layer{'s' * (config.layers > 1)} of {config.width}, {count / 1e6:.1f} million parameters, "
        f"{config.tokens} tokens of {config.codebook_size:,} codes"
    )


def _rows(batch: int, scale: float, found: dict[str, Any]) -> list[str]:
    """The lines of a table: a way each, ratios of the rounds' times to those of token after token."""
    plain = found["token after token"]["seconds"]
    lines = []
    for name, way in found.items():
        each = way["tokens"] / statistics.median(way["seconds"])
        gain = statistics.median(one / other for one, other in zip(plain, way["seconds"], strict=True))
        kept = f"{way['kept']:.0%} | {way['a pass']:.2f}" if "kept" in way else "- | -"
        lines.append(f"| {batch} | {scale:g} | {name} | {kept} | {each:,.0f} | {gain:.2f} |")
    return lines


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "`python -m benchmarks speculative`: images sampled in float32 with proposals of a draft, beside token after",
        "token. `int8`: the generator itself, decoded in 8 bits, is the draft. *stand*: proposals that were kept, of",
        "those that were tested; *a pass*: tokens that a pass of the generator settled in an image. Medians of rounds,",
        "ways in turns.",
    ]
    for entry in figures.values():
        shapes = "; ".join(f"{one}: {shape}" for one, shape in entry["networks"].items())
        lines += [
            "",
            f"{shapes}. {entry['machine']}, {entry['clock']}; commit {entry['commit']}.",
            "",
            "| batch | guidance | way | stand | a pass | tokens/s | times token after token |",
            "|---|---|---|---|---|---|---|",
        ]
        for case, found in entry["cases"].items():
            batch, scale = case.split(", ")
            lines += _rows(int(batch), float(scale), found)
    return lines
