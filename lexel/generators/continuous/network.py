"""Masked autoregression over continuous tokens with a diffusion head (MAR, https://arxiv.org/abs/2406.11838)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lexel.generators.blocks import Block, call
from lexel.generators.flow.network import FinalLayer, TimeEmbedding


class MaskedEncoderDecoder(nn.Module):
    """Visible tokens through an encoder, all positions through a decoder: a vector z for each position.

    Args:
        tokens: number of tokens of an image, T.
        channels: length of a token, D.
        encoder_width, encoder_depth, encoder_heads: size of the encoder.
        decoder_width, decoder_depth, decoder_heads: size of the decoder.
        mlp_ratio: hidden width of the MLPs by their width.
        buffer: copies of the condition before the tokens.
        norm_eps: epsilon of the blocks' norms.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        encoder_width: int,
        encoder_depth: int,
        encoder_heads: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.buffer = buffer
        length = tokens + buffer
        self.z_proj = nn.Linear(channels, encoder_width)
        self.z_proj_ln = nn.LayerNorm(encoder_width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_width))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_width, encoder_heads, mlp_ratio, norm_eps) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_width, eps=norm_eps)
        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, mlp_ratio, norm_eps) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, decoder_width))

    def initialise(self) -> None:
        """Sets every initial value: normals of 0.02 for embeddings, Xavier for linear layers."""
        for name, parameter in self.named_parameters():
            if name.endswith(("embed_learned", "mask_token")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(
        self,
        tokens: Tensor,
        visible: Tensor,
        condition: Tensor,
        run: Callable[..., Tensor] = call,
        layers: int | None = None,
    ) -> Tensor:
        """Encodes the visible tokens.

        Args:
            tokens: (B, T, D); what stands at hidden positions is not looked at.
            visible: positions of the visible tokens, int64 (B, V).
            condition: (B, width).
            run: calls a block: a place to recompute activations.
            layers: states after so many blocks, before the last norm; the encoder's output by default.

        Returns:
            (B, buffer + V, width).
        """
        x = self.z_proj(tokens)  # (B, T, C)
        x = torch.cat([condition[:, None].expand(-1, self.buffer, -1).to(x.dtype), x], 1)  # (B, buffer + T, C)
        x = rows_at(self.z_proj_ln(x + self.encoder_pos_embed_learned), self._kept(visible))  # (B, buffer + V, C)
        for block in self.encoder_blocks[:layers]:
            x = run(block, x)
        return x if layers is not None else cast(Tensor, self.encoder_norm(x))

    def decode(self, encoded: Tensor, visible: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        """A vector z for each position: (B, T, decoder width)."""
        embedded = self.decoder_embed(encoded)
        length = self.decoder_pos_embed_learned.shape[1]
        x = self.mask_token.to(embedded.dtype).expand(len(embedded), length, -1)
        x = x.scatter(1, self._kept(visible)[..., None].expand_as(embedded), embedded)
        x = x + self.decoder_pos_embed_learned  # (B, buffer + T, C)
        for block in self.decoder_blocks:
            x = run(block, x)
        return cast(Tensor, self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned)  # (B, T, C)

    def forward(self, tokens: Tensor, visible: Tensor, condition: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        return self.decode(self.encode(tokens, visible, condition, run), visible, run)

    def _kept(self, visible: Tensor) -> Tensor:
        """Positions in the sequence of the buffer and the visible tokens: (B, buffer + V)."""
        buffer = torch.arange(self.buffer, device=visible.device).expand(len(visible), -1)
        return torch.cat([buffer, visible + self.buffer], 1)


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """The rows of x (B, T, C) at positions (B, V): (B, V, C)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """A modulated MLP with a residual, for rows (N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)  # (N, C) each
        return x + gate * self.mlp(_modulate(self.in_ln(x), shift, scale))


class RowOutput(FinalLayer):
    """The last, modulated layer for rows (N, C)."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class DenoisingMLP(nn.Module):
    """Noised tokens (N, D), steps (N,) and conditions z (N, Z) to noise and variance (N, 2D), token by token."""

    def __init__(self, channels: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = RowOutput(width, 2 * channels)

    def initialise(self) -> None:
        """Sets every initial value: blocks and output start as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.time_embed.initialise()
        for part in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, noised: Tensor, step: Tensor, z: Tensor) -> Tensor:
        x = self.input_proj(noised)  # (N, C)
        condition = self.time_embed(step) + self.cond_embed(z)  # (N, C)
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)  # (N, 2D)
