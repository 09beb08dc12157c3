"""Bidirectional transformers that fill in masked tokens: TiTok's BERT and U-ViT, and MAGE's encoder and decoder.

Each takes the tokens of images, number K (the codebook's size) where a token is masked, and a condition, and gives
logits of every token. Positions are learned, so a grid may have any shape.
"""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.generators.network import ConditionedNetwork

if TYPE_CHECKING:
    from lexel.generators.masked import MaskedConfig


class Attention(nn.Module):
    """Self-attention over all positions.

    Args:
        width: channels.
        heads: how many divide the width.
        bias: whether queries, keys and values have biases.
        dropout: of the output; `attention_dropout` of the weights.
    """

    def __init__(self, width: int, heads: int, bias: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, heads, 3, T, head_dim)
        q, k, v = qkv.unbind(2)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out: Tensor = self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        return out


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        out: Tensor = self.dropout(self.fc2(F.gelu(self.fc1(x))))
        return out


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with a skip, from a linear layer over both."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        attention_dropout: float,
        bias: bool,
        epsilon: float,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, heads, bias, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if self.skip is not None and skipped is not None:
            x = self.skip(torch.cat([x, skipped], -1))
        x = x + self.attention(self.norm1(x))
        return x + cast(Tensor, self.feed_forward(self.norm2(x)))


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x)): BERT's (https://arxiv.org/abs/1810.04805)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, True, dropout, attention_dropout)
        self.norm1 = nn.LayerNorm(width, 1e-12)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norm2 = nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.norm1(x + self.attention(x))
        return cast(Tensor, self.norm2(x + self.feed_forward(x)))


class Bidirectional(ConditionedNetwork):
    """The base of the networks: embeddings of K codes and the mask, learned positions, initial values."""

    blocks: nn.ModuleList

    def __init__(self, config: "MaskedConfig") -> None:
        super().__init__(config, config.width)
        self.tokens = nn.Embedding(config.codebook_size + 1, config.width)  # the last row is the mask's
        self.positions = nn.Parameter(torch.zeros(self.condition.length + config.tokens, config.width))
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def initialise(self) -> None:
        """Every matrix, embedding and position from a normal distribution of 0.02, cut at two deviations; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)

    def embed(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Rows of the condition, then the tokens', with their positions: (B, L + T, C)."""
        rows = self.condition(self.condition.drop(condition))
        return torch.cat([rows, self.tokens(tokens)], 1) + self.positions

    def entered(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """The first block's input, (B, L + T, C): `embed` and what the network does to it."""
        return cast(Tensor, self.dropout(self.embed(tokens, condition)))

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int) -> Tensor:
        """States (B, T, C) of tokens (B, T) after so many of `blocks`."""
        x = self.entered(tokens, condition)
        for block in self.blocks[:layers]:
            x = self.run(block, x)
        return x[:, -tokens.shape[1] :]

    @property
    def best_layers(self) -> int:
        """After how many of `blocks` states tell most of an image: about half-way between tokens and tokens."""
        return (len(self.blocks) + 1) // 2

    def forward(self, tokens: Tensor, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Logits (B, T, K) for tokens (B, T) in [0, K], K where masked, and a checked condition (B, ...).

        Args:
            dropped: bool (B, T), as many in each row: tokens that an encoder does not see; only MAGE has one.
        """
        raise NotImplementedError


class Bert(Bidirectional):
    """TiTok's smaller generators: BERT with norms after the branches (https://arxiv.org/abs/2406.07550)."""

    def __init__(self, config: "MaskedConfig") -> None:
        super().__init__(config)
        sizes = (config.width, config.heads, config.hidden, config.dropout, config.attention_dropout)
        self.types = nn.Embedding(2, config.width)  # BERT's two kinds of sentence; images are of the first
        self.norm = nn.LayerNorm(config.width, 1e-12)
        self.blocks = nn.ModuleList(PostNormBlock(*sizes) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.codebook_size)
        self.initialise()

    def entered(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.norm(self.embed(tokens, condition) + self.types.weight[0])))

    def forward(self, tokens: Tensor, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.head(self.hidden(tokens, condition, len(self.blocks))))  # (B, T, K)


class UViT(Bidirectional):
    """TiTok-S's generator: a U-ViT, whose later blocks see the earlier ones' outputs (arXiv 2209.12152)."""

    def __init__(self, config: "MaskedConfig") -> None:
        super().__init__(config)
        half = config.layers // 2
        sizes = (config.width, config.heads, config.hidden, config.dropout, config.attention_dropout, False, 1e-5)
        self.blocks = nn.ModuleList(PreNormBlock(*sizes) for _ in range(half + 1))  # the last is the middle one
        self.out_blocks = nn.ModuleList(PreNormBlock(*sizes, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.width, 1e-5)
        self.head = nn.Linear(config.width, config.codebook_size)
        self.initialise()

    @property
    def best_layers(self) -> int:
        return len(self.blocks)  # the last is the middle one

    def forward(self, tokens: Tensor, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        x = self.entered(tokens, condition)  # (B, L + T, C)
        skipped: list[Tensor] = []
        for block in self.blocks:
            x = self.run(block, x)
            skipped.append(x)
        skipped.pop()  # the middle block's
        for block in self.out_blocks:
            x = self.run(block, x, skipped.pop())
        return cast(Tensor, self.head(self.norm(x)[:, -tokens.shape[1] :]))  # (B, T, K)


class MAGE(Bidirectional):
    """MAGE (https://arxiv.org/abs/2211.09117): an encoder of the tokens that are kept, a small decoder of all.

    In training the encoder does not see the dropped tokens. The decoder is given the encoder's output at the
    condition's last row wherever a token is masked, and predicts by comparing with the tokens' own vectors.
    """

    def __init__(self, config: "MaskedConfig") -> None:
        super().__init__(config)
        width, narrow, dropout = config.width, config.decoder_width, config.dropout
        encoder = (width, config.heads, config.hidden, dropout, config.attention_dropout, True, config.norm_eps)
        hidden = config.decoder_hidden or 4 * narrow
        decoder = (narrow, config.decoder_heads, hidden, dropout, config.attention_dropout, True, config.norm_eps)
        self.embedding_norm = nn.LayerNorm(width, 1e-6)
        self.blocks = nn.ModuleList(PreNormBlock(*encoder) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.to_decoder = nn.Linear(width, narrow)
        self.decoder_positions = nn.Parameter(torch.zeros_like(self.positions[:, :1]).repeat(1, narrow))
        self.decoder_blocks = nn.ModuleList(PreNormBlock(*decoder) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(narrow, config.norm_eps)
        self.to_vectors = nn.Linear(narrow, width)
        self.vector_norm = nn.LayerNorm(width, 1e-5)
        self.bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.initialise()
        nn.init.trunc_normal_(self.decoder_positions, std=0.02, a=-0.04, b=0.04)

    @property
    def best_layers(self) -> int:
        return len(self.blocks)  # the encoder, which learns for its states' sake

    def entered(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.embedding_norm(self.embed(tokens, condition))))

    def encode(self, tokens: Tensor, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Hidden states (B, L + kept, C) of the condition and of the tokens that are not dropped."""
        x = self.entered(tokens, condition)
        if dropped is not None:
            kept = F.pad(~dropped, (self.condition.length, 0), value=True)
            x = x[kept].view(len(x), -1, x.shape[-1])
        for block in self.blocks:
            x = self.run(block, x)
        return cast(Tensor, self.norm(x))

    def forward(self, tokens: Tensor, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        length = self.condition.length
        x = self.to_decoder(self.encode(tokens, condition, dropped))
        hidden = F.pad(tokens == self.config.codebook_size, (length, 0), value=False)  # (B, L + T)
        filler = x[:, length - 1, None]  # (B, 1, D)
        if dropped is None:
            whole = x
        else:  # each kept token back to its place
            kept = F.pad(~dropped, (length, 0), value=True)
            whole = filler.expand(-1, hidden.shape[1], -1).masked_scatter(kept[..., None], x)
            hidden = hidden | ~kept
        x = torch.where(hidden[..., None], filler, whole) + self.decoder_positions
        for block in self.decoder_blocks:
            x = self.run(block, x)
        vectors = self.vector_norm(F.gelu(self.to_vectors(self.decoder_norm(x)[:, -tokens.shape[1] :])))
        codes = self.tokens.weight[: self.config.codebook_size].detach()  # no gradient this way, as published
        return F.linear(vectors, codes.to(vectors.dtype), self.bias)  # (B, T, K)


NETWORKS: dict[str, type[Bidirectional]] = {"bert": Bert, "uvit": UViT, "mage": MAGE}
