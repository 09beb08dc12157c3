"""Training of generators: the recipe, and one loop that reads from top to bottom.

Published as https://arxiv.org/abs/2412.02692: AdamW, a short warm-up and a linear fall, labels dropped to the null
class with probability 0.1, gradients clipped at norm 1. The published code decays norms and biases too; so does the
default.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lexel import checkpoint, provenance
from lexel.config import Config
from lexel.data import ordered_batches, to_uint8, training_batches
from lexel.data.batches import OnError
from lexel.data.config import DataConfig, open_data
from lexel.data.tokens import TokenBatch, TokenSet
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig, NetworkConfig, NetworkOptions, TrainingLosses
from lexel.loading import load_generator, load_tokenizer
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.runtime import Runtime
from lexel.spacing import evenly_spaced
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer
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
)

SHOWN = 8  # samples in the snapshot of the last step
COUNTED = 100_000  # images, spread over the set, whose tokens make the histogram: more would not change its entropy

# ---------------------------------------------------------------------------------------------- the recipe


class TokensConfig(Config):
    """What a generator learns from: a token set, or images that a tokenizer turns into tokens on the way."""

    tokens: str | None = None  # a folder that `lexel encode` wrote
    validation: str | Annotated[float, Field(gt=0, lt=1)] = 0.05  # another such folder, or the share to hold out
    images: DataConfig | None = None  # instead of tokens
    tokenizer: str | None = None  # a folder or hub id; needed for images, and kept beside the generator

    @model_validator(mode="after")
    def _one_source(self) -> "TokensConfig":
        if (self.tokens is None) == (self.images is None):
            raise ValueError("give either tokens (a token set) or images (a section like a tokenizer's data)")
        if self.images is not None and self.tokenizer is None:
            raise ValueError("images need the tokenizer that turns them into tokens")
        return self


class GeneratorTrainConfig(Config):
    """How a generator is trained."""

    steps: int | None = Field(default=None, ge=1)  # either this
    epochs: int | None = Field(default=None, ge=1)  # or this
    batch_size: int = Field(ge=1)  # images of a step, over all processes and parts
    accumulation: int = Field(default=1, ge=1)  # parts that a process takes its share of the batch in
    lr: float = Field(gt=0)
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.05, ge=0)
    weight_decay_end: float | None = Field(default=None, ge=0)  # reached on a cosine; None is the same throughout
    decay_norms: bool = True  # decay norms and biases too, as the published code does
    schedule: Schedule = Schedule()
    clip: float | None = Field(default=1.0, gt=0)  # the largest norm of the gradient
    precision: Precision = "float32"
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False  # spread weights, gradients and optimizer over the processes
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1)  # steps
    validate_every: int = Field(default=1000, ge=1)  # steps
    validation_images: int | None = Field(default=None, ge=1)  # None is all of them
    save_every: int = Field(default=1000, ge=1)  # steps
    keep_last: int = Field(default=2, ge=1)  # checkpoints; the best one stays too
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []

    @model_validator(mode="after")
    def _consistent(self) -> "GeneratorTrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}")
        if self.fsdp and self.precision == "fp16":
            raise ValueError("fsdp has no loss scaling; use precision bf16 or float32")
        return self

    def decay(self, step: int, steps: int) -> float:
        """The weight decay at a step."""
        if self.weight_decay_end is None:
            return self.weight_decay
        fall = 0.5 + 0.5 * math.cos(math.pi * step / max(steps - 1, 1))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * fall


class GeneratorInitConfig(Config):
    """The generator a training starts from."""

    source: str  # a generator folder or hub id, of the same network
    what: Literal["all"] = "all"


class GeneratorRecipe(Config):
    """All that decides a generator: the network, the tokens, the training."""

    generator: NetworkOptions
    data: TokensConfig
    train: GeneratorTrainConfig
    init: GeneratorInitConfig | None = None

    @model_validator(mode="after")
    def _buildable(self) -> "GeneratorRecipe":
        with torch.device("meta"):
            Generator(GeneratorConfig(transformer=self.generator))  # UsageError is a ValueError, so pydantic reports it
        return self


class TrainedGenerator(NamedTuple):
    """What `train_generator` leaves in memory."""

    generator: Generator  # sharded still, where the recipe says fsdp
    step: int  # steps done
    finished: bool  # False when a signal ended it early: the same command goes on from there
    unreadable: Mapping[str, str]  # pictures that this process could not use, and why; empty for token sets


# ---------------------------------------------------------------------------------------------- tokens


class Source:
    """Batches of tokens to learn from and to measure on.

    Attributes:
        length: images in an epoch.
        fingerprint: of the tokenizer; None if it is not known.
        tokenizer: the tokenizer, if the recipe names one.
        class_names: or None.
        unreadable: pictures that could not be used so far, and why.
        histogram_bits: entropy of the histogram of single tokens, in bits: what a model that knows how frequent every
            token is, and nothing else, needs for one. None until it is measured.
    """

    def __init__(self, recipe: GeneratorRecipe, runtime: Runtime) -> None:
        data, self.runtime = recipe.data, runtime
        self.tokenizer: Tokenizer | None = None
        if data.tokenizer is not None:
            self.tokenizer = load_tokenizer(data.tokenizer).to(runtime.device)
        self.training: TokenSet | None = None
        self.histogram_bits: float | None = None
        self.unreadable: dict[str, str] = {}
        if data.tokens is not None:
            self._open_tokens(data, recipe.generator)
        else:
            self._open_images(data, recipe.generator)

    def _open_tokens(self, data: TokensConfig, model: NetworkConfig) -> None:
        assert data.tokens is not None
        tokens = TokenSet.open(data.tokens)
        if isinstance(data.validation, str):
            self.training, self.validation = tokens, TokenSet.open(data.validation)
            self.validation.require(tokens.fingerprint)
        else:
            self.training, self.validation = tokens.hold_out(data.validation)
        if self.tokenizer is not None:
            tokens.require(self.tokenizer.fingerprint())
        for each in (self.training, self.validation):
            classes = each.classes if each.labels is not None else None
            model.check_fits(TokenSpec((each.grid,), each.codebook_size), classes, str(each.folder))
        self.length, self.fingerprint = len(self.training), tokens.fingerprint
        self.class_names = list(tokens.classes) if tokens.labels is not None else None
        counted = self.training.subset(evenly_spaced(len(self.training), COUNTED))
        self.histogram_bits = entropy_bits(counted.histogram())

    def _open_images(self, data: TokensConfig, model: NetworkConfig) -> None:
        assert data.images is not None
        assert self.tokenizer is not None
        self.images, self.image_validation = open_data(data.images)
        self.transform, self.workers = data.images.make_transform(), data.images.workers
        self.on_error: OnError = data.images.on_error or "replace"
        labelled = self.images.labels is not None
        classes = list(self.images.classes) if labelled else None
        spec = self.tokenizer.token_spec(data.images.size, data.images.size)
        model.check_fits(spec, classes, data.images.source)
        self.length, self.fingerprint, self.class_names = len(self.images), self.tokenizer.fingerprint(), classes

    def batches(self, config: GeneratorTrainConfig, first: int, rank: int, processes: int) -> Iterator[TokenBatch]:
        """An endless iterator from step `first`; a batch is a function of (seed, step) alone."""
        if self.training is not None:
            yield from self.training.training_batches(config.batch_size, config.seed, first, rank, processes)
        batches = training_batches(
            self.images,
            self.transform,
            config.batch_size,
            config.seed,
            first,
            rank,
            processes,
            self.workers,
            on_error=self.on_error,
        )
        for batch in batches:
            self.unreadable.update(batches.unreadable)
            yield self._encoded(batch)

    def measured(self, batch_size: int, limit: int | None, rank: int, processes: int) -> Iterator[TokenBatch]:
        """Every validation image of this process once; with a limit so many of them all, evenly spaced."""
        if self.training is not None:
            tokens = self.validation.subset(evenly_spaced(len(self.validation), limit))
            yield from tokens.ordered_batches(batch_size, rank, processes)
            return
        images = self.image_validation.subset(evenly_spaced(len(self.image_validation), limit))
        batches = ordered_batches(
            images, self.transform, batch_size, rank, processes, self.workers, on_error=self.on_error
        )
        for batch in batches:
            self.unreadable.update(batches.unreadable)
            yield self._encoded(batch)

    def _encoded(self, batch: Any) -> TokenBatch:
        assert self.tokenizer is not None
        with self.runtime.autocast():
            indices = self.tokenizer.encode(batch.images.to(self.runtime.device))
        return TokenBatch(indices, batch.labels, batch.numbers)


def entropy_bits(histogram: Tensor) -> float:
    """Entropy of counts (K,), in bits."""
    shares = histogram.double() / histogram.sum().clamp(min=1)
    return float(-(shares * shares.clamp(min=1e-300).log2()).sum())


# ---------------------------------------------------------------------------------------------- the learner


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The published groups of parameters: matrices and embeddings; then norms and biases."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2]},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2]},
    ]


class Learner:
    """Everything that changes during training, and what a step does to it."""

    def __init__(
        self, config: GeneratorTrainConfig, generator: Generator, runtime: Runtime, engine: Accelerator
    ) -> None:
        self.config, self.runtime, self.accelerator = config, runtime, engine
        self.generator = generator.to(runtime.device)
        self.generator.transformer.checkpointing = config.checkpointing
        if config.fsdp:
            shard(self.generator, runtime, engine)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(generator),
            config.lr,
            (config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=runtime.device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.precision == "fp16")
        self.means = RunningMeans()
        # Behind this door gradients are averaged over processes; in a single process it is the module itself.
        losses = TrainingLosses(generator)
        self.shared = losses if config.fsdp else engine.prepare_model(losses, device_placement=False)
        self.generator.train()

    def tensors(self) -> dict[str, Tensor]:
        """The whole weights, on the CPU; every process must ask when they are sharded."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_model_state_dict(self.generator, options=whole))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """All that changes. The optimizer's part names parameters, so that a run may change its number of processes."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "config": self.generator.config.model_dump(mode="json"),
            "model": self.tensors(),
            "optimizer": get_optimizer_state_dict(self.generator, self.optimizer, options=whole),
            "scaler": self.scaler.state_dict(),
            "means": self.means.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        missing = sorted({"model", "optimizer", "scaler", "means"} - state.keys())
        if missing:
            raise UsageError(f"{source} is no whole training state: it lacks {', '.join(missing)}")
        whole = StateDictOptions(full_state_dict=True)
        if self.config.fsdp:
            set_model_state_dict(self.generator, dict(state["model"]), options=whole)
        else:
            checkpoint.load_strict(self.generator, state["model"], source)
        set_optimizer_state_dict(self.generator, self.optimizer, dict(state["optimizer"]), options=whole)
        self.scaler.load_state_dict(state["scaler"])
        self.means.load_state_dict(state["means"])

    def step(self, batch: TokenBatch, lr: float, decay: float) -> dict[str, Tensor]:
        """One step on this process's share of a batch."""
        device = self.runtime.device
        size = math.ceil(len(batch.indices) / self.config.accumulation)
        indices = batch.indices.to(device).split(size)
        conditions = self.generator.condition.of_batch(batch).to(device).split(size)

        total = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (tokens, condition) in enumerate(zip(indices, conditions, strict=True)):
            with self._sharing(last=number == len(indices) - 1):
                with self.runtime.autocast():
                    loss = torch.stack(list(self.shared(tokens, condition).values())).sum()
                self.scaler.scale(loss / len(indices)).backward()
            total += loss.detach() / len(indices)

        set_learning_rate(self.optimizer, lr)
        matrices, others = self.optimizer.param_groups
        matrices["weight_decay"] = decay
        others["weight_decay"] = decay if self.config.decay_norms else 0.0
        norm = optimizer_step(self.optimizer, self.scaler, list(self.generator.parameters()), self.config.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return {"loss": total, "bits_per_token": total / math.log(2), "gradient_norm": norm}

    def _sharing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are averaged over processes with the last part of a batch only."""
        if isinstance(self.generator, FSDPModule):
            self.generator.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.shared)


def shard(generator: Generator, runtime: Runtime, accelerator: Accelerator) -> None:
    """Spreads weights over the processes that accelerate started, block by block; gathered as they are needed."""
    if not torch.distributed.is_initialized():
        raise UsageError("train.fsdp needs several processes; start them with `accelerate launch`, or set it to false")
    mesh = init_device_mesh(runtime.device.type, (accelerator.num_processes,))
    for layer in generator.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(generator, mesh=mesh)
    for method in ("losses", "nll"):
        register_fsdp_forward_method(generator, method)


@torch.no_grad()
def validate(
    learner: Learner, source: Source, batch_size: int, limit: int | None, accelerator: Accelerator
) -> dict[str, float | None]:
    """Bits that a token of images not learned from costs, beside the entropy of the histogram of tokens."""
    generator, runtime = learner.generator, learner.runtime
    generator.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # nats, tokens
    histogram = torch.zeros(generator.config.transformer.codebook_size, dtype=torch.int64, device=runtime.device)
    batches = source.measured(batch_size, limit, accelerator.process_index, accelerator.num_processes)
    for batch in _padded(batches, accelerator, generator, runtime):
        indices, labels, real = batch
        with runtime.autocast():
            nll = generator.nll(indices, labels)
        assert nll is not None
        nll = nll.double()
        sums += torch.stack(
            [nll[:real].sum(), torch.tensor(nll[:real].numel(), device=runtime.device, dtype=torch.float64)]
        )
        histogram += torch.bincount(indices[:real].flatten(), minlength=len(histogram))
    generator.train()
    if accelerator.num_processes > 1:
        sums, histogram = accelerator.reduce(sums, "sum"), accelerator.reduce(histogram, "sum")
    nats, count = sums.tolist()
    return {
        "bits_per_token": nats / max(count, 1) / math.log(2),
        "histogram_bits": entropy_bits(histogram) if source.histogram_bits is None else source.histogram_bits,
        "tokens": count,
    }


def _padded(
    batches: Iterator[TokenBatch], accelerator: Accelerator, generator: Generator, runtime: Runtime
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(tokens, labels, how many are real) on the device. Sharded weights are gathered by all processes together, so one
    that has run out of images goes on with an empty share until all have."""
    nothing = torch.zeros(1, *generator.grid, dtype=torch.long, device=runtime.device)
    while True:
        batch = next(batches, None)
        if accelerator.num_processes > 1:
            left = torch.tensor([float(batch is not None)], device=runtime.device)
            if accelerator.reduce(left, "sum").item() == 0:
                return
        elif batch is None:
            return
        if batch is None:
            yield nothing, generator.condition.example(1).to(runtime.device), 0
        else:
            condition = generator.condition.of_batch(batch)
            yield batch.indices.to(runtime.device), condition.to(runtime.device), len(batch.indices)


# ---------------------------------------------------------------------------------------------- the loop


def train_generator(
    recipe: GeneratorRecipe,
    out: str | Path,
    *,
    device: str = "auto",
    initial: Generator | None = None,
    progress: ProgressCallback | None = None,
) -> TrainedGenerator:
    """Trains a generator in a run folder; called again with the same recipe it goes on, bit for bit.

    SIGTERM and SIGINT end it after the step at hand, which is saved.

    Args:
        recipe: what to train.
        out: the run folder: see `RunFolder`. At the end it holds the weights as a model folder too, and in `tokenizer/`
            the tokenizer that the recipe names.
        device: "auto", "cpu", "cuda", ...; a distributed launch decides itself.
        initial: the generator behind `recipe.init.source`, if that is no folder or hub id of ours.
        progress: called after every step.

    Raises:
        UsageError: the recipe, the tokens or the run folder do not allow it.
        TrainingStopped: the loss became NaN, or the disk is full; the last good checkpoint is kept.
    """
    config = recipe.train
    accelerator = start(device, config.trackers, Path(out))
    runtime = pick_place(device, config.precision, accelerator)
    rank, processes = accelerator.process_index, accelerator.num_processes
    if config.batch_size % (processes * config.accumulation):
        raise UsageError(
            f"train.batch_size = {config.batch_size} cannot be shared by {processes} processes in "
            f"{config.accumulation} parts; it must be a multiple of {processes * config.accumulation}"
        )
    source = Source(recipe, runtime)
    per_epoch = math.ceil(source.length / config.batch_size)
    steps, unit = (config.steps, 1) if config.steps is not None else ((config.epochs or 0) * per_epoch, per_epoch)

    run = RunFolder(
        out, config.keep_last, best="bits_per_token", higher_is_better=False, writes=accelerator.is_main_process
    )
    run.claim(recipe)
    accelerator.wait_for_everyone()
    state = run.resume()
    accelerator.wait_for_everyone()

    seed_step(config.seed, -1, 0)  # all processes begin with the same weights
    generator = Generator(
        GeneratorConfig(transformer=recipe.generator, tokenizer=source.fingerprint, class_names=source.class_names)
    )
    if recipe.init is not None and state is None:
        initialise(generator, recipe.init.source, initial)
    learner = Learner(config, generator, runtime, accelerator)
    first, seconds_before = 0, 0.0
    if state is not None:
        learner.load_state_dict(state, run.checkpoint(state["step"]))
        first, seconds_before = state["step"], state["seconds"]
    batches = source.batches(config, first, rank, processes)
    track(accelerator, recipe)

    begun = time.perf_counter()
    done, finished = first, first >= steps
    with StopRequest() as stop:
        for step in range(first, steps):
            seed_step(config.seed, step, rank)
            batch = next(batches)
            lr = config.lr * config.schedule.factor(step, steps, unit)

            seen = learner.step(batch, lr, config.decay(step, steps))
            done = step + 1
            loss, norm, asked = share(
                [seen["loss"], seen["gradient_norm"], float(stop.signal is not None)], accelerator, runtime.device
            )
            refuse_nan(run, done, loss, norm, learner.scaler)
            learner.means.add(seen)

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
                values |= {"lr": lr, "images_per_second": speed}
                run.log(done, "train", seconds, values)
                accelerator.log({f"train/{name}": value for name, value in values.items()}, step=done)
            better = False
            if done % config.validate_every == 0 or finished:
                size = max(1, config.batch_size // processes // config.accumulation)
                measured = validate(learner, source, size, config.validation_images, accelerator)
                run.log(done, "validation", seconds, measured)
                accelerator.log({f"validation/{name}": value for name, value in measured.items()}, step=done)
                better = share([float(run.writes and run.best_step() == done)], accelerator, runtime.device)[0] > 0
            if done % config.save_every == 0 or better or finished or leaving:
                run.save(done, {"seconds": seconds, **learner.state_dict()})
                accelerator.wait_for_everyone()
            if leaving:
                break
    if finished:
        tensors = learner.tensors()
        if accelerator.is_main_process:
            exported = Generator.with_weights(generator.config, tensors, out)
            exported.save_pretrained(
                out, source.tokenizer, provenance.of_run(recipe.model_dump(mode="json"), done, "live")
            )
            if source.tokenizer is not None:
                run.snapshot(done, {"samples": show(exported.to(runtime.device), source.tokenizer, config.seed)})
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return TrainedGenerator(generator.eval(), done, finished, source.unreadable)


def initialise(generator: Generator, source: str, initial: Generator | None = None) -> None:
    """Starts a generator from the weights of another one; only what is dropped in training may differ.

    Raises:
        UsageError: it is of another network, or speaks the tokens of another tokenizer.
    """
    if initial is None:
        initial = load_generator(source)
    ours, theirs = _network(generator.config.transformer), _network(initial.config.transformer)
    for name, value in theirs.items():
        if ours[name] != value:
            raise UsageError(f"init.source {source} has {name} = {value}, the recipe {ours[name]}; make them the same")
    if generator.config.tokenizer is not None:
        initial.check_tokenizer(generator.config.tokenizer, "the recipe's tokenizer")
    checkpoint.load_strict(generator, initial.state_dict(), source)


def _network(config: NetworkConfig) -> dict[str, Any]:
    """What must be the same for one network to take the weights of another; the head by what it predicts."""
    free = {"dropout", "class_dropout", "gamma_init", "head", "factors"}
    vocabularies = getattr(config, "vocabularies", None)
    return {**config.model_dump(exclude=free), "kind": config.kind, "vocabularies": vocabularies}


def show(generator: Generator, tokenizer: Tokenizer, seed: int) -> Tensor:
    """What the report shows: an image of each of the first classes, uint8 (SHOWN, H, W, 3)."""
    condition = generator.condition.shown(SHOWN)
    return torch.from_numpy(to_uint8(tokenizer.decode(generator.sample(condition, seed=seed))))


def refuse_nan(run: RunFolder, step: int, loss: float, norm: float, scaler: torch.amp.GradScaler) -> None:
    """Ends a run whose loss or gradient is no number any more, before anything of it is saved.

    A gradient that overflowed half precision is skipped by its scaler and does no harm.
    """
    if math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled()):
        return
    saved = run.steps()
    kept = f"the last good checkpoint is {run.checkpoint(saved[-1])}" if saved else "no checkpoint was saved yet"
    raise TrainingStopped(
        f"stopped at step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; {kept}. Lower train.lr or use precision "
        "float32 or bf16"
    )


def load_generator_run(folder: str | Path, weights: Literal["live", "best"] = "live") -> Generator:
    """The generator of a run folder or model folder, in evaluation mode; see `lexel.load`."""
    return load_generator(folder, None if weights == "live" else weights)
