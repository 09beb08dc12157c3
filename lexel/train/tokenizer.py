"""Training of tokenizers: one loop that reads from top to bottom.

The order within a step is that of IBQ (https://arxiv.org/abs/2412.02692): the discriminator learns on the current
reconstructions, then the tokenizer learns against the updated discriminator. `discriminator.first = false` is VQGAN's
order (https://arxiv.org/abs/2012.09841): the tokenizer first, then the discriminator on new reconstructions.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lexel import provenance
from lexel.checkpoint import load_strict
from lexel.data import training_batches
from lexel.data.config import open_data
from lexel.distributed import barrier, mean_over_processes
from lexel.losses import LossInputs, adaptive_weight, perturbation
from lexel.losses.perturbation import Codes
from lexel.metrics.health import diagnose, rehearsal
from lexel.quantizers import Quantized, outline
from lexel.quantizers.base import weighted_sum
from lexel.run_folder import TrainingStopped
from lexel.tokenizer import Tokenizer
from lexel.train.adversary import Adversary
from lexel.train.choices import choices, search
from lexel.train.evaluations import while_training
from lexel.train.initialise import initialise
from lexel.train.objective import Objective, gathered
from lexel.train.optimization import (
    RunningMeans,
    WeightAverage,
    frozen,
    fused,
    optimizer_step,
    seed_step,
    set_layout,
    set_learning_rate,
    to_device,
)
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe
from lexel.train.session import Session, StepCallback, TrainingResult, require_parts
from lexel.train.sharding import NAME as SPREAD
from lexel.train.sharding import SpreadCodebook
from lexel.train.validation import validate

__all__ = ["Learner", "TokenizerRecipe", "train_tokenizer"]

COLLAPSED = 1.1  # a perplexity below this is one code


class Forward(NamedTuple):
    """The result of a training pass."""

    images: Tensor  # reconstructions (B, C, H, W), not clamped
    quantized: Quantized
    features: dict[str, Tensor]  # those that losses ask for


class Learner:
    """Everything that changes during training, and one step of learning.

    `parts` names all of it: a checkpoint holds exactly these, and nothing else is needed to go on.
    """

    def __init__(self, recipe: TokenizerRecipe, tokenizer: Tokenizer, processes: Processes) -> None:
        train = recipe.resolved().train
        self.config, self.processes = train, processes
        device = processes.device
        self.weights, self.size = train.weights, recipe.data.size
        self.tokenizer = tokenizer.to(device)
        set_layout(self.tokenizer, train.channels_last)
        self.codebook = SpreadCodebook(self.tokenizer) if train.shard_codebook else None
        self.average = WeightAverage(self.tokenizer, train.average_decay, train.average_warm_up)
        with torch.random.fork_rng(devices=[]):
            seed_step(train.seed, -2, 0)  # projectors begin alike in every process, and shift no other random number
            self.objective = Objective(train, recipe.model, recipe.data.size).to(device)
        self.learning = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        self.learning += self.objective.parameters()
        self.optimizer = torch.optim.Adam(
            self.learning, train.lr, (train.betas[0], train.betas[1]), fused=fused(device, train.precision)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.means = RunningMeans()
        self.perturbation = perturbation.build(train.perturbation) if train.perturbation is not None else None
        self.progress = 0.0  # of the training, in [0, 1]
        self.adversary = None
        if train.discriminator is not None and self.weights.get("adversarial"):
            self.adversary = Adversary(train, train.discriminator, processes)
        self.parts: dict[str, Any] = {
            "model": self.tokenizer,
            "average": self.average,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "means": self.means,
            **(self.adversary.parts if self.adversary is not None else {}),
            **({"objective": self.objective} if self.objective.state_dict() else {}),
        }
        self.spread = [] if self.codebook is None else [self.codebook.parameter]
        self.ddp_module = processes.parallel(
            self.tokenizer, 0 in self.weights.values(), [SPREAD] if self.spread else []
        )
        self.tokenizer.train()
        if recipe.init is not None and recipe.init.what == "decoder":
            self.tokenizer.quantizer.eval()  # codes must not move, not even by statistics

    def state_dict(self) -> dict[str, Any]:
        """All that changes; every process must ask where the codebook is spread over them."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return state if self.codebook is None else self.codebook.gathered(state, self._table())

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        require_parts(state, self.parts, source)
        if self.codebook is not None:
            state = self.codebook.own(state, self._table())
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                load_strict(part, state[name], f"{source} ({name})")
            else:
                part.load_state_dict(state[name])

    def _table(self) -> int | None:
        """The number of a spread codebook among the parameters that learn."""
        return next(
            (number for number, one in enumerate(self.learning) if any(one is own for own in self.spread)), None
        )

    def choices(self, readers: int, images: int) -> dict[str, str]:
        """What was chosen for the device, where `readers` processes read and `images` pass through it at a time."""
        where, count = self.processes.runtime, self.processes.count
        rows = images * math.prod(self.tokenizer.grid(self.size, self.size))
        return {
            **choices(where, self.optimizer, processes=count, readers=readers),
            "layout": "channels last" if self.config.channels_last else "contiguous",
            "search": search(self.tokenizer.quantizer, where.device, rows),
        }

    def whole_average(self) -> contextlib.AbstractContextManager[None]:
        """The average with all its codes for a while, where they are spread over the processes."""
        average = self.average.module
        assert isinstance(average, Tokenizer)
        return contextlib.nullcontext() if self.codebook is None else self.codebook.whole(average)

    def step(self, images: Tensor, adversarial: bool, lr_factor: float) -> dict[str, Tensor]:
        """One step on this process's share of a batch; returns the loss terms, unweighted.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            adversarial: whether the discriminator takes part.
            lr_factor: of the learning rates.
        """
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        size = math.ceil(len(images) / self.config.accumulation)
        micro_batches = [to_device(part, self.processes.device, layout) for part in images.split(size)]
        adversary = self.adversary if adversarial else None
        if adversary is None:
            return self._tokenizer_step(micro_batches, None, lr_factor)
        if not adversary.config.first:
            losses = self._tokenizer_step(micro_batches, adversary, lr_factor)
            return losses | adversary.step(micro_batches, self._reconstructions(micro_batches), lr_factor)

        # One forward pass serves both networks. Only the graphs of several micro-batches would fill the memory that
        # accumulation saves, so there the discriminator gets the reconstructions of a pass of its own.
        forward = self._forward(micro_batches[0]) if len(micro_batches) == 1 else None
        fakes = self._reconstructions(micro_batches) if forward is None else [forward.images.detach()]
        losses = adversary.step(micro_batches, fakes, lr_factor)
        return losses | self._tokenizer_step(micro_batches, adversary, lr_factor, forward)

    def _tokenizer_step(
        self,
        micro_batches: list[Tensor],
        adversary: Adversary | None,
        lr_factor: float,
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """The tokenizer learns to reconstruct, and to look real to the discriminator as it is now."""
        means = RunningMeans()
        self.optimizer.zero_grad(set_to_none=True)
        with frozen(adversary.discriminator if adversary is not None else None):
            for number, images in enumerate(micro_batches):
                with self.processes.no_sync_unless(number == len(micro_batches) - 1, self.ddp_module):
                    reconstruction = self._forward(images) if forward is None else forward
                    with self.processes.runtime.autocast():
                        inputs = LossInputs(images, reconstruction.images, reconstruction.features)
                        terms, reconstruction_loss, others = self.objective(inputs, self.tokenizer.encoder)
                        terms |= reconstruction.quantized.losses
                        loss = reconstruction_loss + weighted_sum(reconstruction.quantized.losses, self.weights)
                        loss = loss if others is None else loss + others
                        if adversary is not None:
                            terms["adversarial"] = adversary.generator_loss(reconstruction.images)
                            weight = self._adversarial_weight(reconstruction_loss, terms["adversarial"])
                            loss = loss + weight * terms["adversarial"]
                            terms["adversarial_weight"] = weight
                    self.scaler.scale(loss / len(micro_batches)).backward()
                means.add({**terms, "loss": loss})
        self.objective.average_gradients()
        set_learning_rate(self.optimizer, lr_factor * self.config.lr)
        norm = optimizer_step(self.optimizer, self.scaler, self.learning, self.config.clip, self.spread)
        self.average.update(self.tokenizer)
        return {**means.tensors(), "gradient_norm": norm}

    def _forward(self, images: Tensor) -> Forward:
        grid = self.tokenizer.grid(images.shape[2], images.shape[3])
        with self.processes.runtime.autocast(), gathered(self.tokenizer, self.objective.features, grid) as features:
            images, quantized = self.ddp_module(images, **self._perturbing())
        return Forward(images, quantized, {name: features[name] for name in self.objective.features})

    @torch.no_grad()
    def _reconstructions(self, micro_batches: list[Tensor]) -> list[Tensor]:
        """The reconstructions that a training pass gives: the same random numbers, and no statistics move."""
        with rehearsal(self.tokenizer), self.processes.runtime.autocast():
            return [self.tokenizer(images, **self._perturbing()).images for images in micro_batches]

    def _perturbing(self) -> dict[str, Callable[[Codes], Tensor]]:
        return {} if self.perturbation is None else {"perturb": partial(self.perturbation, progress=self.progress)}

    def _adversarial_weight(self, reconstruction_loss: Tensor, adversarial: Tensor) -> Tensor:
        weight = torch.full((), self.weights["adversarial"], device=reconstruction_loss.device)
        if self.config.discriminator is None or not self.config.discriminator.adaptive:
            return weight
        over = self.config.discriminator.adaptive_over
        ratio = adaptive_weight(reconstruction_loss, adversarial, self.tokenizer.last_layer, over)
        return weight * mean_over_processes(ratio)  # one weight for all processes


def train_tokenizer(
    recipe: TokenizerRecipe,
    out: str | Path,
    *,
    device: str = "auto",
    initial: Tokenizer | None = None,
    progress: StepCallback | None = None,
) -> TrainingResult[Tokenizer]:
    """Trains a tokenizer in a run folder; called again with the same recipe it goes on, bit for bit.

    SIGTERM and SIGINT end it after the step at hand, which is saved.

    Args:
        recipe: what to train.
        out: the run folder: see `RunFolder`. At the end it holds the averaged weights as a model folder too.
        device: "auto", "cpu", "cuda", ...; a distributed launch decides itself.
        initial: the model behind `recipe.init.source`, if it was loaded already.
        progress: called after every step.

    Raises:
        UsageError: the recipe, the images or the run folder do not allow it.
        TrainingStopped: the loss became NaN, the codebook collapsed, or the disk is full; the last good checkpoint
            is kept.
    """
    recipe = recipe.resolved()
    config, data = recipe.train, recipe.data
    images, held_out = open_data(data)
    held_out.first_readable("validation images")
    processes = Processes(device, config.precision, config.trackers, Path(out))
    names = {"training": images.names, "validation": held_out.names}
    with Session(recipe, out, processes, names, best="psnr", progress=progress) as session:
        seed_step(config.seed, -1, 0)  # all processes begin with the same weights
        # What only the start needs, such as a bank of vectors, may be gone when a run goes on.
        before = session.saved("model")
        tokenizer = Tokenizer(recipe.model) if before is None else Tokenizer.with_weights(recipe.model, *before)
        if recipe.init is not None:
            initialise(tokenizer, recipe.init, initial, load=not session.resumed)
        learner = Learner(recipe, tokenizer, processes)
        session.resume(learner)
        average = learner.average.module
        assert isinstance(average, Tokenizer)
        transform = data.make_transform()
        share = {"rank": processes.rank, "processes": processes.count, "micro_batches": config.accumulation}
        batches = training_batches(
            images, transform, config.batch_size, config.seed, session.first, **share, **data.loading
        )
        session.pace = batches.pace
        session.chose(learner.choices(batches.pace.workers, session.micro_batch))
        start = math.inf if learner.adversary is None else learner.adversary.config.start
        unreadable: dict[str, str] = {}
        measuring = while_training(config.evaluations, processes, session.micro_batch, data)
        for step in session.steps():
            batch = next(batches)
            tokenizer.quantizer.anneal(step.progress)
            learner.progress = step.progress
            losses = learner.step(batch.images, step.number >= start * step.unit, step.lr_factor)
            left_out = {"unreadable": len(batches.unreadable)} if batches.unreadable else {}
            session.log(step, losses, {"lr": step.lr_factor * config.lr, **left_out})
            if step.validates:
                with learner.whole_average():
                    measured = validate(
                        average,
                        held_out,
                        transform,
                        session.micro_batch,
                        processes,
                        config.validation_images,
                        learner.objective.lpips,
                        data.workers,
                        data.on_error,
                    )
                unreadable |= measured.unreadable
                processes.decide(partial(check_collapse, session, step.done, measured.values))
                session.validated(step, measured.values, measured.snapshot)
            for evaluation in session.due(config.evaluations, step):
                with learner.whole_average():
                    session.evaluated(step, evaluation.named(evaluation.run(average, measuring)))
            session.save(step)
        if learner.codebook is not None:
            learner.codebook.end(tokenizer, average)
        if session.finished and processes.is_main:
            average.save_pretrained(
                session.run.path, provenance.of_run(recipe.model_dump(mode="json"), session.done, "average")
            )
    barrier()
    return TrainingResult(tokenizer, average, session.done, session.finished, unreadable | batches.unreadable)


def check_collapse(session: Session, step: int, values: Mapping[str, float | None]) -> None:
    """Ends a run whose averaged weights give NaN, or whose codebook has been a single code for long.

    Raises:
        TrainingStopped: says since when, the likely cause and what to change.
    """
    recipe = session.recipe
    assert isinstance(recipe, TokenizerRecipe)
    line = {name: value for name, value in values.items() if value is not None}
    if not math.isfinite(line["psnr"]) and line["l1"] != 0:
        raise TrainingStopped(
            f"stopped at step {step}: the averaged weights give no images (l1 {line['l1']}). {session.kept()}"
        )
    patience = recipe.train.collapse_patience
    if not patience or "perplexity" not in line:
        return
    recent = [*session.run.last_lines("validation", patience), {"step": step, **line}][-patience:]
    if len(recent) == patience and all(row.get("perplexity", math.inf) < COLLAPSED for row in recent):
        finding = diagnose(outline(recipe.model.quantizer), recent)[0]
        raise TrainingStopped(
            f"stopped at step {step}: the codebook collapsed, perplexity below {COLLAPSED} in {patience} validations "
            f"({finding.seen}). {session.kept()} Likely cause: {finding.cause}. Try: {finding.change}"
        )
