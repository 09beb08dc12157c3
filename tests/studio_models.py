"""Small models and a run in a folder, for the tests of the studio: made in a moment, good for nothing else."""

import json
from pathlib import Path

from safetensors.numpy import save_file

from lexel.autoencoders import VQGANConfig
from lexel.generators import Generator, read_config
from lexel.studio.pictures import drawings
from lexel.tokenizer import Tokenizer, TokenizerConfig


def tiny(quantizer=None) -> Tokenizer:
    sizes = {"width": 8, "multipliers": [1, 1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    table = quantizer or {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    return Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes, groups=4), quantizer=table))


def result(psnr: float, images: int = 24, name: str = "lexel", error: float = 0.2) -> dict:
    """A result as `lexel evaluate --json` writes it."""
    return {
        "kind": "reconstruction",
        "metrics": {"psnr": psnr, "lpips_vgg": 0.5 - psnr / 100, "usage": 0.75},
        "intervals": {"psnr": {"low": psnr - error, "high": psnr + error, "standard_error": error / 1.96}},
        "warnings": [],
        "protocol": {"name": name},
        "network": None,
        "data": {"images": images, "fingerprint": f"{images:064x}"},
        "tokenizer": "ab" * 32,
        "tokens": {"bits": 640.0},
        "machine": "a processor, 1 thread, torch 2",
        "versions": {"lexel": "0.1.0", "commit": "0123456789ab"},
    }


def make_results(home: Path) -> list[Path]:
    """Writes two results on one scale, one on another, and the folder of a comparison."""
    files = {"small": result(17.5), "large": result(21.25), "elsewhere": result(30.0, images=100)}
    for name, found in files.items():
        (home / f"{name}.json").write_text(json.dumps(found))
    row = {"quantizer": "ibq", "codebook_size": 16, "codebook_dim": 4, "bits": 64.0}
    row |= {"psnr": {"mean": 18.0, "deviation": 0.25, "values": [17.75, 18.25]}}
    (home / "compared").mkdir()
    (home / "compared" / "compare.json").write_text(json.dumps({"rows": [row], "runs": [{}, {}]}))
    return [*(home / f"{name}.json" for name in files), home / "compared"]


def make_models(home: Path) -> Path:
    """Writes a and b (residual), tokenizers; generator; run, a run of a."""
    a = tiny()
    a.save_pretrained(home / "a", {"size": 16})
    tiny({"kind": "residual", "codebook_size": 8, "codebook_dim": 4}).save_pretrained(home / "b", {"size": 16})
    network = {"kind": "next_token", "codebook_size": 16, "rows": 4, "columns": 4, "classes": 3}
    network |= {"layers": 1, "heads": 2, "width": 16}
    table = {"transformer": network, "tokenizer": a.fingerprint(), "class_names": ["cat", "dog", "owl"]}
    Generator(read_config(table, "the test")).save_pretrained(home / "generator", tokenizer=a)
    run = home / "run"
    run.mkdir()
    a.save_pretrained(run, {"size": 16})
    (run / "recipe.toml").write_text(
        '[model]\nquantizer = { kind = "ibq", codebook_size = 16, codebook_dim = 4 }\n[train]\nsteps = 20\n'
    )
    lines = [{"step": step, "kind": "train", "seconds": 1.0, "loss": 1 / step} for step in (10, 20)]
    lines.append({"step": 20, "kind": "validation", "seconds": 1.0, "usage": 0.1, "perplexity": 1.2, "psnr": 12.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "snapshots").mkdir()
    pictures = drawings(4, 16)
    save_file({"originals": pictures, "reconstructions": pictures}, run / "snapshots" / "00000020.safetensors")
    return home
