"""Training of tokenizers: the recipe, and one loop that reads from top to bottom.

The order within a step is the published one (https://arxiv.org/abs/2412.02692): the discriminator learns on what the
tokenizer makes now, then the tokenizer learns against the discriminator as it has just become.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from pydantic import Field, model_validator
from torch import Tensor, nn

from lexel import provenance
from lexel.checkpoint import load_strict
from lexel.config import Config
from lexel.data import training_batches
from lexel.data.config import DataConfig, open_data
from lexel.errors import UsageError
from lexel.loading import load_tokenizer
from lexel.losses import (
    DISCRIMINATOR_LOSSES,
    DISCRIMINATORS,
    GENERATOR_LOSSES,
    LPIPS,
    BlurDiscriminator,
    LeCAM,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l1,
    l2,
)
from lexel.metrics.health import diagnose
from lexel.quantizers import QUANTIZERS, outline
from lexel.quantizers.base import weighted_sum
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.runtime import Runtime
from lexel.tokenizer import Reconstruction, Tokenizer, TokenizerConfig
from lexel.train.run import (
    Precision,
    Progress,
    ProgressCallback,
    RunningMeans,
    Schedule,
    StopRequest,
    optimizer_step,
    pick_place,
    seed_step,
    set_learning_rate,
    share,
    start,
    track,
    weight_average,
)
from lexel.train.validation import validate

IMAGE_TERMS = ("l1", "l2", "lpips", "adversarial")  # what a recipe may weigh beside the quantizer's own terms
COLLAPSED = 1.1  # a perplexity below this is one code
SMALLEST_SCALE = 2.0**-10  # half precision that overflows at this scale is no longer a matter of scale


class DiscriminatorConfig(Config):
    """The adversary; it takes part where `weights.adversarial` is not 0."""

    start: float = Field(default=0, ge=0)  # it begins after this many epochs or steps, in the unit of the run's length
    kind: str = "patch"  # or blur: of the published pretrained tokenizers, at layers = 3 and width = 128
    layers: int = Field(default=3, ge=1)
    width: int = Field(default=64, ge=1)
    loss: str = "hinge"
    generator_loss: str = "non_saturating_image"
    adaptive: bool = False  # multiplies weights.adversarial so that both pull equally at the decoder's last layer
    lecam: float = Field(default=0.0, ge=0)  # weight of the LeCAM term; 0 is off
    lecam_decay: float = Field(default=0.999, ge=0, lt=1)
    lr: float | None = Field(default=None, gt=0)  # None is the tokenizer's

    @model_validator(mode="after")
    def _known(self) -> "DiscriminatorConfig":
        tables: dict[str, Mapping[str, Any]] = {
            "kind": DISCRIMINATORS,
            "loss": DISCRIMINATOR_LOSSES,
            "generator_loss": GENERATOR_LOSSES,
        }
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(sorted(table))}")
        with torch.device("meta"):
            self.build()  # a width that does not fit is told before anything starts
        return self

    def build(self) -> PatchDiscriminator | BlurDiscriminator:
        """The network."""
        return DISCRIMINATORS[self.kind](self.layers, self.width)


class TrainConfig(Config):
    """How a tokenizer is trained."""

    steps: int | None = Field(default=None, ge=1)  # either this
    epochs: int | None = Field(default=None, ge=1)  # or this
    batch_size: int = Field(ge=1)  # images of a step, over all processes and parts
    accumulation: int = Field(
        default=1, ge=1
    )  # parts that a process takes its share of the batch in, one after another
    lr: float = Field(gt=0)
    betas: list[float] = Field(default=[0.5, 0.9], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    clip: float | None = Field(default=None, gt=0)  # the largest norm of the gradient
    weights: dict[str, float] = {"l1": 1.0}  # of loss terms; the quantizer's default to its own LOSS_WEIGHTS
    lpips: Literal["vgg", "alex"] = "vgg"  # the network behind the term lpips
    discriminator: DiscriminatorConfig | None = None
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    average_warm_up: bool = False
    precision: Precision = "float32"
    channels_last: bool = False
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1)  # steps
    validate_every: int = Field(default=1000, ge=1)  # steps
    validation_images: int | None = Field(default=None, ge=1)  # None is all of them
    save_every: int = Field(default=1000, ge=1)  # steps
    keep_last: int = Field(default=2, ge=1)  # checkpoints; the best one stays too
    collapse_patience: int = Field(default=5, ge=0)  # validations in a row with one code in use that end a run; 0: none
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}")
        known = {*IMAGE_TERMS, *(term for kind in QUANTIZERS.values() for term in kind.LOSS_WEIGHTS)}
        for term in self.weights:
            if term not in known:
                raise ValueError(f"weights has the unknown loss term {term!r}; choose from {', '.join(sorted(known))}")
        if self.weights.get("adversarial") and self.discriminator is None:
            raise ValueError("weights.adversarial needs a section [train.discriminator]")
        if not any(self.weights.get(term) for term in ("l1", "l2", "lpips")):
            raise ValueError("weights needs l1, l2 or lpips, or nothing asks for a likeness")
        return self


class InitConfig(Config):
    """The model a training starts from."""

    source: str  # a tokenizer folder or hub id
    what: Literal["all", "decoder", "codebook"] = "all"  # see `initialise`


class TokenizerRecipe(Config):
    """All that decides a tokenizer: the network, the images, the training."""

    model: TokenizerConfig
    data: DataConfig
    train: TrainConfig
    init: InitConfig | None = None

    @model_validator(mode="after")
    def _buildable(self) -> "TokenizerRecipe":
        with torch.device("meta"):
            tokenizer = Tokenizer(self.model)  # a UsageError is a ValueError: it is told as one
        try:
            tokenizer.grid(self.data.size, self.data.size)
        except UsageError as error:
            raise ValueError(f"data.size = {self.data.size} does not fit the autoencoder: {error}") from None
        return self

    def resolved(self) -> "TokenizerRecipe":
        """With the weight of every loss term written out."""
        with torch.device("meta"):
            quantizer = Tokenizer(self.model).quantizer  # residual and product have the weights of their base
        weights = {**quantizer.LOSS_WEIGHTS, **self.train.weights}
        return self.model_copy(update={"train": self.train.model_copy(update={"weights": weights})})


class Trained(NamedTuple):
    """What `train_tokenizer` leaves in memory."""

    tokenizer: Tokenizer  # the live weights; `average` holds the averaged ones
    average: Tokenizer
    step: int  # steps done
    finished: bool  # False when a signal ended it early: the same command goes on from there
    unreadable: Mapping[str, str]  # pictures that this process could not use, and why


class Adversary:
    """The discriminator and all that belongs to it.

    `parts` names what a checkpoint must hold of it.
    """

    def __init__(
        self, train: TrainConfig, config: DiscriminatorConfig, runtime: Runtime, accelerator: Accelerator
    ) -> None:
        self.train, self.config, self.runtime, self.accelerator = train, config, runtime, accelerator
        self.lr = config.lr or train.lr
        self.discriminator = config.build().to(runtime.device)
        set_layout(self.discriminator, train.channels_last)
        # Its means move with every piece of a batch; over a whole step they forget what the recipe says.
        self.lecam = LeCAM(config.lecam_decay ** (1 / train.accumulation)).to(runtime.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), self.lr, (train.betas[0], train.betas[1]))
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=train.precision == "fp16")
        self.shared = accelerator.prepare_model(self.discriminator, device_placement=False)
        self.parts: dict[str, Any] = {
            "discriminator": self.discriminator,
            "lecam": self.lecam,
            "discriminator_optimizer": self.optimizer,
            "discriminator_scaler": self.scaler,
        }

    def step(self, pieces: list[Tensor], made: list[Tensor], factor: float) -> dict[str, Tensor]:
        """Learns to tell images from what was made of them, both lists of (B, 3, H, W); returns what was seen."""
        means = RunningMeans()
        self.optimizer.zero_grad(set_to_none=True)
        for number, (real, fake) in enumerate(zip(pieces, made, strict=True)):
            with sharing(self.accelerator, self.shared, number == len(pieces) - 1):
                with self.runtime.autocast():
                    logits_real, logits_fake = self.shared(real), self.shared(fake)
                    terms = {"discriminator": discriminator_loss(self.config.loss, logits_real, logits_fake)}
                    loss = terms["discriminator"]
                    if self.config.lecam:
                        terms["lecam"] = self.lecam(logits_real, logits_fake)
                        loss = loss + self.config.lecam * terms["lecam"]
                self.scaler.scale(loss / len(pieces)).backward()
            means.add({**terms, "logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()})
        set_learning_rate(self.optimizer, factor * self.lr)
        norm = optimizer_step(self.optimizer, self.scaler, self.discriminator.parameters(), self.train.clip)
        return {**means.tensors(), "discriminator_gradient_norm": norm}

    def fooled(self, images: Tensor) -> Tensor:
        """What the tokenizer has to gain: a scalar."""
        return generator_loss(self.config.generator_loss, self.discriminator(images))


class Learner:
    """Everything that changes during training, and what a step does to it.

    `parts` names all of it: a checkpoint holds exactly these, and nothing else is needed to go on.
    """

    def __init__(
        self, recipe: TokenizerRecipe, tokenizer: Tokenizer, runtime: Runtime, accelerator: Accelerator
    ) -> None:
        train = recipe.train
        self.config, self.runtime, self.accelerator = train, runtime, accelerator
        self.weights = recipe.resolved().train.weights
        self.tokenizer = tokenizer.to(runtime.device)
        set_layout(self.tokenizer, train.channels_last)
        self.average = weight_average(self.tokenizer, train.average_decay, train.average_warm_up)
        self.learning = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.learning, train.lr, (train.betas[0], train.betas[1]))
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=train.precision == "fp16")
        self.means = RunningMeans()
        self.lpips = LPIPS(train.lpips).to(runtime.device) if self.weights.get("lpips") else None
        self.adversary = None
        if train.discriminator is not None and self.weights.get("adversarial"):
            self.adversary = Adversary(train, train.discriminator, runtime, accelerator)
        self.parts: dict[str, Any] = {
            "model": self.tokenizer,
            "average": self.average,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "means": self.means,
            **(self.adversary.parts if self.adversary is not None else {}),
        }
        # Behind this door gradients are averaged over processes; in a single process it is the module itself.
        self.shared = accelerator.prepare_model(self.tokenizer, device_placement=False)
        self.tokenizer.train()
        if recipe.init is not None and recipe.init.what == "decoder":
            self.tokenizer.quantizer.eval()  # codes must not move, not even by statistics

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        missing = sorted(self.parts.keys() - state.keys())
        if missing:
            raise UsageError(f"{source} is no whole training state: it lacks {', '.join(missing)}")
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                load_strict(part, state[name], f"{source} ({name})")
            else:
                part.load_state_dict(state[name])

    def step(self, images: Tensor, adversarial: bool, factor: float) -> dict[str, Tensor]:
        """One step on this process's share of a batch; returns the terms that were seen, unweighted.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            adversarial: whether the discriminator takes part.
            factor: of the learning rates.
        """
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        size = math.ceil(len(images) / self.config.accumulation)
        pieces = [piece.to(self.runtime.device, memory_format=layout) for piece in images.split(size)]
        adversary = self.adversary if adversarial else None

        # One pass serves both networks. Only where the batch comes in pieces, whose graphs would fill the memory that
        # pieces are to save, the discriminator is shown beforehand what the tokenizer makes of them.
        ahead = self._reconstruct(pieces[0]) if len(pieces) == 1 else None
        seen: dict[str, Tensor] = {}
        if adversary is not None:  # the discriminator learns first, on what the tokenizer makes now
            made = [self._preview(piece) for piece in pieces] if ahead is None else [ahead.images.detach()]
            seen = adversary.step(pieces, made, factor)

        # The tokenizer learns to reconstruct and to fool the discriminator.
        means = RunningMeans()
        self.optimizer.zero_grad(set_to_none=True)
        with frozen(adversary.discriminator if adversary is not None else None):
            for number, piece in enumerate(pieces):
                with sharing(self.accelerator, self.shared, number == len(pieces) - 1):
                    reconstruction = self._reconstruct(piece) if ahead is None else ahead
                    with self.runtime.autocast():
                        terms = self._likeness(piece, reconstruction.images)
                        likeness = weighted_sum(terms, self.weights)
                        terms |= reconstruction.quantized.losses
                        loss = likeness + weighted_sum(reconstruction.quantized.losses, self.weights)
                        if adversary is not None:
                            terms["adversarial"] = adversary.fooled(reconstruction.images)
                            weight = self._adversarial_weight(likeness, terms["adversarial"])
                            loss = loss + weight * terms["adversarial"]
                            terms["adversarial_weight"] = weight
                    self.scaler.scale(loss / len(pieces)).backward()
                means.add({**terms, "loss": loss})
        set_learning_rate(self.optimizer, factor * self.config.lr)
        norm = optimizer_step(self.optimizer, self.scaler, self.learning, self.config.clip)
        self.average.update_parameters(self.tokenizer)
        return {**seen, **means.tensors(), "gradient_norm": norm}

    def _reconstruct(self, images: Tensor) -> Reconstruction:
        with self.runtime.autocast():
            return self.shared(images)

    @torch.no_grad()
    def _preview(self, images: Tensor) -> Tensor:
        """The reconstruction, in evaluation mode so that a quantizer's statistics move only once a step."""
        training = [module for module in self.tokenizer.modules() if module.training]
        self.tokenizer.eval()
        with self.runtime.autocast():
            made = self.tokenizer(images).images
        for module in training:
            module.training = True
        return made

    def _likeness(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        terms = {"l1": l1(reconstructions, images), "l2": l2(reconstructions, images)}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(reconstructions, images).mean()
        return {name: term for name, term in terms.items() if self.weights.get(name)}

    def _adversarial_weight(self, likeness: Tensor, adversarial: Tensor) -> Tensor:
        weight = torch.tensor(self.weights["adversarial"], device=likeness.device)
        if self.config.discriminator is None or not self.config.discriminator.adaptive:
            return weight
        pull = adaptive_weight(likeness, adversarial, self.tokenizer.last_layer)
        return weight * self.accelerator.reduce(pull, "mean")  # one weight for all processes


def set_layout(module: nn.Module, channels_last: bool) -> None:
    """Lays the weights of convolutions out for channels-last images, which is faster on some devices."""
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Gradients pass through the module but are not gathered in it."""
    parameters = list(module.parameters()) if module is not None else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def sharing(accelerator: Accelerator, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are averaged over processes with the last piece of a batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(module)


def train_tokenizer(
    recipe: TokenizerRecipe,
    out: str | Path,
    *,
    device: str = "auto",
    initial: Tokenizer | None = None,
    progress: ProgressCallback | None = None,
) -> Trained:
    """Trains a tokenizer in a run folder; called again with the same recipe it goes on, bit for bit.

    SIGTERM and SIGINT end it after the step at hand, which is saved.

    Args:
        recipe: what to train.
        out: the run folder: see `RunFolder`. At the end it holds the averaged weights as a model folder too.
        device: "auto", "cpu", "cuda", ...; a distributed launch decides itself.
        initial: the model behind `recipe.init.source`, if it is not a folder or hub id that Tokenizer reads.
        progress: called after every step.

    Raises:
        UsageError: the recipe, the images or the run folder do not allow it.
        TrainingStopped: the loss became NaN, the codebook collapsed, or the disk is full; the last good checkpoint
            is kept.
    """
    recipe = recipe.resolved()
    config = recipe.train
    images, validation = open_data(recipe.data)
    per_epoch = math.ceil(len(images) / config.batch_size)
    steps, unit = (config.steps, 1) if config.steps is not None else ((config.epochs or 0) * per_epoch, per_epoch)

    accelerator = start(device, config.trackers, Path(out), unused=0 in recipe.train.weights.values())
    runtime = pick_place(device, config.precision, accelerator)
    rank, processes = accelerator.process_index, accelerator.num_processes
    if config.batch_size % (processes * config.accumulation):
        raise UsageError(
            f"train.batch_size = {config.batch_size} cannot be shared by {processes} processes in "
            f"{config.accumulation} parts; it must be a multiple of {processes * config.accumulation}"
        )
    run = RunFolder(out, config.keep_last, best="psnr", writes=accelerator.is_main_process)
    run.claim(recipe)
    accelerator.wait_for_everyone()
    state = run.resume()
    accelerator.wait_for_everyone()

    seed_step(config.seed, -1, 0)  # all processes begin with the same weights
    tokenizer = Tokenizer(recipe.model)
    if recipe.init is not None:
        initialise(tokenizer, recipe.init, initial, load=state is None)
    learner = Learner(recipe, tokenizer, runtime, accelerator)
    average = learner.average.module
    assert isinstance(average, Tokenizer)
    first, seconds_before = 0, 0.0
    if state is not None:
        learner.load_state_dict(state, run.checkpoint(state["step"]))
        first, seconds_before = state["step"], state["seconds"]
    transform = recipe.data.make_transform()
    batches = training_batches(
        images,
        transform,
        config.batch_size,
        config.seed,
        first,
        rank,
        processes,
        recipe.data.workers,
        on_error=recipe.data.on_error or "replace",
    )
    unreadable: dict[str, str] = {}
    track(accelerator, recipe)
    begun = time.perf_counter()
    done, finished = first, first >= steps
    with StopRequest() as stop:
        for step in range(first, steps):
            seed_step(config.seed, step, rank)
            batch = next(batches)
            tokenizer.quantizer.anneal(step / max(steps - 1, 1))
            adversarial = learner.adversary is not None and step >= learner.adversary.config.start * unit
            factor = config.schedule.factor(step, steps, unit)

            seen = learner.step(batch.images, adversarial, factor)
            learner.means.add(seen)
            done = step + 1
            loss, norm, opponent, asked = share(
                [seen["loss"], seen["gradient_norm"], seen.get("discriminator", 0.0), float(stop.signal is not None)],
                accelerator,
                runtime.device,
            )
            refuse_nan(run, done, learner, {"loss": loss, "gradient_norm": norm, "discriminator": opponent}, seen)

            elapsed = time.perf_counter() - begun
            seconds = seconds_before + elapsed
            speed = (done - first) * config.batch_size / elapsed
            finished, leaving = done == steps, asked > 0
            if progress is not None and accelerator.is_main_process:
                left = (steps - done) * elapsed / (done - first)
                progress(Progress(done, steps, speed, left, learner.means.peek()))
            if done % config.log_every == 0 or finished:
                values = learner.means.take()
                values = dict(zip(values, share(list(values.values()), accelerator, runtime.device), strict=True))
                values |= {"lr": factor * config.lr, "images_per_second": speed}
                if batches.unreadable:
                    values["unreadable"] = len(batches.unreadable)
                run.log(done, "train", seconds, values)
                accelerator.log({f"train/{name}": value for name, value in values.items()}, step=done)
            better = False
            if done % config.validate_every == 0 or finished:
                measured = validate(
                    average,
                    validation,
                    transform,
                    max(1, config.batch_size // processes // config.accumulation),
                    runtime,
                    accelerator,
                    config.validation_images,
                    learner.lpips,
                    recipe.data.workers,
                    recipe.data.on_error or "replace",
                )
                unreadable |= measured.unreadable
                refuse_collapse(run, done, recipe, measured.values, accelerator)
                run.log(done, "validation", seconds, measured.values)
                run.snapshot(done, measured.snapshot)
                accelerator.log({f"validation/{name}": value for name, value in measured.values.items()}, step=done)
                better = run.best_step() == done
            if done % config.save_every == 0 or better or finished or leaving:
                run.save(done, {"seconds": seconds, **learner.state_dict()})
                accelerator.wait_for_everyone()
            if leaving:
                break
    if finished and accelerator.is_main_process:
        average.save_pretrained(out, provenance.of_run(recipe.model_dump(mode="json"), done, "average"))
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return Trained(tokenizer, average, done, finished, unreadable | batches.unreadable)


def initialise(tokenizer: Tokenizer, init: InitConfig, initial: Tokenizer | None = None, load: bool = True) -> None:
    """Starts a tokenizer from another one.

    `what` = "all" takes every weight. "decoder" takes every weight and lets only the decoder (with the 1x1 convolution
    before it) learn, so that indices keep their meaning. "codebook" takes the encoder and the decoder and starts with
    a new quantizer, which may be of another kind, size or dimension; the 1x1 convolutions are taken where the dimension
    is the same.

    Args:
        tokenizer: changed in place.
        init: source and extent.
        initial: the source, if it was loaded already.
        load: False where a checkpoint brings the weights, so that only the choice of what learns is made.

    Raises:
        UsageError: the source is of another architecture.
    """
    if load:
        source: Tokenizer = initial if initial is not None else load_tokenizer(init.source)
        ours, theirs = tokenizer.config, source.config
        if init.what != "codebook" and ours != theirs:
            part = "autoencoder" if ours.autoencoder != theirs.autoencoder else "quantizer"
            raise UsageError(
                f"init.source {init.source} has another {part} than the recipe's model: "
                f"{getattr(theirs, part)!r}; make model.{part} the same, or take only the rest (init.what = 'codebook')"
            )
        if ours.autoencoder != theirs.autoencoder:
            raise UsageError(
                f"init.source {init.source} has another autoencoder than the recipe's model: {theirs.autoencoder!r}"
            )
        tensors = source.state_dict()
        if init.what == "codebook":
            fresh = ["quantizer."]
            if (
                tokenizer.quantizer.codebook_dim != source.quantizer.codebook_dim
                or ours.projections != theirs.projections
            ):
                fresh += ["to_codes.", "from_codes."]
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(fresh))}
            own = tokenizer.state_dict().items()
            tensors |= {name: tensor for name, tensor in own if name.startswith(tuple(fresh))}
        load_strict(tokenizer, tensors, init.source)
    if init.what == "decoder":
        for frozen_part in (tokenizer.encoder, tokenizer.to_codes, tokenizer.quantizer):
            frozen_part.requires_grad_(False)


def refuse_nan(
    run: RunFolder, step: int, learner: Learner, sums: Mapping[str, float], terms: Mapping[str, Tensor]
) -> None:
    """Ends a run whose loss or gradient is no number any more, before anything of it is saved.

    A gradient that overflowed half precision is skipped by its scaler, and counts only when the scale has become tiny.
    """
    scaled = learner.scaler.is_enabled()
    wrong = [name for name, value in sums.items() if not (math.isfinite(value) or (scaled and name == "gradient_norm"))]
    if scaled and learner.scaler.get_scale() < SMALLEST_SCALE:
        wrong.append("gradient_norm")
    if not wrong:
        return
    seen = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
    raise TrainingStopped(
        f"stopped at step {step}: {' and '.join(wrong)} became NaN or infinite ({seen}). {_kept(run)} "
        "Lower train.lr, set train.clip = 1.0, or use precision float32 or bf16"
    )


def refuse_collapse(
    run: RunFolder, step: int, recipe: TokenizerRecipe, now: Mapping[str, float | None], accelerator: Accelerator
) -> None:
    """Ends a run whose averaged weights are no numbers, or whose codebook has been a single code for long."""
    patience = recipe.train.collapse_patience
    line = {name: value for name, value in now.items() if value is not None}
    recent = [*run.lines("validation"), {"step": step, **line}][-patience:] if patience else []
    collapsed = bool(patience) and len(recent) == patience and all(row["perplexity"] < COLLAPSED for row in recent)
    collapsed = share([float(collapsed and run.writes)], accelerator, torch.device(accelerator.device))[0] > 0
    if not math.isfinite(line["psnr"]) and not line["l1"] == 0:
        raise TrainingStopped(
            f"stopped at step {step}: the averaged weights give no images (l1 {line['l1']}). {_kept(run)}"
        )
    if collapsed:
        finding = diagnose(outline(recipe.model.quantizer), recent)[0]
        raise TrainingStopped(
            f"stopped at step {step}: the codebook collapsed, perplexity below {COLLAPSED} in {patience} validations "
            f"({finding.seen}). {_kept(run)} Likely cause: {finding.cause}. Try: {finding.change}"
        )


def _kept(run: RunFolder) -> str:
    saved = run.steps()
    return f"The last good checkpoint is {run.checkpoint(saved[-1])}." if saved else "No checkpoint was saved yet."


def load_run(folder: str | Path, weights: Literal["average", "live", "best"] = "average") -> Tokenizer:
    """The tokenizer of a run folder or model folder, in evaluation mode; see `lexel.load`."""
    return load_tokenizer(folder, None if weights == "average" else weights)
