"""Tokenizers as programs that need no Lexel: torch.export and ONNX files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lexel import __version__
from lexel.checkpoint import atomic
from lexel.errors import optional, unknown
from lexel.tokenizer import Tokenizer

FORMATS = ("torch", "onnx")
LARGEST_SIDE = 1024  # of the grid of indices, in exported programs


def export(tokenizer: Tokenizer, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Writes an encoder (images to indices) and a decoder (indices to images) that need no Lexel.

    Both take any batch, and any size from two indices a side. The files are `encoder.pt2` and `decoder.pt2`
    (`torch.export.load`), `encoder.onnx` and `decoder.onnx` (opset 18; inputs `images` or `indices`), and
    `export.json` with what a user must know.

    Args:
        tokenizer: any but a residual or product one; exported in float32 on the CPU.
        folder: made if it does not exist.
        formats: of "torch" and "onnx".

    Returns:
        the files written.

    Raises:
        UsageError: a format is unknown, the onnx packages are missing, or the quantizer cannot be exported.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("export format", name, FORMATS)
    if "onnx" in formats:
        for package in ("onnx", "onnxscript"):
            optional(package, f"export to ONNX needs the package {package}; pip install 'lexel[export]'")
    folder = Path(folder)
    searcher = tokenizer.quantizer.searcher()
    modules = {"encoder": _Encoder(tokenizer, searcher), "decoder": _Decoder(tokenizer, searcher)}
    written = []
    for name, module in modules.items() if formats else ():
        program = _program(module, tokenizer)
        if "torch" in formats:
            with atomic(folder / f"{name}.pt2") as path:
                torch.export.save(program, path)
            written.append(folder / f"{name}.pt2")
        if "onnx" in formats:
            with atomic(folder / f"{name}.onnx") as path:
                _to_onnx(program, module, path)
            written.append(folder / f"{name}.onnx")
    sizes = tokenizer.autoencoder.sizes
    grid = "h, w" if tokenizer.autoencoder.axes == 2 else "N"
    channels = tokenizer.channels
    facts = {
        "lexel": __version__,
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.codebook_size,
        "downsampling": tokenizer.downsampling,
        "encoder": f"images float32 (B, {channels}, H, W) in [-1, 1], {sizes}, to int64 (B, {grid})",
        "decoder": f"indices int64 (B, {grid}) to images float32 (B, {channels}, H, W) in [-1, 1]",
    }
    with atomic(folder / "export.json") as path:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return [*written, folder / "export.json"]


class _Encoder(nn.Module):
    """Images to indices."""

    def __init__(self, tokenizer: Tokenizer, searcher: nn.Module) -> None:
        super().__init__()
        self.encoder, self.to_codes, self.searcher = tokenizer.encoder, tokenizer.to_codes, searcher

    def forward(self, images: Tensor) -> Tensor:
        return self.searcher.assign(self.to_codes(self.encoder(images)))  # type: ignore[operator]


class _Decoder(nn.Module):
    """Indices to images."""

    def __init__(self, tokenizer: Tokenizer, searcher: nn.Module) -> None:
        super().__init__()
        self.decoder, self.from_codes, self.searcher = tokenizer.decoder, tokenizer.from_codes, searcher

    def forward(self, indices: Tensor) -> Tensor:
        codes = self.searcher.indices_to_codes(indices)  # type: ignore[operator]
        return self.decoder(self.from_codes(codes)).clamp(-1, 1)


def _program(module: nn.Module, tokenizer: Tokenizer) -> ExportedProgram:
    """The module's graph for any batch and size."""
    batch, rows, columns = Dim("batch"), Dim("rows", min=2, max=LARGEST_SIDE), Dim("columns", min=2, max=LARGEST_SIDE)
    fixed, factor = tokenizer.autoencoder.fixed_size, tokenizer.downsampling
    size = fixed or tokenizer.image_size((3, 4))
    example: Tensor
    if isinstance(module, _Encoder):
        example = torch.zeros(2, tokenizer.channels, *size)
        dynamic: dict[str, Any] = {"images": {0: batch}}
        if fixed is None:
            dynamic["images"] |= {2: factor * rows, 3: factor * columns}
    else:
        example = torch.zeros(2, *tokenizer.grid(*size), dtype=torch.int64)
        dynamic = {"indices": {0: batch}}
        if fixed is None:
            dynamic["indices"] |= {1: rows, 2: columns}
    with torch.no_grad():
        return torch.export.export(module.eval(), (example,), dynamic_shapes=dynamic)


def _to_onnx(program: ExportedProgram, module: nn.Module, path: Path) -> None:
    names = ("images", "indices") if isinstance(module, _Encoder) else ("indices", "images")
    result = torch.onnx.export(program, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False)
    assert result is not None
    result.save(path, external_data=False)
