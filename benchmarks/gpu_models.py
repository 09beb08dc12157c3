"""The parts of `python -m benchmarks gpu` that run whole models."""

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import milliseconds
from lexel.config import find_recipe, load
from lexel.data.tokens import TokenBatch
from lexel.generators import Generator, GeneratorConfig, NetworkConfig, NextTokenConfig
from lexel.generators.next_token.decoding import Decoder
from lexel.networks.vgg16 import VGG16
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.generator import Learner as GeneratorLearner
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import Learner

Save = Callable[[str, Any], None]
TOKENS = 256


def _random_vgg(name: str, path: Any = None) -> dict[str, torch.Tensor]:
    """Weights of LPIPS drawn at random: time and memory do not depend on them, and no file is needed."""
    heads = {f"heads.{number}": torch.rand(width) for number, width in enumerate(VGG16.TAP_WIDTHS)}
    return {**VGG16().state_dict(), **heads}


def _learner(recipe: str, device: str, *overrides: str) -> Learner:
    loaded = load_recipe(recipe, list(overrides))
    assert isinstance(loaded, TokenizerRecipe)
    with mock.patch("lexel.losses.perceptual.pretrained.load", _random_vgg):
        return Learner(loaded, Tokenizer(loaded.model), Processes(device, loaded.train.precision))


def step(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """The paper's recipes: a step with LPIPS, discriminator, optimizer and averages, on random images."""
    small = ["model.autoencoder.width=32", "model.autoencoder.residual_blocks=1"] if arguments.tiny else []
    side = 32 if arguments.tiny else 256
    sizes = (64, 128) if arguments.tiny else (16384, 262144)
    dot = "model.quantizer.codebook_size"
    cases = {
        f"IBQ, {sizes[0]}": ("ibq_16384", [f"{dot}={sizes[0]}"]),
        f"IBQ, {sizes[1]}": ("ibq_262144", [f"{dot}={sizes[1]}"]),
        f"IBQ, {sizes[1]}, float32 products": ("ibq_262144", [f"{dot}={sizes[1]}", "model.quantizer.products=float32"]),
    }
    for size in sizes:
        vq = f"model.quantizer={{kind='vq', codebook_size={size}, codebook_dim=256}}"
        terms = [f"train.weights.{term}=none" for term in ("quantization", "entropy_sample", "entropy_batch")]
        cases[f"VQ, {size}"] = ("ibq_16384", [vq, *terms])
    batches = (4,) if arguments.tiny else (24, 8)
    for batch, (name, (recipe, overrides)) in product(batches, cases.items()):
        torch.manual_seed(0)
        learner = _learner(recipe, device, *small, *overrides)
        images = torch.rand(batch, 3, side, side) * 2 - 1

        once = partial(learner.step, images, True, 1.0)
        time_ = milliseconds(once, device, 2 if arguments.tiny else 9, 1 if arguments.tiny else 3)
        figures: dict[str, Any] = {"ms": round(time_, 2), "images/s": round(batch / time_ * 1e3, 1)}
        if device == "cuda":
            figures["peak MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
            if batch == 8:
                figures |= waits(once)
            torch.cuda.reset_peak_memory_stats()
        save(f"batch {batch}, {side} px: {name}", figures)
        del learner, once
        if device == "cuda":
            torch.cuda.empty_cache()


def waits(job: Callable[[], Any]) -> dict[str, Any]:
    """How often a call waits for the device, and where; how many kernels it launches."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        job()
    torch.cuda.set_sync_debug_mode("default")
    synchronising = [entry for entry in seen if "synchroniz" in str(entry.message)]
    places: dict[str, int] = {}
    for entry in synchronising:
        place = f"{Path(entry.filename).name}:{entry.lineno}"
        places[place] = places.get(place, 0) + 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time for event in on_device) / 1e3
    return {"waits": len(synchronising), "where": places, "kernels": len(on_device), "ms in kernels": round(busy, 1)}


def sampling(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """A decode step of each size, recorded as a graph in bf16, beside the time to read the weights it needs."""
    sizes: dict[str, NetworkConfig] = {"tiny": NextTokenConfig(layers=2, heads=2, width=64)}
    if not arguments.tiny:
        sizes = {
            size: load(find_recipe(f"generator_{size.lower()}"), GeneratorRecipe).generator
            for size in ("B", "L", "XL", "XXL")
        }
    half = torch.bfloat16
    read = 0.0
    if device == "cuda":
        weights = torch.empty(2**31, dtype=torch.uint8, device=device).view(torch.int64)
        read = weights.nbytes / milliseconds(weights.max, device) / 1e9  # TB/s of reading alone
        del weights
        save("reading, TB/s", round(read, 3))
    for size, config in reversed(sizes.items()):
        with torch.device(device):
            generator = Generator(GeneratorConfig(transformer=config)).to(half).eval()
        torch.nn.init.normal_(generator.transformer.head.weight, std=0.02)
        ways = {"bf16, triton": ("triton", half), "bf16, graph": ("graph", half), "bf16, plain": ("plain", half)}
        if size == "B":
            ways["bf16, compiled"] = ("compiled", half)
        if device != "cuda":
            ways = {"float32, plain": ("plain", torch.float32)}
        touched = sum(parameter.numel() for parameter in generator.parameters())
        for block in generator.transformer.blocks:
            touched -= block.modulation.weight.numel()
        touched -= generator.transformer.tokens.weight.numel() + generator.transformer.classes.weight.numel()
        floor = 2 * touched / read / 1e9 if read else None
        for batch in (1, 8, 64) if not arguments.tiny else (1,):
            labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)]).to(device)
            tokens = torch.zeros(2 * batch, TOKENS, dtype=torch.long, device=device)
            for name, (implementation, dtype) in ways.items():
                if (name in ("bf16, plain", "bf16, compiled") and batch > 1) or (batch == 64 and "triton" in name):
                    continue
                decoder = Decoder(generator.transformer, implementation, dtype)
                once = partial(_positions, decoder, decoder.start(labels, TOKENS), tokens)
                time_ = milliseconds(once, device, 7, 2) / 4
                figures: dict[str, Any] = {"ms": round(time_, 3), "tokens/s": round(batch / time_ * 1e3)}
                if floor is not None:
                    figures |= {"weights read, ms": round(floor, 3), "times that": round(time_ / floor, 2)}
                save(f"{size}, batch {batch} with guidance: {name}", figures)
                del decoder, once
        if device == "cuda" and size == "XXL":
            _cuts(save, generator)
        if device == "cuda" and size in ("B", "XXL"):
            labels = torch.arange(32, device=device)
            generator.sample(labels, 2.0, seed=1)
            torch.cuda.synchronize()
            begun = time.monotonic()
            generator.sample(labels, 2.0, seed=2)
            torch.cuda.synchronize()
            save(f"{size}: 32 images with guidance, images/s", round(32 / (time.monotonic() - begun), 2))
        del generator
        if device == "cuda":
            torch.cuda.empty_cache()


def _cuts(save: Save, generator: Generator) -> None:
    """The decode step with its products cut in several ways: the fastest belongs into `triton_block.CUT`."""
    from lexel.generators.next_token import triton_block

    own = triton_block.CUT
    labels = torch.tensor([0, 1000], device="cuda")
    tokens = torch.zeros(2, TOKENS, dtype=torch.long, device="cuda")
    for cut in ((16, 256, 4, 4), (16, 1024, 8, 3), (16, 1024, 4, 3), (16, 512, 8, 3), (32, 512, 8, 3)):
        triton_block.CUT = cut
        decoder = Decoder(generator.transformer, "triton", torch.bfloat16)
        once = partial(_positions, decoder, decoder.start(labels, TOKENS), tokens)
        save(f"XXL, batch 1 with guidance: bf16, triton, cut {cut}", round(milliseconds(once, "cuda", 7, 2) / 4, 3))
    triton_block.CUT = own


def _positions(decoder: Decoder, cache: Any, tokens: torch.Tensor) -> None:
    """Four decode steps, with short and long caches."""
    for position in (40, 104, 168, 250):
        decoder.logits(cache, decoder.decode(cache, tokens, position, position + 1))


def learning(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """A training step of each size on random tokens, under the recipe's precision, on one device."""
    cases = {"b": 32, "l": 32, "xl": 16, "xxl": 8}
    for size, batch in cases.items():
        overrides = ["train.fsdp=false"]
        if arguments.tiny:
            overrides += ["generator.layers=2", "generator.width=64", "generator.heads=2"]
            batch = 2
        recipe = load_recipe(f"generator_{size}", overrides)
        assert isinstance(recipe, GeneratorRecipe)
        with torch.device(device):
            generator = Generator(GeneratorConfig(transformer=recipe.generator))
        learner = GeneratorLearner(recipe.train, generator, Processes(device, recipe.train.precision))
        numbers = torch.arange(batch)
        tokens = torch.randint(recipe.generator.codebook_size, (batch, 16, 16))
        data = TokenBatch(tokens, numbers % 1000, numbers)

        once = partial(learner.step, data, 1e-4, 0.05)
        time_ = milliseconds(once, device, 1 if arguments.tiny else 5, 2)
        count = sum(parameter.numel() for parameter in generator.parameters())
        flop = 6 * count * batch * TOKENS * (4 / 3 if recipe.train.checkpointing else 1)
        figures: dict[str, Any] = {
            "ms": round(time_, 1),
            "images/s": round(batch / time_ * 1e3, 1),
            "TFLOP/s of its weights": round(flop / time_ / 1e9, 1),
        }
        if device == "cuda":
            figures["peak MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
            torch.cuda.reset_peak_memory_stats()
        save(f"{size.upper()}, {count / 1e6:.0f}M parameters, batch {batch}", figures)
        del learner, generator, once
        if device == "cuda":
            torch.cuda.empty_cache()
        if arguments.tiny:
            break


def _lexel(*words: str) -> float:
    """Seconds of a command."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lexel", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lexel {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - begun


def bulk(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """Pictures through the network alone, and through `lexel encode` and `lexel evaluate` as a user calls them."""
    side, batch = (32, 8) if arguments.tiny else (256, 64)
    recipe = load_recipe("tiny" if arguments.tiny else "ibq_16384")
    assert isinstance(recipe, TokenizerRecipe)
    tokenizer = Tokenizer(recipe.model).to(device).eval()
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    half = device == "cuda"

    @torch.no_grad()
    def encode() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            tokenizer.encode(images)

    save("network alone, encode, images/s", round(batch / milliseconds(encode, device, 5, 2) * 1e3, 1))
    if not arguments.data:
        return
    model = arguments.out / "untrained"
    tokenizer.save_pretrained(model)
    precision = ["--precision", "bf16"] if half else []
    workers, size = ["--workers", "0" if arguments.tiny else "14"], ["--size", str(side)]
    split = ["--split", "validation"]
    common = ["--batch-size", str(batch), *precision, *workers, *size, *split]
    tokens = arguments.out / "tokens"
    seconds = _lexel("encode", str(model), arguments.data, "--out", str(tokens), *common)
    count = sum(path.is_file() for path in (Path(arguments.data) / "validation").rglob("*"))
    save("lexel encode, start-up included", {"s": round(seconds, 1), "images": count})
    metrics = ["--metric", "psnr", "--metric", "ssim", "--metric", "usage"]
    seconds = _lexel("evaluate", str(model), "--data", arguments.data, *common, *metrics)
    save("lexel evaluate, psnr, ssim, usage, start-up included", {"s": round(seconds, 1), "images": count})
    shutil.rmtree(model)
    shutil.rmtree(tokens)


def training(save: Save, device: str, arguments: argparse.Namespace) -> None:
    """A tokenizer on photographs at 64 px, as long as it may; its report and its numbers."""
    if not arguments.data:
        save("training", "needs --data")
        return
    run = arguments.out / "photographs"
    batch = 8 if arguments.tiny else 64
    fixed = [f"data.source={arguments.data}", f"train.batch_size={batch}", "train.lpips=alex"]
    if arguments.tiny:
        fixed += ["model.autoencoder.width=32", "model.autoencoder.residual_blocks=1", "data.workers=0"]
        fixed += ["train.precision=float32", "model.quantizer.codebook_size=64"]
    else:
        fixed += ["model.quantizer.codebook_size=16384", "data.workers=14", "train.validation_images=1024"]
    trial = _words([*fixed, "train.validation_images=64"], 6 if arguments.tiny else 150, validations=1)
    begun = time.monotonic()
    _lexel("train", "folder_64", "--out", str(run) + "-trial", *trial)
    seconds = time.monotonic() - begun
    speeds = [json.loads(line) for line in _log(Path(str(run) + "-trial"))]
    speed = max(line.get("images_per_second", 0) for line in speeds)
    save("trial", {"s": round(seconds, 1), "images/s": round(speed)})
    shutil.rmtree(str(run) + "-trial")
    steps = 6 if arguments.tiny else max(100, int((arguments.train_seconds - 30) * 0.8 * speed / batch))
    begun = time.monotonic()
    _lexel("train", "folder_64", "--out", str(run), *_words(fixed, steps))
    lines = [json.loads(line) for line in _log(run)]
    last = [line for line in lines if line.get("kind") == "validation"][-1:]
    save("training", {"steps": steps, "batch": batch, "s": round(time.monotonic() - begun, 1), "last": last})


def _words(fixed: list[str], steps: int, validations: int = 6) -> list[str]:
    every = max(1, steps // validations)
    timed = [f"train.steps={steps}", f"train.validate_every={every}", f"train.save_every={steps}"]
    timed += [f"train.discriminator.start={steps // 3}", f"train.schedule.warm_up={steps // 20}", "train.log_every=50"]
    return [word for option in fixed + timed for word in ("--set", option)]


def _log(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
