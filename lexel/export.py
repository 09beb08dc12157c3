"""Tokenizers for other programs: torch.export and ONNX files, and the shape that diffusers expects of a VQModel."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lexel import __version__
from lexel.checkpoint import atomic
from lexel.errors import UsageError, unknown
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
        _need_onnx()
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
    channels = tokenizer.config.autoencoder.channels
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


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"export to ONNX needs the package {error.name}; pip install 'lexel[export]'") from None


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
        example = torch.zeros(2, tokenizer.config.autoencoder.channels, *size)
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


class Latents(NamedTuple):
    """What `encode` gives: unlike a tokenizer of ours, latents before quantization."""

    latents: Tensor  # (B, D, h, w)


class Sample(NamedTuple):
    """What `decode` gives."""

    sample: Tensor  # (B, 3, H, W)
    commit_loss: Tensor


@dataclass(frozen=True)
class VQModelConfig:
    """The options that pipelines read from `vqvae.config`."""

    latent_channels: int
    num_vq_embeddings: int
    vq_embed_dim: int
    block_out_channels: tuple[int, ...]  # as many as resolutions: pipelines derive the downsampling from their number
    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    lookup_from_codebook: bool = True
    norm_type: str = "group"
    force_upcast: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class DiffusersVQModel(nn.Module):
    """A tokenizer in the shape of diffusers' VQModel, for pipelines that take one as `vqvae`.

        pipeline = LDMPipeline(vqvae=DiffusersVQModel(tokenizer), unet=unet, scheduler=scheduler)

    `encode` gives latents before quantization. `decode` quantizes them first, unless `force_not_quantize` says that
    it is given codes, or with `shape` (batch, rows, columns, channels) indices.

    Args:
        tokenizer: any with one index a position.
        scaling_factor: what a pipeline multiplies latents with; 1 leaves them as they are.
        unit_range: whether images are in [0, 1], as pipelines over tokens (aMUSEd) have them, instead of [-1, 1].
    """

    def __init__(self, tokenizer: Tokenizer, scaling_factor: float = 1.0, unit_range: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.unit_range = unit_range
        quantizer = tokenizer.quantizer
        if tokenizer.downsampling is None:
            raise UsageError("diffusers' pipelines need tokens on a map; this tokenizer's tokens are 1-D")
        self.config = VQModelConfig(
            latent_channels=quantizer.codebook_dim,
            num_vq_embeddings=quantizer.codebook_size,
            vq_embed_dim=quantizer.codebook_dim,
            block_out_channels=(tokenizer.autoencoder.z_channels,) * tokenizer.downsampling.bit_length(),
            scaling_factor=scaling_factor,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tokenizer.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.encoder.parameters()).device

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Codes (B, D, h, w), a loss of 0, and at the end of the last the indices, flat."""
        indices = self.tokenizer.quantizer.assign(latents)
        codes = self.tokenizer.quantizer.indices_to_codes(indices)
        return codes, latents.new_zeros(()), (None, None, indices.flatten())

    def encode(self, x: Tensor, return_dict: bool = True) -> Latents | tuple[Tensor]:
        latents = self.tokenizer.latents(2 * x - 1 if self.unit_range else x)
        return Latents(latents) if return_dict else (latents,)

    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
    ) -> Sample | tuple[Tensor, Tensor]:
        if not force_not_quantize:
            codes = self.quantize(h)[0]
        elif shape is not None:
            codes = self.tokenizer.quantizer.indices_to_codes(h.long().reshape(tuple(shape)[:3]))
        else:
            codes = h
        images = self.tokenizer.decode_codes(codes)
        images = (images + 1) / 2 if self.unit_range else images
        loss = images.new_zeros(len(images))
        return Sample(images, loss) if return_dict else (images, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Sample | tuple[Tensor, Tensor]:
        return self.decode(self.tokenizer.latents(sample), return_dict=return_dict)
