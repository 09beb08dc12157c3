"""Generation against the plain way, in one run: milliseconds a decode step, and what the fast ways cost in likelihood.

    python -m benchmarks generator [--size B] [--batches 1,8] [--rounds 5] [--device cpu] [--threads 2] [--clock wall]
    python -m benchmarks generator --generator RUN
    python -m benchmarks generator --peer CHECKOUT [--size B] [--threads 1 --clock cpu]

The plain way does what published code does: the class's modulation again for every token, attention over the whole
static cache behind a mask, `softmax` and `torch.multinomial`. All ways sample with guidance, so a batch of b images is
2 b rows. Weights are random; time does not depend on them. Ways take turns, and ratios are medians over rounds, so that
a busy machine slows all of them alike; where it is too busy even for that, `--threads 1 --clock cpu` counts processor
time alone. The last is LlamaGen's own sampler and transformers' Llama beside ours: see `benchmarks.samplers`.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from lexel.config import find_recipe, load
from lexel.generators import Generator, GeneratorConfig
from lexel.generators.next_token.blocks import apply_rope
from lexel.generators.next_token.decoding import Decoder
from lexel.generators.next_token.network import Transformer
from lexel.generators.sampling import guide, sample_index, uniform_stream
from lexel.loading import load_generator
from lexel.train.generator_recipe import GeneratorRecipe

TOKENS = 256
SCALE = 2.0  # of guidance
POSITIONS = (16, 80, 144, 208, 250)  # where the decode step is timed: short and long caches

# What a step must read at least, and how fast the device reads (bytes a second): the floor of batch 1.
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12}


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Plain:
    """One decode step the plain way."""

    def __init__(self, model: Any, labels: Tensor) -> None:  # a Transformer, whose parts are used by name
        config, device = model.config, labels.device
        self.model, self.slots = model, -(-(TOKENS + 1) // 8) * 8
        self.condition = model.classes(labels)[:, None]
        shape = (len(labels), config.heads, self.slots, config.width // config.heads)
        self.caches = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in model.blocks]
        self.mask = torch.ones(self.slots, self.slots, dtype=torch.bool, device=device).tril()
        self.table = model.positions(self.condition)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, scale: float) -> Tensor:
        """The next tokens (B,), for the last ones of 2 B rows."""
        model = self.model
        x = model.tokens(tokens)[:, None]
        place = torch.tensor([position], device=x.device)
        for block, (keys, values) in zip(model.blocks, self.caches, strict=True):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(F.silu(self.condition)).chunk(6, -1)
            y = block.attention_norm(x) * (1 + scale1) + shift1
            q, k, v = block.attention.qkv(y).unflatten(-1, (3, block.attention.heads, -1)).unbind(-3)
            q, k = apply_rope(q, self.table[place]), apply_rope(k, self.table[place])
            keys[:, :, place], values[:, :, place] = k.transpose(1, 2), v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=self.mask[place])
            x = x + gamma1 * block.attention.out(mixed.transpose(1, 2).flatten(-2))
            x = x + gamma2 * block.feed_forward(block.feed_forward_norm(x) * (1 + scale2) + shift2)
        scale3, shift3 = model.modulation(F.silu(self.condition)).chunk(2, -1)
        logits = model.head(model.norm(x) * (1 + scale3) + shift3)[:, 0]
        half = len(logits) // 2
        return torch.multinomial(guide(logits[:half], logits[half:], scale).softmax(-1), 1)[:, 0]


class Fast:
    """One decode step of Lexel's; its share of what is done once a batch is added."""

    def __init__(self, decoder: Decoder, labels: Tensor, clock: Callable[[], float]) -> None:
        self.decoder = decoder
        decoder.start(labels, TOKENS)
        _wait(labels.device)
        begun = clock()
        self.cache = decoder.start(labels, TOKENS)
        _wait(labels.device)
        self.once = (clock() - begun) / TOKENS
        self.tokens = torch.zeros(len(labels), TOKENS, dtype=torch.long, device=labels.device)
        self.random = uniform_stream(0, range(len(labels) // 2), TOKENS).to(labels.device)

    def step(self, tokens: Tensor, position: int, scale: float) -> Tensor:
        self.tokens[:, position - 1] = tokens
        hidden = self.decoder.decode(self.cache, self.tokens, position, position + 1)
        logits = self.decoder.logits(self.cache, hidden)
        half = len(logits) // 2
        return sample_index(guide(logits[:half], logits[half:], scale), self.random[:, position])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    step: Callable[[Tensor, int, float], Tensor], tokens: Tensor, position: int, clock: Callable[[], float]
) -> float:
    """The time of one guided decode step."""
    _wait(tokens.device)
    begun = clock()
    step(tokens, position, SCALE)
    _wait(tokens.device)
    return (clock() - begun) * 1e3


def speed(size: str, batches: list[int], rounds: int, device: torch.device, clock: Callable[[], float]) -> None:
    """Prints a table of decode steps, for each batch and way."""
    torch.manual_seed(0)
    config = load(find_recipe(f"generator_{size.lower()}"), GeneratorRecipe).generator
    generator = Generator(GeneratorConfig(transformer=config)).eval().to(device)
    model = generator.transformer
    assert isinstance(model, Transformer)
    head = model.get_submodule("head").get_parameter("weight")
    torch.nn.init.normal_(head, std=0.02)  # a fresh head of zeros would make every draw the same
    half = torch.bfloat16
    kinds: dict[str, tuple[str, torch.dtype | None]] = {"float32": ("plain", None)}
    if device.type == "cuda":
        kinds |= {"bf16": ("plain", half), "bf16, graph": ("graph", half), "bf16, compiled": ("compiled", half)}
    else:
        kinds |= {"packed": ("packed", None), "packed bf16": ("packed", half), "int8": ("int8", None)}
    print(f"model {size}, {TOKENS} tokens, guidance on, {torch.get_num_threads()} threads, {clock.__name__}, {device}")
    print(
        f"{'batch':>5} {'way':<16} {'ms a step':>10} {'images/s':>9} {'x plain':>8}  (least to most, {rounds} rounds)"
    )
    for batch in batches:
        labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)]).to(device)
        tokens = torch.zeros(2 * batch, dtype=torch.long, device=device)
        ways: dict[str, Plain | Fast] = {"the plain way": Plain(model, labels)}
        ways |= {name: Fast(Decoder(model, *kind), labels, clock) for name, kind in kinds.items()}
        for way in ways.values():
            for position in POSITIONS:
                way.step(tokens, position, SCALE)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            each = {
                name: [milliseconds(way.step, tokens, position, clock) for position in POSITIONS]
                for name, way in ways.items()
            }
            for name, way in ways.items():
                once = way.once * 1e3 if isinstance(way, Fast) else 0.0
                times[name].append(statistics.median(each[name]) + once)
        for name in ways:
            ratios = [plain / own for plain, own in zip(times["the plain way"], times[name], strict=True)]
            step = statistics.median(times[name])
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(
                f"{batch:>5} {name:<16} {step:>10.1f} {batch / step / TOKENS * 1e3:>9.3f} "
                f"{statistics.median(ratios):>8.2f}  {spread}",
                flush=True,
            )
    if device.type == "cuda":
        _floor(model, device)


def _floor(model: Any, device: torch.device) -> None:
    """Prints how long the weights of one step take to stream in bf16, modulation left out."""
    modulation = sum(block.modulation.weight.numel() + block.modulation.bias.numel() for block in model.blocks)
    modulation += model.modulation.weight.numel() + model.modulation.bias.numel()
    touched = sum(parameter.numel() for parameter in model.parameters()) - modulation
    touched -= model.tokens.weight.numel() + model.classes.weight.numel()  # a row of each is read
    name = torch.cuda.get_device_name(device)
    for known, bandwidth in BANDWIDTH.items():
        if known in name:
            floor = 2 * touched / bandwidth * 1e3
            print(f"weights of a step in bf16: {2 * touched / 1e6:.0f} MB, {floor:.2f} ms on {known}")


def quality(folder: str, images: int) -> None:
    """Prints what int8 and wavefronts cost on a trained generator, in bits of its own likelihood."""
    generator: Any = load_generator(folder)
    config = generator.config.transformer
    labels = torch.arange(images) % config.classes
    plain = generator.sample(labels, seed=1)

    def bits(tokens: Tensor) -> float:
        with torch.no_grad():
            return float(generator(tokens, labels).nll.mean()) / math.log(2)

    print(f"{folder}: {images} images sampled without guidance have {bits(plain):.4f} bits a token")
    print(f"int8: the same images have {generator.extra_bits(plain, labels, 'int8'):+.4f} bits a token")
    other = generator.sample(labels, seed=1, implementation="int8")
    same = (other == plain).flatten(1).all(1).float().mean().item()
    print(f"int8: {same:.0%} of images are token for token the same; its own have {bits(other):.4f} bits")
    for window in sorted({1, 2, config.columns // 2, config.columns}):
        if window < 1:
            continue
        steps = config.columns + (config.rows - 1) * window
        wave = generator.sample(labels, seed=1, window=window)
        print(f"wavefront, window {window}: {steps} steps instead of {config.tokens}, {bits(wave):.4f} bits a token")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="B", choices=["B", "L", "XL", "XXL"])
    parser.add_argument("--batches", default="1,8", help="images at once, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--generator", help="a trained generator: measure what int8 and wavefronts cost instead")
    parser.add_argument("--peer", type=Path, help="a checkout of LlamaGen: its sampler beside ours, on the CPU")
    parser.add_argument("--out", type=Path, default=results.PAGE, help="with --peer: figures go beside it as .json")
    parser.add_argument("--images", type=int, default=64, help="with --generator")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.generator:
        quality(arguments.generator, arguments.images)
        return
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.peer:
        from benchmarks import samplers

        samplers.run(arguments, batches, CLOCKS[arguments.clock])
        return
    speed(arguments.size, batches, arguments.rounds, torch.device(arguments.device), CLOCKS[arguments.clock])
