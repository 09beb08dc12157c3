"""The tokenizer: images to indices and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lexel import __version__, autoencoder, checkpoint, quantizers
from lexel.autoencoder import AutoencoderConfig
from lexel.config import Config, check
from lexel.errors import UsageError
from lexel.quantizers import Quantized


class TokenizerConfig(Config):
    """An autoencoder and the quantizer in its middle."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    quantizer: dict[str, Any] = {"kind": "ibq", "codebook_size": 16384, "codebook_dim": 256}  # kind and its options
    projections: bool = True  # 1x1 convolutions between autoencoder and codes; without them the widths must agree


class Reconstruction(NamedTuple):
    """What a tokenizer makes of images, with gradients."""

    images: Tensor  # (B, 3, H, W), not clamped
    quantized: Quantized


class Tokenizer(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to indices (B, h, w), and back. H and W are any multiples of `downsampling`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    LARGEST = 10.0  # values beyond this are no images in [-1, 1], however sharply resized

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or TokenizerConfig()
        self.provenance: dict[str, Any] = {}  # where the weights come from, as `save_pretrained` was told
        options = dict(self.config.quantizer)
        if "kind" not in options:
            raise UsageError(f"the quantizer needs a kind; choose from {', '.join(sorted(quantizers.QUANTIZERS))}")
        # The network first: a seed then gives it the same start under every quantizer.
        self.encoder, self.decoder = autoencoder.build(self.config.autoencoder)
        self.quantizer = quantizers.build(options.pop("kind"), options)
        z_channels, dim = self.config.autoencoder.z_channels, self.quantizer.codebook_dim
        if not self.config.projections and z_channels != dim:
            raise UsageError(f"without projections z_channels must be the codes' dimension {dim}, got {z_channels}")
        self.to_codes = nn.Conv2d(z_channels, dim, 1) if self.config.projections else nn.Identity()
        self.from_codes = nn.Conv2d(dim, z_channels, 1) if self.config.projections else nn.Identity()

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def downsampling(self) -> int:
        """How many pixels of a side one index stands for."""
        return self.config.autoencoder.downsampling

    def latents(self, images: Tensor) -> Tensor:
        """The encoder's result before quantization: (B, D, h, w), at least float32."""
        z = self.encoder(images.to(self._dtype))
        # Neighbouring codes differ by little: autocast must not round what decides between them.
        with torch.autocast(z.device.type, enabled=False):
            z = self.to_codes(z.to(self._dtype))
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def decode_codes(self, z_q: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, from quantized latents (B, D, h, w); differentiable."""
        images = self.decoder(self.from_codes(z_q.to(self._dtype)))
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def forward(self, images: Tensor) -> Reconstruction:
        """Images (B, 3, H, W) in [-1, 1] through the vocabulary and back, with gradients and loss terms."""
        self._check_images(images)
        quantized = self.quantizer(self.latents(images))
        return Reconstruction(self.decode_codes(quantized.z_q), quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The index of every latent: int64 (B, h, w), or (B, Q, h, w) for quantizers with Q books.

        Raises:
            UsageError: images are not float (B, 3, H, W) with sides divisible by `downsampling`, or clearly not
                in [-1, 1].
        """
        self._check_images(images)
        largest = images.abs().max().item() if images.numel() else 0.0
        if not largest <= self.LARGEST:  # NaN included
            raise UsageError(f"images must be in [-1, 1], got values up to {largest:g}; bytes become x / 127.5 - 1")
        with self._evaluating():
            return self.quantizer.assign(self.latents(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images (B, 3, H, W) clamped to [-1, 1] from indices (B, h, w).

        Raises:
            UsageError: indices are not integers of that shape in [0, codebook_size).
        """
        books = getattr(self.quantizer, "books", None)  # residual and product quantizers have several
        if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
            raise UsageError(f"indices must be integers, got {indices.dtype}")
        shape = "(B, h, w)" if books is None else f"(B, {books}, h, w)"
        if indices.dim() != (3 if books is None else 4) or (books is not None and indices.shape[1] != books):
            raise UsageError(f"indices must be {shape}, got {tuple(indices.shape)}")
        indices = indices.long()
        if indices.numel():
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= self.codebook_size:
                wrong = low if low < 0 else high
                raise UsageError(f"indices must be in [0, {self.codebook_size}), got {wrong}")
        with self._evaluating():
            return self.decode_codes(self.quantizer.indices_to_codes(indices)).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`.

        Args:
            folder: made if it does not exist.
            provenance: where the weights come from (recipe, step, source file), kept in `config.json`.
        """
        config = {
            "model": "tokenizer",
            "lexel": __version__,
            **self.config.model_dump(mode="json"),
            "provenance": dict(provenance or {}),
        }
        checkpoint.save_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """A tokenizer in evaluation mode, from a folder or a hub id; `provenance` says where it comes from.

        Raises:
            UsageError: the folder is not there, not whole, or holds something else.
        """
        return cls.from_folder(source, *checkpoint.load_folder(source))

    @classmethod
    def from_folder(cls, source: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """A tokenizer from the two parts of a model folder; `source` names it in errors."""
        table = {name: value for name, value in config.items() if name not in ("model", "lexel", "provenance")}
        if config.get("model") != "tokenizer":
            raise UsageError(f"{source} holds a {config.get('model', 'model of another library')}, not a tokenizer")
        tokenizer = cls.with_weights(check(table, TokenizerConfig, f"{source}/config.json"), tensors, source)
        tokenizer.provenance = dict(config.get("provenance", {}))
        return tokenizer

    @classmethod
    def with_weights(cls, config: TokenizerConfig, tensors: Mapping[str, Tensor], source: str | Path) -> Self:
        """A tokenizer in evaluation mode that takes over `tensors`, so that nothing is held twice."""
        with torch.device("meta"):
            tokenizer = cls(config)
        checkpoint.load_strict(tokenizer, tensors, source)
        if any(buffer.is_meta for buffer in tokenizer.buffers()):  # tables that are computed, never saved
            options = dict(config.quantizer)
            computed = quantizers.build(options.pop("kind"), options)
            for name, module in computed.named_modules():
                for buffer in module._non_persistent_buffers_set:
                    setattr(tokenizer.quantizer.get_submodule(name), buffer, getattr(module, buffer))
        return tokenizer.eval()

    def fingerprint(self) -> str:
        """Names these weights in token sets and result files: the same for equal weights, whatever their history."""
        return checkpoint.fingerprint(self.config.model_dump(mode="json"), self.state_dict())

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def _check_images(self, images: Tensor) -> None:
        factor = self.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
            raise UsageError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if images.shape[2] % factor or images.shape[3] % factor:
            raise UsageError(
                f"images must be (B, 3, H, W) with H and W multiples of {factor}, got {tuple(images.shape)}"
            )
        if not images.dtype.is_floating_point:
            raise UsageError(
                f"images must be floating-point in [-1, 1], got {images.dtype}; bytes become x / 127.5 - 1"
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while, whatever mode each part was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
