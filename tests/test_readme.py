"""What the README and the documents show is true: the code runs, the commands and recipes exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from lexel.autoencoders import VQGANConfig
from lexel.cli import app
from lexel.config import find_recipe
from lexel.tokenizer import Tokenizer, TokenizerConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.toml"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands() -> list[tuple[str, str]]:
    """Every `lexel ...` line of a code block, or of a recipe's head, with the page it stands on."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            match = re.match(r"^(?:#   |    |\$ )?(?:accelerate launch -m )?(lexel [a-z].*)$", line)
            if match:
                found.append((page.name, match[1].split("   #")[0].split("  #")[0].strip()))
    return found


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"width": 8, "multipliers": [1, 1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    network = VQGANConfig(**sizes, groups=4)
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    Tokenizer(TokenizerConfig(autoencoder=network, quantizer=quantizer)).save_pretrained("runs/demo/tokenizer")
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1].replace("16384", "64"), names)
    assert isinstance(names["images"], torch.Tensor)
    assert names["images"].shape == (1, 3, 32, 32)


def test_there_are_commands_to_check():
    assert len(commands()) > 20


@pytest.mark.parametrize("page, line", commands())
def test_every_command_shown_exists_with_its_options(page, line):
    words = shlex.split(re.split(r" [|>&] ", line)[0])
    command = COMMANDS.get(words[1])
    assert command is not None, line
    options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in words[2:]:
        if word.startswith("--"):
            assert word.split("=")[0] in {*options, "--help"}, f"{page}: {line}"
    if words[1] == "train":
        assert find_recipe(ROOT / words[2] if "/" in words[2] else words[2]).is_file(), f"{page}: {line}"
