"""TiTok and TA-TiTok: 1-D tokens, https://arxiv.org/abs/2406.07550 and https://arxiv.org/abs/2501.07730.

Facts of sizes, names and conventions are those of bytedance/1d-tokenizer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.autoencoders.base import Autoencoder, FixedSize
from lexel.autoencoders.first_tokens import FirstTokens, NestedConfig
from lexel.autoencoders.maskgit import Decoder as PixelDecoder
from lexel.autoencoders.maskgit import MaskGITConfig
from lexel.autoencoders.vision_transformer import Block, DividedSize, from_unit, to_unit
from lexel.checkpoint import load_strict
from lexel.config import Config
from lexel.errors import UsageError


class ProxyConfig(Config):
    """The tokenizer whose codes the decoder predicts (MaskGIT's, as published)."""

    codebook_size: int = Field(default=1024, ge=2)
    pixels: MaskGITConfig | None = None  # its decoder, which makes images of codes; the first stage has none


class TextConfig(Config):
    """The features of a text that guide the decoder."""

    length: int = Field(default=77, ge=1)  # positions of a text
    width: int = Field(default=768, ge=1)  # channels of its features


class TiTokConfig(FixedSize):
    """The sizes of TiTok's encoder and decoder; the defaults are those of TiTok-B-64 in one stage."""

    LATER = {**FixedSize.LATER, "nested": None}

    kind: Literal["titok"] = "titok"
    patch: int = Field(default=16, ge=1)  # pixels of a side of the patches that the transformers see
    tokens: int = Field(default=64, ge=1)  # 1-D tokens of an image
    encoder: DividedSize = DividedSize(width=768, depth=12, heads=12)
    decoder: DividedSize = DividedSize(width=768, depth=12, heads=12)
    head: Literal["pixels", "codes"] = "pixels"  # what the decoder gives: images, or codes of another tokenizer
    proxy: ProxyConfig | None = None  # that tokenizer, with head = "codes"
    text: TextConfig | None = None  # guides the decoder (TA-TiTok)
    # The first checkpoints read the encoder's (tokens, channels) numbers as (channels, tokens), without a transpose.
    scrambled: bool = False
    # Nested dropout: training keeps the first tokens of an image only, so that every prefix of them decodes (FlexTok,
    # https://arxiv.org/abs/2502.13967; One-D-Piece, https://arxiv.org/abs/2501.10064).
    nested: NestedConfig | None = None
    # Of the weights. "wide", which is not published, is Xavier's for all linear layers and patches, and a deviation of
    # 1 for positions and learned tokens (docs/studies/log.md).
    start: Literal["published", "wide"] = "published"

    @model_validator(mode="after")
    def _consistent(self) -> "TiTokConfig":
        if min(self.sides) < 1 or any(side % self.patch for side in self.sides):
            raise ValueError(f"patch = {self.patch} does not divide size = {self.size}")
        if (self.head == "codes") != (self.proxy is not None):
            raise ValueError("head = 'codes' and a table proxy go together: give both or neither")
        if self.nested is not None and self.nested.least > self.tokens:
            raise ValueError(f"nested.least = {self.nested.least} is more than tokens = {self.tokens}")
        if self.nested is not None and self.scrambled:
            raise ValueError("scrambled latents mix tokens, which nested dropout orders; leave one of them out")
        pixels = self.proxy.pixels if self.proxy is not None else None
        if pixels is not None and pixels.downsampling != self.patch:
            raise ValueError(
                f"proxy.pixels has {pixels.downsampling} pixels of a side for one code, and patch = {self.patch}; "
                f"they must be equal"
            )
        return self

    def identity(self) -> dict[str, Any]:
        table = super().identity()
        del table["start"]  # weights are the same however they started
        return table

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.sides[0] // self.patch, self.sides[1] // self.patch


class TiTok(Autoencoder):
    """TiTok's transformers: tokens in a row (1-D), for images of one size.

    Images (B, C, H, W) to latents (B, width, tokens), and back.

    With `head = "codes"` the decoder predicts another tokenizer's codes: `code_logits` has them. Images then are the
    other decoder's, of the expected code of each place (`proxy.pixels`); in the first stage of training there is none.

    Args:
        config: see `TiTokConfig`.
    """

    config_class = TiTokConfig
    axes = 1
    LOSS_WEIGHTS = {"proxy_codes": 1.0}  # cross-entropy of another tokenizer's codes, in the first stage of training
    config: TiTokConfig
    decoder: "Decoder"

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.z_channels = config.encoder.width
        self.proxy_codes: Callable[[Tensor], Tensor] | None = None  # images to the codes (B, h, w) to predict

    def predict_codes_of(self, codes: Callable[[Tensor], Tensor], codebook: Tensor, decoder: nn.Module) -> None:
        """Prepares the first stage of training: the decoder learns another tokenizer's codes.

        Args:
            codes: images (B, C, H, W) to that tokenizer's codes, int64 (B, h, w).
            codebook: its table (K, D), taken over and held as it is, as is
            decoder: its decoder.

        Raises:
            UsageError: this autoencoder predicts no codes, or those of another kind of tokenizer.
        """
        head = self.decoder.head
        if not isinstance(head, CodeHead) or head.pixels is None:
            raise UsageError("codes are predicted with autoencoder.head = 'codes' and a table autoencoder.proxy.pixels")
        if codebook.shape != head.codebook.shape:
            raise UsageError(
                f"autoencoder.proxy has codes of {tuple(head.codebook.shape)}, the other tokenizer "
                f"{tuple(codebook.shape)} (codebook_size, z_channels)"
            )
        load_strict(head.pixels, decoder.state_dict(), "the other tokenizer's decoder")
        with torch.no_grad():
            head.codebook.copy_(codebook)
        head.pixels.requires_grad_(False)
        head.codebook.requires_grad_(False)
        self.proxy_codes = codes

    def losses(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        if self.proxy_codes is None:
            return {}
        logits = self.code_logits(z).float()
        return {"proxy_codes": F.cross_entropy(logits, self.proxy_codes(images))}

    def code_logits(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits (B, K, h, w) of another tokenizer's codes from what the decoder takes, (B, width, tokens).

        Raises:
            UsageError: the decoder makes images without another tokenizer's codes.
        """
        if not isinstance(self.decoder.head, CodeHead):
            raise UsageError("this titok decoder gives pixels, not another tokenizer's codes (autoencoder.head)")
        return self.decoder.head.code_logits(self.decoder.features(z, text))

    @property
    def decoder_channels(self) -> int:
        return self.config.decoder.width

    @property
    def downsampling(self) -> None:
        return None

    @property
    def fixed_size(self) -> tuple[int, int]:
        return self.config.sides

    @property
    def prefixes(self) -> int | None:
        return None if self.config.nested is None else self.config.tokens

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.head.get_parameter(self.decoder.head.last)

    def grid(self, height: int, width: int) -> tuple[int]:
        if (height, width) != self.fixed_size:
            raise UsageError(f"images need {self.sizes}, got {height} x {width}")
        return (self.config.tokens,)

    def image_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        tokens = self.config.tokens
        if self.config.nested is not None and len(grid) == 1 and 1 <= grid[0] <= tokens:
            return self.fixed_size
        if tuple(grid) != (tokens,):
            count = tokens if self.config.nested is None else f"1 to {tokens}"
            raise UsageError(f"an image of this titok autoencoder has {count} tokens, got {tuple(grid)}")
        return self.fixed_size


class Encoder(nn.Module):
    """Images (B, C, H, W) to (B, width, tokens): patches and learned tokens through one transformer."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        size, (rows, columns) = config.encoder, config.patches
        self.scrambled = config.scrambled
        self.patches = nn.Conv2d(config.channels, size.width, config.patch, config.patch)
        self.class_token = nn.Parameter(scaled(1, size.width))
        self.positions = nn.Parameter(scaled(1 + rows * columns, size.width))  # of the class token and the patches
        self.tokens = nn.Parameter(scaled(config.tokens, size.width))
        self.token_positions = nn.Parameter(scaled(config.tokens, size.width))
        self.transformer = Transformer(size)
        STARTS[config.start](self)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(to_unit(images)).flatten(2).transpose(1, 2)  # (B, h w, C)
        batch, count, width = patches.shape
        image = torch.cat([self.class_token.expand(batch, 1, -1), patches], 1) + self.positions
        tokens = (self.tokens + self.token_positions).expand(batch, -1, -1)  # (B, N, C)
        latents = self.transformer(torch.cat([image, tokens], 1), slice(1 + count, None))  # (B, N, C)
        if self.scrambled:
            return latents.reshape(batch, width, -1)
        return latents.transpose(1, 2)  # (B, C, N)


class Decoder(nn.Module):
    """(B, width, tokens) to images (B, C, H, W), not clamped: tokens and mask tokens through one transformer."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        size, self.grid = config.decoder, config.patches
        self.class_token = nn.Parameter(scaled(1, size.width))
        self.positions = nn.Parameter(scaled(1 + self.grid[0] * self.grid[1], size.width))
        self.mask_token = nn.Parameter(scaled(1, size.width))
        self.token_positions = nn.Parameter(scaled(config.tokens, size.width))
        self.nested = None if config.nested is None else FirstTokens(config.tokens, size.width, config.nested)
        self.text, self.text_length = None, 0
        if config.text is not None:
            self.text_length = config.text.length
            self.text = nn.Linear(config.text.width, size.width)
            self.text_positions = nn.Parameter(scaled(config.text.length, size.width))
        self.transformer = Transformer(size)
        self.head: PixelHead | CodeHead
        self.head = PixelHead(config) if config.proxy is None else CodeHead(size.width, config.proxy)
        STARTS[config.start](self)
        if isinstance(self.head, PixelHead):  # pictures start grey; the published ones start black
            nn.init.dirac_(self.head.conv_out.weight)
            nn.init.constant_(self.head.conv_out.get_parameter("bias"), 0.5)

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        return self.head(self.features(z, text))

    def features(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """The head's input, (B, width, h, w), from latents (B, width, tokens) and features of a text (B, L, C)."""
        batch, count = z.shape[0], self.grid[0] * self.grid[1]
        if self.nested is not None:
            z = self.nested(z)
        image = torch.cat([self.class_token, self.mask_token.expand(count, -1)]) + self.positions
        parts = [image.expand(batch, -1, -1), z.transpose(1, 2) + self.token_positions]
        if self.text is not None:
            if text is None or text.dim() != 3 or text.shape[1:] != (self.text_length, self.text.in_features):
                given = "none" if text is None else tuple(text.shape)
                raise UsageError(
                    f"the decoder is guided by text: give features (B, {self.text_length}, {self.text.in_features}), "
                    f"got {given}"
                )
            parts.append(self.text(text) + self.text_positions)
        elif text is not None:
            raise UsageError("the decoder takes no text; autoencoder.text is not set")
        x = self.transformer(torch.cat(parts, 1), slice(1, 1 + count))  # (B, h w, C)
        return x.transpose(1, 2).unflatten(2, self.grid)


class Transformer(nn.Module):
    """Blocks between two layer normalizations, the last of a part of the positions only."""

    def __init__(self, size: DividedSize) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(Block(size, size.width // size.heads, True, F.gelu) for _ in range(size.depth))
        self.norm_out = nn.LayerNorm(size.width)

    def forward(self, x: Tensor, part: slice) -> Tensor:
        x = self.norm_in(x)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x[:, part])


class PixelHead(nn.Module):
    """(B, width, h, w) to images: each place a patch of pixels, then a 3x3 convolution."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, config.channels
        self.patches = nn.Conv2d(config.decoder.width, config.channels * config.patch**2, 1)
        self.conv_out = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.last = "conv_out.weight"

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        patches = self.patches(x).unflatten(1, (self.patch, self.patch, self.channels))  # (B, p, p, C, h, w)
        images = patches.permute(0, 3, 4, 1, 5, 2).reshape(
            x.shape[0], self.channels, rows * self.patch, columns * self.patch
        )
        return from_unit(self.conv_out(images))


class CodeHead(nn.Module):
    """(B, width, h, w) to images by way of another tokenizer's codes: logits, expected codes, its decoder."""

    def __init__(self, width: int, proxy: ProxyConfig) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(width, 2 * width, 1)
        self.logits = nn.Conv2d(2 * width, proxy.codebook_size, 1)
        self.pixels, self.last = None, "logits.weight"
        if proxy.pixels is not None:
            self.codebook = nn.Parameter(torch.randn(proxy.codebook_size, proxy.pixels.z_channels).mul_(0.02))
            self.pixels, self.last = PixelDecoder(proxy.pixels), "pixels.conv_out.weight"

    def code_logits(self, x: Tensor) -> Tensor:
        """Logits of the other tokenizer's codes: (B, K, h, w)."""
        return self.logits(self.hidden(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.pixels is None:
            raise UsageError(
                "the first stage of TiTok has no pixels: its decoder gives logits of another tokenizer's codes "
                "(autoencoder.code_logits); images need autoencoder.proxy.pixels and the weights for it"
            )
        expected = torch.einsum("bkhw,kd->bdhw", self.code_logits(x).softmax(1), self.codebook)
        return self.pixels(expected)


def scaled(*shape: int) -> Tensor:
    """Normal numbers of the published deviation, the inverse root of the width."""
    return torch.randn(*shape).mul_(shape[-1] ** -0.5)


def initialise(module: nn.Module) -> None:
    """The published start, but for the decoder that another tokenizer brings.

    Weights are truncated normals of deviation 0.02 and biases 0. Queries, keys and values are one matrix, Xavier's: the
    published layer holds it outside of the linear layers that are set.
    """
    if isinstance(module, PixelDecoder):
        return
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for part in module.children():
        initialise(part)
    if isinstance(module, Block):
        nn.init.xavier_uniform_(module.qkv.weight)


def start_wide(side: nn.Module) -> None:
    """As published, then Xavier for every linear layer and the patches, and positions and tokens of deviation 1."""
    initialise(side)
    for name, part in side.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        elif name == "patches":
            nn.init.xavier_uniform_(part.get_parameter("weight").flatten(1))
    for name, parameter in side.named_parameters(recurse=False):
        if name.endswith(("positions", "tokens", "token")):
            nn.init.normal_(parameter)


STARTS: dict[str, Callable[[nn.Module], None]] = {"published": initialise, "wide": start_wide}
