"""The README shows code that runs."""

import re
from pathlib import Path

import torch

from lexel.autoencoders import VQGANConfig
from lexel.tokenizer import Tokenizer, TokenizerConfig

ROOT = Path(__file__).parents[1]


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
