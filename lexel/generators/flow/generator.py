"""Flow and diffusion over latents: DiT (https://arxiv.org/abs/2212.09748) and SiT (https://arxiv.org/abs/2401.08740).

Latents are those of a continuous tokenizer, or the vectors of codes, as VQGAN-LC (https://arxiv.org/abs/2406.11837)
generates on its codebook.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel.config import Config
from lexel.errors import UsageError
from lexel.generators.batch import SampleBatch
from lexel.generators.flow.diffusion import Diffusion, ddim_steps, linear_betas, spaced_steps
from lexel.generators.flow.guidance import ProjectedGuidance
from lexel.generators.flow.network import DiffusionTransformer
from lexel.generators.flow.times import training_times
from lexel.generators.flow.transport import SDE, Transport, solve_ode, solve_sde
from lexel.generators.latents import LatentConfig, LatentGenerator
from lexel.generators.network import ConditionedNetwork, chosen_layers

STEPS = 1000  # of diffusion in training


class FlowConfig(LatentConfig):
    """The options of a diffusion transformer.

    `objective` is `flow` (SiT: a path from noise to latents) or `diffusion` (DiT: noise is predicted, with its variance
    if `learned_variance`). `path`, `prediction`, `weighting`, `times` and `stratified` belong to `flow`; the last two
    say where on the path training looks, and whether every batch covers the whole of it. `learned_variance` doubles the
    output's channels, as in every released DiT; `flow` does not use the second half, which the released SiT has all the
    same.
    """

    kind: Literal["flow"] = "flow"
    objective: Literal["flow", "diffusion"] = "flow"
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    stratified: bool = False
    learned_variance: bool = False
    patch: int = Field(default=2, ge=1)
    width: int = Field(default=768, ge=4)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "FlowConfig":
        if len(self.shape) != 2:
            raise UsageError(f"a flow generator needs rows and columns of latents; the grid is {self.shape}")
        if self.shape[0] % self.patch or self.shape[1] % self.patch:
            raise UsageError(f"patch = {self.patch} does not divide the grid {self.shape}")
        if self.width % self.heads or self.width % 4:
            raise UsageError(f"width must be a multiple of 4 and of heads, got {self.width} and {self.heads} heads")
        if self.objective == "diffusion":
            idle = self.changed(("path", "prediction", "weighting", "times", "stratified"))
            if idle:
                raise UsageError(f'{", ".join(idle)} reach nothing with objective = "diffusion"; leave them out')
        elif self.prediction == "velocity" and self.weighting != "none":
            raise UsageError('weighting reaches nothing with prediction = "velocity"; leave it out')
        return self


class FlowOptions(Config):
    """Sampling options of a flow generator.

    `steps` are evaluations of the network on a path (a Heun or midpoint step takes two); 50 for flow and 250 for
    diffusion by default. `method` is `euler`, `heun` or `midpoint` for the ODE of a flow and `sde` for its
    Euler-Maruyama sampler; `ddpm` or `ddim` for diffusion. `guided_channels` guides only the first so many channels:
    3 is what the released code of DiT and SiT does. `guidance = "projected"` guides as `ProjectedGuidance` does.
    """

    steps: int | None = Field(default=None, ge=2)
    method: Literal["euler", "heun", "midpoint", "sde", "ddpm", "ddim"] | None = None
    guided_channels: int | None = Field(default=None, ge=1)
    guidance: Literal["plain", "projected"] = "plain"


class FlowNetwork(ConditionedNetwork):
    """The diffusion transformer and its condition."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config, config.width)
        self.network = DiffusionTransformer(config)
        self.network.initialise()
        if isinstance(self.condition, nn.Embedding):
            nn.init.normal_(self.condition.weight, std=0.02)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, for sharding and recomputation."""
        return self.network.blocks

    def forward(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Outputs (B, outputs, h, w) for noised latents, times (B,) and vectors (B, width) of the condition."""
        return self.network(latents, time, condition, self.run)


class Flow(LatentGenerator):
    """Latents from noise, by a learned velocity field or by learned denoising.

    Args:
        config: of a `FlowConfig`.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    Config = FlowConfig
    SampleOptions = FlowOptions
    settings: FlowConfig
    transformer: FlowNetwork

    @classmethod
    def build(cls, config: FlowConfig) -> nn.Module:
        return FlowNetwork(config)

    @property
    def transport(self) -> Transport:
        """The path that `flow` follows."""
        config = self.settings
        return Transport(config.path, config.prediction, config.weighting)

    def losses(self, tokens: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """`flow`: the squared error of the prediction; or `noise` and, if it is learned, `variance` of diffusion."""
        config, latents = self.settings, self.latents(tokens)
        vector = self.transformer.pooled(condition.to(latents.device))
        noise = torch.randn_like(latents)
        if config.objective == "diffusion":
            step = torch.randint(STEPS, (len(latents),), device=latents.device)
            terms = Diffusion(linear_betas(STEPS)).losses(
                lambda z, steps: self.transformer(z, steps, vector), latents, step, noise
            )
            return {name: term.mean() for name, term in terms.items()}
        transport = self.transport
        low, high = transport.interval(transport.training_margin)
        uniform = torch.rand(len(latents), device=latents.device, dtype=latents.dtype)
        time = training_times(uniform, config.times, config.stratified) * (high - low) + low
        predict = lambda z, t: self.transformer(z, t, vector)[:, : config.channels]  # noqa: E731
        return {"flow": transport.loss(predict, latents, noise, time).mean()}

    def hidden(self, tokens: Tensor, condition: Tensor, layers: int | None = None) -> Tensor:
        network, latents = self.transformer.network, self.latents(tokens)
        layers = chosen_layers(layers, len(network.blocks))
        end = 0.0  # the time at which there is no noise, or hardly any
        if self.settings.objective == "flow":
            end = self.transport.interval(self.transport.sampling_margin)[1]
        time = latents.new_full((len(latents),), end)
        vector = self.transformer.pooled(condition.to(latents.device))
        return network.states(latents, network.modulation(time, vector), layers=layers)

    # ------------------------------------------------------------------------------------------ sampling

    def decisions(self, options: FlowOptions) -> int:
        return 1  # one scale for the whole path

    def bytes_per_image(self, options: FlowOptions, dtype: torch.dtype | None, guided: bool) -> int:
        config = self.settings
        tokens = config.tokens // config.patch**2
        attention = tokens * config.heads * tokens  # where no fused kernel takes it
        return 4 * (2 if guided else 1) * (12 * tokens * config.width + attention)

    def _sample(self, batch: SampleBatch) -> Tensor:
        self.refuse_filters(batch)
        config, options = self.settings, batch.options
        vector = self.transformer.vector(batch.condition)
        null = None if batch.null is None else self.transformer.vector(batch.null)
        field = Guided(self.transformer, vector, null, batch.scales[0][0], options.guided_channels)
        if options.guidance == "projected":
            if null is None:
                raise UsageError('guidance = "projected" reaches nothing without guidance; set cfg_scale above 1')
            field.projected = ProjectedGuidance()
        latents = self._diffuse(batch, field) if config.objective == "diffusion" else self._flow(batch, field)
        return self.sampled(batch, latents)

    def _flow(self, batch: SampleBatch, field: "Guided") -> Tensor:
        options, transport, channels = batch.options, self.transport, self.settings.channels
        method, steps = options.method or "euler", options.steps or 50
        if method in ("ddpm", "ddim"):
            raise UsageError(f"method {method!r} belongs to diffusion; a flow takes euler, heun, midpoint or sde")
        given = self.known(batch)
        noise = point = self.noise(batch, 0)
        interval = transport.interval(transport.sampling_margin)
        output = lambda z, t: field(z, t)[:, :channels]  # noqa: E731
        if method == "sde":
            if given is not None:
                raise UsageError("tokens can be given to the ODE samplers only: method euler, heun or midpoint")
            draw = lambda number: self.noise(batch, number + 1)  # noqa: E731
            points = solve_sde(transport, output, noise, steps, draw, SDE(), interval)
        else:
            velocity = lambda z, t: transport.velocity(output(z, t), z, t)  # noqa: E731
            hold = None if given is None else held(transport, *given, noise)
            points = solve_ode(velocity, noise, steps + 1, method, interval, hold)
        for number, reached in enumerate(points):
            point = reached
            batch.report((number + 1) / (steps + 1))
        return point

    def _diffuse(self, batch: SampleBatch, field: "Guided") -> Tensor:
        options = batch.options
        method, count = options.method or "ddpm", options.steps or 250
        if method not in ("ddpm", "ddim"):
            raise UsageError(f"method {method!r} belongs to flows; diffusion takes ddpm or ddim")
        kept = ddim_steps(STEPS, count) if method == "ddim" else spaced_steps(STEPS, count)
        schedule = Diffusion(linear_betas(STEPS)).respaced(kept)
        given = self.known(batch)
        start = point = self.noise(batch, 0)
        for number, step in enumerate(reversed(range(count))):
            if given is not None:  # given places follow the noise they would have here
                known, places = given
                steps = torch.full((len(point),), step, device=point.device)
                point = torch.where(places[:, None], schedule.noised(known, steps, start), point)
            original = torch.full((len(point),), kept[step], device=point.device)
            output = field(point, original)
            if method == "ddim":
                point = schedule.ddim_step(output, point, step)
            else:
                noise = self.noise(batch, number + 1)
                point = schedule.ancestral_step(output, point, step, noise, batch.filters[0]["temperature"])
            batch.report((number + 1) / count)
        return point


class Guided:
    """The network under classifier-free guidance: points (B, C, h, w) and times (B,) to outputs.

    Args:
        network: the network.
        vector: the condition, (B, width).
        null: the null condition, (B, width); None without guidance.
        scale: of guidance.
        channels: guides only so many channels; None guides all that predict (not those of the variance).
    """

    def __init__(
        self, network: FlowNetwork, vector: Tensor, null: Tensor | None, scale: float, channels: int | None
    ) -> None:
        self.network, self.vector, self.null, self.scale = network, vector, null, scale
        config: Any = network.config
        self.channels = config.channels if channels is None else channels
        self.projected: ProjectedGuidance | None = None  # guides in place of the plain formula

    def __call__(self, point: Tensor, time: Tensor) -> Tensor:
        if self.null is None:
            return self.network(point, time, self.vector)
        both = self.network(point.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([self.vector, self.null]))
        conditional, unconditional = both.chunk(2)
        first, null = conditional[:, : self.channels], unconditional[:, : self.channels]
        if self.projected is not None:
            guided = self.projected(first, null, self.scale)
        else:
            guided = null + self.scale * (first - null)
        return torch.cat([guided, conditional[:, self.channels :]], 1)


def held(transport: Transport, known: Tensor, places: Tensor, noise: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Holds given places (B, h, w) on their own path from noise to what is known, at every time of an ODE."""
    return lambda point, time: torch.where(places[:, None], transport.between(known, noise, time)[0], point)
