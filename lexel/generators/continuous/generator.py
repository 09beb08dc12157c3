"""Masked autoregression over latents: a diffusion head draws each token (MAR, https://arxiv.org/abs/2406.11838)."""

import math
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.generators.batch import SampleBatch
from lexel.generators.continuous.network import DenoisingMLP, MaskedEncoderDecoder, rows_at
from lexel.generators.flow.diffusion import Diffusion, cosine_betas, spaced_steps
from lexel.generators.latents import LatentConfig, LatentGenerator, normal
from lexel.generators.network import ConditionedNetwork, chosen_layers

STEPS = 1000  # of diffusion in training


class ContinuousConfig(LatentConfig):
    """The options of a masked autoregressive generator of latents.

    A token is a `patch` x `patch` square of latents. `width`, `layers` and `heads` are of the encoder and the decoder,
    which has `decoder_*` of its own where they differ. `head_width` and `head_layers` are of the network that denoises
    a token. `buffer` copies of the condition stand before the tokens. `mask_ratio_min` is the least share of tokens
    that training hides, and every image's tokens are denoised at `repeats` noise levels.
    """

    kind: Literal["continuous"] = "continuous"
    patch: int = Field(default=1, ge=1)
    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    decoder_width: int | None = Field(default=None, ge=1)
    decoder_layers: int | None = Field(default=None, ge=1)
    decoder_heads: int | None = Field(default=None, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    head_width: int = Field(default=1024, ge=1)
    head_layers: int = Field(default=6, ge=1)
    buffer: int = Field(default=64, ge=1)
    mask_ratio_min: float = Field(default=0.7, ge=0, le=1)
    repeats: int = Field(default=4, ge=1)
    norm_eps: float = Field(default=1e-6, gt=0)  # added to the variance in the norms of the blocks and after them

    @property
    def decoder(self) -> tuple[int, int, int]:
        """Width, layers and heads of the decoder."""
        return (
            self.decoder_width or self.width,
            self.decoder_layers or self.layers,
            self.decoder_heads or self.heads,
        )

    @property
    def length(self) -> int:
        """Tokens of the transformer: patches of latents."""
        return self.tokens // self.patch**2

    @property
    def token_channels(self) -> int:
        """Numbers of a token."""
        return self.channels * self.patch**2

    @model_validator(mode="after")
    def _consistent(self) -> "ContinuousConfig":
        width, _, heads = self.decoder
        if self.width % self.heads or width % heads:
            raise UsageError(
                f"widths must be multiples of heads, got {self.width} / {self.heads} and {width} / {heads}"
            )
        return self


class ContinuousOptions(Config):
    """Sampling options: `steps` of unmasking, and `diffusion_steps` of denoising for each token."""

    steps: int = Field(default=64, ge=1)
    diffusion_steps: int = Field(default=100, ge=1, le=STEPS)


class ContinuousNetwork(ConditionedNetwork):
    """Encoder, decoder, denoising head and condition."""

    def __init__(self, config: ContinuousConfig) -> None:
        super().__init__(config, config.width)
        self.network = MaskedEncoderDecoder(config)
        self.head = DenoisingMLP(config)
        self.network.initialise()
        self.head.initialise()
        if isinstance(self.condition, nn.Embedding):
            nn.init.normal_(self.condition.weight, std=0.02)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of encoder and decoder, for sharding and recomputation."""
        return [*self.network.encoder_blocks, *self.network.decoder_blocks]

    def forward(self, tokens: Tensor, visible: Tensor, vector: Tensor) -> Tensor:
        """A vector z for each position: (B, T, decoder width)."""
        return cast(Tensor, self.network(tokens, visible, vector, self.run))


class Continuous(LatentGenerator):
    """Latents token by token: a transformer says what belongs at hidden places, a diffusion head draws it.

    Args:
        config: of a `ContinuousConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = ContinuousConfig
    SampleOptions = ContinuousOptions
    settings: ContinuousConfig
    transformer: ContinuousNetwork

    @classmethod
    def build(cls, config: ContinuousConfig) -> nn.Module:
        return ContinuousNetwork(config)

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, rows, columns) as tokens (B, T, channels * patch^2), channel by channel."""
        side = self.settings.patch
        cut = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, r, p, c, q)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, channels * patch^2) as latents (B, channels, rows, columns)."""
        side, (rows, columns) = self.settings.patch, self.grid
        cut = tokens.unflatten(2, (-1, side, side)).unflatten(1, (rows // side, columns // side))  # (B, r, c, C, p, q)
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        network = self.transformer.network
        blocks = len(network.encoder_blocks)
        layers = chosen_layers(layers, blocks, blocks)  # the decoder works for the diffusion head
        latents = self.patchify(self.latents(tokens))  # (B, T, D)
        visible = torch.arange(latents.shape[1], device=latents.device).expand(len(latents), -1)
        vector = self.transformer.pooled(condition.to(latents.device))
        return network.encode(latents, visible, vector, layers=layers)[:, network.buffer :]

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`noise` and `variance`, the two terms of the diffusion loss over hidden tokens."""
        config = self.settings
        latents = self.patchify(self.latents(tokens))  # (B, T, D)
        orders = torch.rand(latents.shape[:2], device=latents.device).argsort(1)
        count = math.ceil(latents.shape[1] * _mask_ratio(config.mask_ratio_min))
        hidden, visible = orders[:, :count], orders[:, count:].sort(1).values
        z = self.transformer(latents, visible, self.transformer.pooled(condition.to(latents.device)))
        clean, wanted = (rows_at(x, hidden).flatten(0, 1).repeat(config.repeats, 1) for x in (latents, z))
        step = torch.randint(STEPS, (len(clean),), device=clean.device)
        terms = Diffusion(cosine_betas(STEPS)).losses(
            lambda noised, steps: self.transformer.head(noised, steps, wanted), clean, step, torch.randn_like(clean)
        )
        return {name: term.mean() for name, term in terms.items()}

    # ------------------------------------------------------------------------------------------ sampling

    def decisions(self, options: ContinuousOptions) -> int:
        return self.settings.length + 1  # a schedule of guidance runs over the number of tokens that are known

    def bytes_per_image(self, options: ContinuousOptions, dtype: torch.dtype | None, guided: bool) -> int:
        config = self.settings
        length, width = config.length + config.buffer, max(config.width, config.decoder[0])
        attention = length * length * max(config.heads, config.decoder[2])
        noise = 16 * (options.diffusion_steps + 1) * config.tokens * config.channels
        return 4 * (2 if guided else 1) * (12 * length * width + attention) + noise

    def _sample(self, batch: SampleBatch) -> Tensor:
        self.refuse_filters(batch)
        config = self.settings
        shape = (batch.options.diffusion_steps + 1, config.length, config.token_channels)
        noise = normal(batch.uniforms(1, math.prod(shape))).view(-1, *shape).to(self.dtype)
        orders = batch.uniforms(0, config.length).argsort(1)  # each image's own; what comes first stays hidden longest
        latents = noise.new_zeros(len(noise), config.channels, *self.grid)
        places = torch.zeros(len(noise), *self.grid, dtype=torch.bool, device=noise.device)
        latents, places = self.known(batch) or (latents, places)
        whole = self.patchify(places[:, None].expand(-1, config.channels, *self.grid)).all(2)  # patches all of it given
        given = whole.gather(1, orders)
        orders = orders.gather(1, given.long().argsort(dim=1, stable=True))  # hidden tokens first, then given ones
        hidden = (~given).sum(1)
        filled = self.patchify(latents)
        for count in hidden.unique().tolist():  # images with equally many hidden tokens go together
            rows = (hidden == count).nonzero()[:, 0]
            filled[rows] = self._fill(batch, rows, filled[rows], orders[rows], noise[rows], count)
        return self.sampled(batch, self.unpatchify(filled))

    def _fill(
        self, batch: SampleBatch, rows: Tensor, latents: Tensor, orders: Tensor, noise: Tensor, hidden: int
    ) -> Tensor:
        """Latents (N, T, D) of the images `rows` of a batch, with the first `hidden` tokens of their orders drawn."""
        network, length, steps = self.transformer, self.settings.length, batch.options.steps
        schedule = Diffusion(cosine_betas(STEPS)).respaced(spaced_steps(STEPS, batch.options.diffusion_steps))
        vectors = [network.vector(each[rows]) for each in batch.conditions]
        for number in range(steps):
            before, hidden = hidden, hidden_after(length, hidden, number, steps)
            if before == hidden:
                continue
            visible, drawn = orders[:, before:].sort(1).values, orders[:, hidden:before]
            z = [network(latents, visible, vector).flatten(0, 1) for vector in vectors]
            picked = drawn + length * torch.arange(len(rows), device=drawn.device)[:, None]
            z = [vector[picked.flatten()] for vector in z]  # (N drawn, decoder width) each
            own = noise.gather(2, drawn[:, None, :, None].expand(-1, noise.shape[1], -1, noise.shape[3]))
            own = own.transpose(0, 1).flatten(1, 2)  # (1 + diffusion steps, N drawn, D)
            scale = batch.scales[0][length - hidden]
            found = denoise(network.head, schedule, z, scale, own, batch.filters[0]["temperature"])
            latents = latents.scatter(
                1, drawn[..., None].expand(-1, -1, latents.shape[2]), found.view(*drawn.shape, -1)
            )
            batch.report((number + 1) / steps)
        return latents


def hidden_after(length: int, hidden: int, step: int, steps: int) -> int:
    """The number of `hidden` tokens left after a step of the cosine schedule over an image of `length`."""
    if step == steps - 1:
        return 0
    return min(hidden, max(1, min(hidden - 1, math.floor(length * math.cos(math.pi / 2 * (step + 1) / steps)))))


def denoise(
    head: DenoisingMLP, schedule: Diffusion, z: list[Tensor], scale: float, noise: Tensor, temperature: float
) -> Tensor:
    """Tokens (N, D) drawn from conditions z (N, width), the first of them guided away from the second if there is one.

    Args:
        head: the denoising network.
        schedule: its steps.
        z: the condition's vectors; then those of the null condition, with guidance.
        scale: of guidance.
        noise: standard normal, (1 + steps, N, D): where to start, and the noise of every step.
        temperature: scales the noise of the steps.
    """
    point = noise[0]
    for number, step in enumerate(reversed(range(len(schedule.steps)))):
        original = torch.full((len(point),), int(schedule.steps[step]), device=point.device)
        output, *null = (head(point, original, vector) for vector in z)
        if null:
            predicted, rest = output.chunk(2, 1)
            unguided = null[0].chunk(2, 1)[0]
            output = torch.cat([unguided + scale * (predicted - unguided), rest], 1)
        point = schedule.ancestral_step(output, point, step, noise[number + 1], temperature)
    return point


def _mask_ratio(least: float) -> float:
    """One draw of the share of hidden tokens: normal(1, 0.25), cut to [least, 1]."""
    low = torch.special.ndtr(torch.tensor((least - 1) / 0.25, dtype=torch.float64))
    uniform = low + torch.rand((), dtype=torch.float64) * (0.5 - low)
    return min(1.0, max(least, 1 + 0.25 * float(torch.special.ndtri(uniform))))
