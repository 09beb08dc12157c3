"""The transformer that predicts the next token of an image, given its condition.

Three published networks are choices of it: IBQ's (https://arxiv.org/abs/2412.02692), Llama blocks whose norms are
scaled and shifted by the class; LlamaGen's (https://arxiv.org/abs/2406.06525), where the class is the start token and
nothing more; and Open-MAGVIT2's (https://arxiv.org/abs/2409.04410) for vocabularies too large for one head: every token
is a pair of sub-tokens, and a small second transformer predicts the pair. VQGAN's plain GPT
(https://arxiv.org/abs/2012.09841) is another: its blocks, with learned positions.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.generators.network import ConditionedNetwork
from lexel.generators.next_token.blocks import EPSILON, Block, ConditionalBlock, GPTBlock, RMSNorm, rope_table
from lexel.generators.next_token.config import NextTokenConfig
from lexel.generators.next_token.heads import FactorisedHead, Head, PlainHead


class Transformer(ConditionedNetwork):
    """Logits of every token given those before it and the condition.

    The condition's rows come first, then the tokens. Where it modulates (`config.adaptive`), the scales, shifts and
    gates of every block, and of the last norm, are linear in it.
    """

    norm: RMSNorm | nn.LayerNorm
    blocks: nn.ModuleList
    modulation: nn.Linear | None
    learned_positions: nn.Parameter | None  # (L + T - 1, C), the last token is no input; None with rotary ones

    config: NextTokenConfig

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__(config, config.width)
        self.prediction: Head = FactorisedHead(config) if config.factorised else PlainHead(config)
        width, heads, dropout = config.width, config.heads, config.dropout
        self.dropout = nn.Dropout(dropout)
        gpt = config.network == "gpt"
        self.norm = nn.LayerNorm(width, EPSILON) if gpt else RMSNorm(width)

        self.prediction.add_inputs(self)
        block = GPTBlock if gpt else ConditionalBlock if config.adaptive else Block
        self.blocks = nn.ModuleList(block(width, heads, dropout) for _ in range(config.layers))
        rows = self.condition.length + config.tokens - 1
        self.register_parameter("learned_positions", nn.Parameter(torch.zeros(rows, width)) if gpt else None)
        self.modulation = nn.Linear(width, 2 * width) if config.adaptive else None  # of the last norm
        self.prediction.add_outputs(self)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Every matrix and embedding N(0, 0.02), biases 0; branches almost closed, output layers 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.modulation is not None:
            for block in self.blocks:
                modulation = cast(ConditionalBlock, block).modulation
                modulation.weight[: 2 * self.config.width].mul_(self.config.gamma_init)  # the gates of both branches
                modulation.weight[2 * self.config.width :].mul_(0.5)
            self.modulation.weight.mul_(0.5)
        for output in self.prediction.outputs(self):
            output.weight.zero_()

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """The sizes of the sub-vocabularies."""
        return self.prediction.vocabularies

    def positions(self, like: Tensor) -> Tensor:
        """The rotary table of all positions, condition first, on the device of `like`, in at least float32.

        A GPT has vectors instead, (L + T - 1, C), which are added to its inputs.

        A class has cosine and sine 0, so that its query and key vanish: everything attends to it with logit 0.
        Published weights need this. The rows of a caption are not turned.
        """
        if self.learned_positions is not None:
            return self.learned_positions.to(like.dtype)
        config = self.config
        table = rope_table(config.shape, config.width // config.heads, like.device)
        before = self._unturned(table, self.condition.length, 1.0 if self.condition.rotated else 0.0)
        return torch.cat([before, table]).to(torch.promote_types(like.dtype, torch.float32))

    def pair_positions(self, like: Tensor) -> Tensor:
        """The rotary table of a token's own transformer: hidden state and first sub-token, (2, head_dim / 2, 2)."""
        table = rope_table(self.config.shape, self.config.width // self.config.heads, like.device)
        pair = torch.cat([self._unturned(table, 1, 0.0), self._unturned(table, 1, 1.0)])
        return pair.to(torch.promote_types(like.dtype, torch.float32))

    @staticmethod
    def _unturned(table: Tensor, rows: int, cosine: float) -> Tensor:
        angles = table.new_zeros(rows, *table.shape[1:])
        angles[..., 0] = cosine
        return angles

    def inputs(self, indices: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Inputs of the blocks, from indices (B, T) and a checked condition (B, ...).

        Returns:
            x (B, L + T - 1, C), its positions, the condition's rows (B, L, C), and what the head needs of the tokens.
        """
        rows = self.condition(self.condition.drop(condition))  # (B, L, C)
        tokens, first = self.prediction.inputs(self, indices)  # (B, T - 1, C)
        x = torch.cat([rows, tokens], 1)  # (B, L + T - 1, C)
        rope = self.positions(x)[: x.shape[1]]
        return self.dropout(x if self.learned_positions is None else x + rope), rope, rows, first

    def states(
        self, indices: Tensor, condition: Tensor, layers: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """States after so many blocks, all by default: at each token's place, of the condition and the tokens before.

        Returns:
            the states (B, T, C), the vector (B, 1, C) that modulates, and what the head needs of the tokens.
        """
        x, rope, rows, first = self.inputs(indices, condition)
        vector = None if self.modulation is None else self.condition.pooled(rows)
        for block in self.blocks[:layers]:
            x = self.run(block, x, rope) if vector is None else self.run(block, x, rope, vector)
        return x[:, rows.shape[1] - 1 :], vector, first

    def forward(self, indices: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, T, V) of each sub-vocabulary for indices (B, T) and a checked condition (B, ...)."""
        x, vector, first = self.states(indices, condition)
        if self.modulation is None or vector is None:
            return self.prediction.predict(self, x, first, self.norm)
        scale, shift = self.modulation(F.silu(vector)).chunk(2, -1)
        return self.prediction.predict(self, x, first, lambda x: self.norm(x) * (1 + scale) + shift)
