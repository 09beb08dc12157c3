"""Masked autoregression over continuous tokens with a diffusion head (MAR, https://arxiv.org/abs/2406.11838)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lexel.generators.blocks import Block, call
from lexel.generators.flow.network import FinalLayer, TimeEmbedding, modulate

if TYPE_CHECKING:
    from lexel.generators.continuous.generator import ContinuousConfig


class MaskedEncoderDecoder(nn.Module):
    """Visible tokens through an encoder, all positions through a decoder: a vector z for each position.

    Args:
        config: sizes of both, of tokens, and of the buffer of copies of the condition before them.
    """

    def __init__(self, config: "ContinuousConfig") -> None:
        super().__init__()
        width, (decoder_width, decoder_layers, decoder_heads) = config.width, config.decoder
        self.buffer = config.buffer
        length = config.length + config.buffer
        self.z_proj = nn.Linear(config.token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.norm_eps) for _ in range(config.layers)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, config.mlp_ratio, config.norm_eps) for _ in range(decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=config.norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.length, decoder_width))

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


class ResidualBlock(nn.Module):
    """A modulated MLP with a residual, for rows (N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)  # (N, C) each
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class DenoisingMLP(nn.Module):
    """Noised tokens (N, D), steps (N,) and conditions z (N, Z) to noise and variance (N, 2D), token by token."""

    def __init__(self, config: "ContinuousConfig") -> None:
        super().__init__()
        channels, width = config.token_channels, config.head_width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(config.decoder[0], width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.head_layers))
        self.final_layer = FinalLayer(width, 2 * channels)

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
