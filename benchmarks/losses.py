"""The same small training with other losses: reconstruction, a judge that was no teacher, probe, a generator's bits.

    python -m benchmarks losses --data photographs --out runs/losses

`--data` is a folder with train/CLASS/ and validation/CLASS/. Rows that are finished are not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import commit, machine
from lexel.codec import Codec
from lexel.config import check, read
from lexel.data import TRANSFORMS
from lexel.data.tokens import TokenSet
from lexel.evaluate import evaluate_tokenizer, probe
from lexel.run_folder import RunFolder
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer
from lexel.train import train
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.recipes import TokenizerRecipe

TABLE = Path(__file__).with_name("losses.toml")
FIGURES = Path(__file__).with_suffix(".json")  # the rows of docs/losses.md
JUDGE = "efficientnet_lite2"  # the teacher of these rows is efficientnet_lite0


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--data", required=True, help="folder with train/CLASS and validation/CLASS")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of losses.json")
    parser.add_argument("--rows", help="names of rows, comma-separated; all of them by default")
    parser.add_argument("--images", type=int, default=400, help="held-out images that the metrics are taken over")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")


def run(arguments: argparse.Namespace) -> None:
    """Trains and measures each row in turn, and writes losses.json after each."""
    torch.set_num_threads(1)
    table = read(TABLE)
    page = arguments.out / "losses.json"
    found: dict[str, Any] = json.loads(page.read_text()) if page.is_file() else {}
    for name in arguments.rows.split(",") if arguments.rows else table["rows"]:
        key = f"{name}-{arguments.seed}"
        if key in found.get("rows", {}):
            continue
        began = time.process_time()
        values = measure(table, name, arguments)
        values["cpu_seconds"] = round(time.process_time() - began)
        rows = found.get("rows", {}) | {key: values}
        found = {"commit": commit(), "machine": machine("cpu", 1), "images": arguments.images, "rows": rows}
        page.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(key, json.dumps(values), flush=True)


def measure(table: dict[str, Any], name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one row."""
    folder = arguments.out / f"{name}-{arguments.seed}"
    recipe = merged(table["base"], table["rows"][name])
    recipe["data"]["source"] = arguments.data
    recipe["train"]["seed"] = arguments.seed
    if "init" in recipe:
        recipe["init"]["source"] = str(arguments.out / f"{recipe['init']['source']}-{arguments.seed}" / "tokenizer")
    if not train(check(recipe, TokenizerRecipe, name), folder / "tokenizer", device="cpu").finished:
        raise SystemExit(f"{name} was stopped; the same command goes on")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    validation = RunFolder.read(folder / "tokenizer").last_lines("validation")[-1]
    result = evaluate_tokenizer(
        tokenizer,
        arguments.data,
        split="validation",
        metrics=["psnr", "lpips", "frechet"],
        network=JUDGE,
        limit=arguments.images,
        batch_size=50,
        device="cpu",
    )
    codec = Codec(tokenizer, runtime("cpu"), TRANSFORMS["published"](recipe["data"]["size"]), batch_size=64)
    sets: dict[str, TokenSet] = {}
    for split in ("train", "validation"):
        tokens = codec.encode(arguments.data, folder / split, split)
        assert tokens is not None
        sets[split] = tokens
    probed = probe(sets["train"], sets["validation"], tokenizer=tokenizer, device="cpu")
    rows, columns = sets["train"].grid
    generator = {**table["generator"], "codebook_size": tokenizer.codebook_size, "rows": rows, "columns": columns}
    data = {"tokens": str(folder / "train"), "validation": str(folder / "validation")}
    learned = {"generator": generator, "data": data, "train": table["generator_train"] | {"seed": arguments.seed}}
    train(check(learned, GeneratorRecipe, name), folder / "generator", device="cpu")
    bits = RunFolder.read(folder / "generator").last_lines("validation")[-1]
    kept = {key: value for key, value in result["metrics"].items() if value is not None}
    return {
        **kept,
        "usage": validation["usage"],
        "perplexity": validation["perplexity"],
        "probe": probed["metrics"],
        "bits_per_token": bits["bits_per_token"],
        "histogram_bits": bits.get("histogram_bits"),
    }


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A table with another one's values; weights and sections of losses are replaced, not joined."""
    result = dict(base)
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(base.get(name), dict) and name != "weights"
        result[name] = merged(base[name], value) if inner else value
    return {name: dict(value) if isinstance(value, dict) else value for name, value in result.items()}


def section(figures: dict[str, Any]) -> list[str]:
    """The table of docs/losses.md, with what each row adds to the recipe."""
    lines = ["| row | PSNR, dB | LPIPS (VGG) | Fréchet, Lite2 | codes in use | probe | bits per token |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for key, row in figures["rows"].items():
        values = [f"{row['psnr']:.2f}", f"{row['lpips_vgg']:.3f}", f"{row[f'fd_{JUDGE}']:.0f}", f"{row['usage']:.0%}"]
        values += [f"{row['probe']['accuracy']:.1%}", f"{row['bits_per_token']:.2f}"]
        name, seed = key.rsplit("-", 1)
        lines.append(f"| `{name}`{'' if seed == '0' else f', seed {seed}'} | " + " | ".join(values) + " |")
    return lines
