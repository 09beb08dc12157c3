"""Training of generators: one loop that reads from top to bottom.

Published as https://arxiv.org/abs/2412.02692: AdamW, a short warm-up and a linear fall, labels dropped to the null
class with probability 0.1, gradients clipped at norm 1. The published code decays norms and biases too; so does the
default.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lexel import checkpoint, provenance, shards
from lexel.data import to_uint8
from lexel.data.tokens import TokenBatch
from lexel.distributed import all_sum, barrier
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig, TrainingLosses, family_of
from lexel.loading import load_generator
from lexel.run_folder import SHARDS
from lexel.tokenizer import Tokenizer
from lexel.train.choices import choices
from lexel.train.evaluations import while_training
from lexel.train.generator_recipe import GeneratorRecipe, GeneratorTrainConfig
from lexel.train.initialise import initialise_generator
from lexel.train.optimization import (
    RunningMeans,
    WeightAverage,
    fused,
    optimizer_step,
    seed_step,
    set_learning_rate,
    to_device,
)
from lexel.train.processes import Processes
from lexel.train.session import Session, StepCallback, TrainingResult, require_parts
from lexel.train.tokens import TokenSource, entropy_bits

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule  # imported where it is used: with it comes PyTorch's compiler

__all__ = ["GeneratorRecipe", "Learner", "train_generator"]

SHOWN = 8  # samples in the snapshot of the last step


# ---------------------------------------------------------------------------------------------- the learner


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The published groups of parameters: matrices and embeddings; then norms and biases."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"name": "matrices", "params": [parameter for parameter in parameters if parameter.dim() >= 2]},
        {"name": "norms", "params": [parameter for parameter in parameters if parameter.dim() < 2]},
    ]


class Learner:
    """Everything that changes during training, and one step of learning."""

    def __init__(self, config: GeneratorTrainConfig, generator: Generator, processes: Processes) -> None:
        self.config, self.processes = config, processes
        device = processes.device
        self.generator = generator.to(device)
        self.generator.transformer.checkpointing = config.checkpointing
        if config.fsdp:
            shard(self.generator, processes)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(generator),
            config.lr,
            (config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=fused(device, config.precision),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.means = RunningMeans()
        self.average: WeightAverage | None = None
        if config.average_decay is not None:
            self.average = WeightAverage(self.generator, config.average_decay, config.average_warm_up)
        losses = TrainingLosses(generator)
        self.ddp_module = losses if config.fsdp else processes.parallel(losses)
        self.generator.train()
        # Of its own: what it sends in the background must not mix with what training sends.
        self._writers = torch.distributed.new_group(backend="gloo") if config.sharded_checkpoints else None

    def choices(self, readers: int) -> dict[str, str]:
        """What was chosen for the device, where `readers` processes read images."""
        return choices(self.processes.runtime, self.optimizer, processes=self.processes.count, readers=readers)

    @property
    def measured(self) -> Generator:
        """The model that is validated and exported: the averaged generator where there is one."""
        return self.generator if self.average is None else cast(Generator, self.average.module)

    def tensors(self) -> dict[str, Tensor]:
        """The whole weights, on the CPU; every process must ask when they are sharded."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_model_state_dict(self.generator, options=whole))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """All that changes. The optimizer's part names parameters, so that a run may change its number of processes."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        # Weights first: asking for them shards those again that a forward pass has left gathered.
        model = self.tensors()
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = get_optimizer_state_dict(self.generator, self.optimizer, options=whole)
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {**self._plain(), "model": model, **average, "optimizer": optimizer}

    def _plain(self) -> dict[str, Any]:
        """The part of the state that no process holds a share of."""
        return {
            "config": self.generator.config.model_dump(mode="json"),
            "scaler": self.scaler.state_dict(),
            "means": self.means.state_dict(),
        }

    @property
    def sharded(self) -> bool:
        """Whether every process writes what it holds."""
        return self._writers is not None

    def begin_state_dict(self) -> tuple[dict[str, Any], Callable[[Path], shards.Writing]]:
        """The plain part of all that changes, and what begins to write the tensors to a folder."""
        group = self._writers
        assert group is not None
        tensors, groups = self._shared_tensors()
        return {**self._plain(), "param_groups": groups}, lambda folder: shards.begin(folder, tensors, group)

    def _shared_tensors(self) -> tuple[dict[str, Any], Any]:
        """Weights and moments, of which each process holds its share or all; and the optimizer's options."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        model = get_model_state_dict(self.generator)  # weights first, as above
        optimizer = get_optimizer_state_dict(self.generator, self.optimizer)
        return {"model": model, "optimizer": optimizer["state"]}, optimizer["param_groups"]

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        from torch.distributed.checkpoint import state_dict as states

        averages = [] if self.average is None else ["average"]
        sharded = "shards" in state
        tensors = ["param_groups"] if sharded else ["model", "optimizer", *averages]
        require_parts(state, [*tensors, "scaler", "means"], source)
        if sharded:
            shared, _ = self._shared_tensors()
            shards.load(source.with_suffix(SHARDS), shared)
            optimizer = {"state": shared["optimizer"], "param_groups": state["param_groups"]}
            state = {**state, "model": shared["model"], "optimizer": optimizer}
        options = states.StateDictOptions(full_state_dict=not sharded)
        if sharded or self.config.fsdp:
            states.set_model_state_dict(self.generator, dict(state["model"]), options=options)
        else:
            checkpoint.load_strict(self.generator, state["model"], source)
        optimizer = dict(state["optimizer"])
        states.set_optimizer_state_dict(self.generator, self.optimizer, optimizer, options=options)
        if self.average is not None:
            checkpoint.load_strict(self.average, state["average"], source)
        self.scaler.load_state_dict(state["scaler"])
        self.means.load_state_dict(state["means"])

    def step(self, batch: TokenBatch, lr: float, decay: float) -> dict[str, Tensor]:
        """One step on this process's share of a batch; returns the loss terms."""
        device = self.processes.device
        size = math.ceil(len(batch.indices) / self.config.accumulation)
        indices = to_device(batch.indices, device).split(size)
        conditions = to_device(self.generator.condition.of_batch(batch), device).split(size)

        total = torch.zeros((), device=device)
        logged: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, (tokens, condition) in enumerate(zip(indices, conditions, strict=True)):
            with self._no_sync_unless(last=number == len(indices) - 1):
                with self.processes.runtime.autocast():
                    terms = self.ddp_module(tokens, condition)
                    loss = torch.stack(list(terms.values())).sum()
                self.scaler.scale(loss / len(indices)).backward()
            total += loss.detach() / len(indices)
            for name, term in terms.items():
                logged[name] = logged.get(name, 0.0) + term.detach() / len(indices)

        set_learning_rate(self.optimizer, lr)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = decay if group["name"] == "matrices" or self.config.decay_norms else 0.0
        norm = optimizer_step(self.optimizer, self.scaler, list(self.generator.parameters()), self.config.clip)
        if self.average is not None:
            self.average.update(self.generator)
        if hasattr(norm, "full_tensor"):  # of weights spread over the processes
            norm = norm.full_tensor()
        if logged.keys() == {"nll"}:  # the loss is the likelihood: told in bits, as validation tells it
            logged = {"bits_per_token": total / math.log(2)}
        return {"loss": total, **logged, "gradient_norm": norm}

    def _no_sync_unless(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Averages gradients over processes with the last micro-batch only."""
        if self.config.fsdp:
            cast("FSDPModule", self.generator).set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return self.processes.no_sync_unless(last, self.ddp_module)


def shard(generator: Generator, processes: Processes) -> None:
    """Spreads weights over the processes, block by block (FSDP); they are gathered as they are needed."""
    if not torch.distributed.is_initialized():
        raise UsageError("train.fsdp needs several processes; start them with `accelerate launch`, or set it to false")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for layer in generator.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(generator, mesh=mesh)
    for method in ("losses", "nll"):
        register_fsdp_forward_method(generator, method)


@torch.no_grad()
def validate(learner: Learner, source: TokenSource, batch_size: int, limit: int | None) -> dict[str, float | None]:
    """Bits per token of images not learned from, beside the entropy of the unigram distribution.

    For a family without a likelihood its `loss` instead, with random numbers that the images' numbers decide.
    """
    generator, processes = learner.measured.eval(), learner.processes
    device = processes.device
    if not generator.has_likelihood:
        return _validation_loss(learner, source, batch_size, limit)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    histogram = torch.zeros(generator.config.transformer.codebook_size, dtype=torch.int64, device=device)
    batches = source.measured(batch_size, limit, processes.rank, processes.count)
    for indices, condition, real in _padded(batches, processes, generator):
        with processes.runtime.autocast():
            nll = generator.nll(indices, condition)
        assert nll is not None
        nll = nll.double()
        count = torch.full((), nll[:real].numel(), device=device, dtype=torch.float64)
        sums += torch.stack([nll[:real].sum(), count])
        histogram += torch.bincount(indices[:real].flatten(), minlength=len(histogram))
    learner.generator.train()
    nats, count = all_sum(sums).tolist()
    histogram = all_sum(histogram)
    return {
        "bits_per_token": nats / max(count, 1) / math.log(2),
        "histogram_bits": entropy_bits(histogram) if source.histogram_bits is None else source.histogram_bits,
        "tokens": count,
    }


def _validation_loss(
    learner: Learner, source: TokenSource, batch_size: int, limit: int | None
) -> dict[str, float | None]:
    generator, processes = learner.measured, learner.processes
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)  # loss, images
    batches = source.measured(batch_size, limit, processes.rank, processes.count)
    for number, (tokens, condition, real) in enumerate(_padded(batches, processes, generator)):
        with torch.random.fork_rng(), processes.runtime.autocast():
            torch.manual_seed(number * processes.count + processes.rank)
            loss = torch.stack(list(generator.losses(tokens, condition).values())).sum()
        sums += torch.stack([loss.double() * real, torch.full_like(loss, real, dtype=torch.float64)])
    learner.generator.train()
    total, count = all_sum(sums).tolist()
    return {"loss": total / max(count, 1), "images": count}


def _padded(
    batches: Iterator[TokenBatch], processes: Processes, generator: Generator
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(tokens, condition, how many are real) on the device.

    Sharded weights are gathered by all processes together, so a process without images goes on with an empty share
    until all are through.
    """
    device = processes.device
    nothing = generator.nothing(1)
    while True:
        batch = next(batches, None)
        if not processes.any(batch is not None):
            return
        if batch is None:
            yield nothing, generator.condition.example(1).to(device), 0
        else:
            yield batch.indices.to(device), generator.condition.of_batch(batch).to(device), len(batch.indices)


# ---------------------------------------------------------------------------------------------- the loop


def train_generator(
    recipe: GeneratorRecipe,
    out: str | Path,
    *,
    device: str = "auto",
    initial: Generator | None = None,
    progress: StepCallback | None = None,
) -> TrainingResult[Generator]:
    """Trains a generator in a run folder; called again with the same recipe it goes on, bit for bit.

    SIGTERM and SIGINT end it after the step at hand, which is saved.

    Args:
        recipe: what to train.
        out: the run folder: see `RunFolder`. At the end it holds the weights as a model folder too, and in `tokenizer/`
            the tokenizer that the recipe names.
        device: "auto", "cpu", "cuda", ...; a distributed launch decides itself.
        initial: the generator behind `recipe.init.source`, if it was loaded already.
        progress: called after every step.

    Raises:
        UsageError: the recipe, the tokens or the run folder do not allow it.
        TrainingStopped: the loss became NaN, or the disk is full; the last good checkpoint is kept.
    """
    config = recipe.train
    processes = Processes(device, config.precision, config.trackers, Path(out))
    source = TokenSource(recipe, processes.runtime)
    family = family_of(recipe.generator)
    with Session(
        recipe,
        out,
        processes,
        source.names,
        tokenizer=source.fingerprint,
        best="bits_per_token" if family.has_likelihood else "loss",
        higher_is_better=False,
        progress=progress,
    ) as session:
        seed_step(config.seed, -1, 0)  # all processes begin with the same weights
        generator = Generator(
            GeneratorConfig(transformer=recipe.generator, tokenizer=source.fingerprint, class_names=source.class_names)
        )
        if generator.needs_tokenizer:
            if source.tokenizer is None:
                raise UsageError(f"a {recipe.generator.kind} generator sees the vectors of codes; set data.tokenizer")
            generator.attach(source.tokenizer)
        if recipe.init is not None and not session.resumed:
            initialise_generator(generator, recipe.init.source, initial)
        learner = Learner(config, generator, processes)
        session.resume(learner)
        batches = source.batches(config, session.first, processes.rank, processes.count)
        session.chose(learner.choices(source.workers))
        measuring = while_training(config.evaluations, processes, session.micro_batch, recipe.data.images)
        for step in session.steps():
            lr, decay = config.lr * step.lr_factor, config.decay(step.number, step.steps)
            generator.anneal(step.number / step.steps)
            losses = learner.step(next(batches), lr, decay)
            session.pace = source.pace
            session.log(step, losses, {"lr": lr})
            if step.validates:
                session.validated(step, validate(learner, source, session.micro_batch, config.validation_images))
            for evaluation in session.due(config.evaluations, step):
                result = evaluation.run(learner.measured.eval(), source, config.seed, processes, measuring)
                session.evaluated(step, evaluation.named(result))
                generator.train()
            session.save(step)
        if session.finished:
            tensors = learner.tensors() if learner.average is None else learner.measured.state_dict()
            if processes.is_main:
                weights = "live" if learner.average is None else "average"
                exported = Generator.with_weights(generator.config, tensors, session.run.path)
                origin = provenance.of_run(recipe.model_dump(mode="json"), session.done, weights)
                exported.save_pretrained(session.run.path, source.tokenizer, origin)
                if source.tokenizer is not None:
                    exported.attach(source.tokenizer)
                    samples = show(exported.to(processes.device), source.tokenizer, config.seed)
                    session.run.snapshot(session.done, {"samples": samples})
    barrier()
    return TrainingResult(generator.eval(), learner.measured, session.done, session.finished, source.unreadable)


def show(generator: Generator, tokenizer: Tokenizer, seed: int) -> Tensor:
    """Samples for the report: one for each of the first classes, uint8 (SHOWN, H, W, 3)."""
    condition = generator.condition.shown(SHOWN)
    return torch.from_numpy(to_uint8(tokenizer.decode(generator.sample(condition, seed=seed))))


def load_generator_run(folder: str | Path) -> Generator:
    """The generator of a run folder or model folder; an earlier name of `lexel.load`, which scripts still call."""
    return load_generator(folder)
