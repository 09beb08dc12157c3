"""Many small trainings at once on one GPU: every one is a CUDA graph of a whole step, replayed on a stream of its own.

A step of a small network is some hundred kernels of microseconds, which a process launches one by one while the device
waits. Here a step, with its batch, learning rate and averages, is captured once for every quantizer and size, and a
dozen graphs run side by side; other seeds and lengths use the same graph with other weights. The arithmetic is that of
`lexel compare`: the runs are those of `lexel.compare.expand`, the modules are Lexel's. Two things differ. Searches and
index backpropagation are dense (a graph cannot wait for a number of near codes), in float32; and pictures are drawn
from a table made by the seed, so a row is another draw of the same experiment, not the same bits.

    python -m benchmarks many cifar10 --quantizers vq,ibq --steps 1000,5000 --seeds 0,1 --out many.json
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.compare import expand, read_variants
from lexel.compare.plan import UNQUANTIZED, PlannedRun
from lexel.compare.summary import summarise
from lexel.data.config import DataConfig, open_data
from lexel.data.images import ImageSet
from lexel.errors import UsageError
from lexel.kernels import oracle
from lexel.kernels.inputs import Inputs, as_scores
from lexel.losses import LPIPS, l1
from lexel.metrics.health import CodeHistogram, gradient_health
from lexel.metrics.pixels import psnr
from lexel.quantizers.base import weighted_sum
from lexel.quantizers.living import LivingCodebook
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.optimization import seed_step
from lexel.train.tokenizer import TokenizerRecipe

METRICS = (
    "psnr",
    "lpips_vgg",
    "usage",
    "usage_of_possible",
    "perplexity",
    "relative_error",
    "dimensions",
    "gradient_ratio",
    "gradient_cosine",
)
AHEAD = 100  # replays of a training that wait in its queue


@torch.no_grad()
def dense_nearest(z: Tensor, codebook: Tensor, similarity: str = "l2", implementation: str = "auto") -> Tensor:
    """`lexel.kernels.nearest` with one N x K tensor of float32 scores."""
    queries, keys, distance = as_scores(z, codebook, similarity)
    scores = queries @ keys.T
    return (scores - keys.square().sum(1) if distance else scores).argmax(1)


def dense_index_backpropagation(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`oracle.index_backpropagation` with one softmax and no one-hot."""
    queries, keys = inputs.queries, inputs.keys
    codes = keys if inputs.codes is None else inputs.codes
    logits = queries @ keys.T
    if inputs.distance:
        logits = logits - keys.square().sum(1)
    indices = logits.detach().argmax(1)
    soft = (logits / inputs.temperature).softmax(1) @ codes.detach()
    chosen = F.embedding(indices, codes)
    z_q = chosen + (soft - soft.detach())
    if not inputs.entropy:
        return z_q, chosen, indices, logits.new_zeros(()), logits.new_zeros(())
    log_q = (logits / inputs.entropy_temperature).log_softmax(1)
    q = log_q.exp()
    mean = q.mean(0)
    return z_q, chosen, indices, -(q * log_q).sum(1).mean(), -(mean * (mean + oracle.EPS).log()).sum()


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """Inside, quantizers search and differentiate with dense tensors, which a CUDA graph can hold."""
    with contextlib.ExitStack() as stack:
        for module in ("base", "projected", "ema", "ibq_affine"):
            stack.enter_context(mock.patch(f"lexel.quantizers.{module}.nearest", dense_nearest))
        stack.enter_context(mock.patch.object(oracle, "index_backpropagation", dense_index_backpropagation))
        kernel = "lexel.kernels.index_backpropagation.choose_implementation"
        stack.enter_context(mock.patch(kernel, return_value="oracle"))
        yield


class Training:
    """One training after another of a quantizer at a size: the same kernels on the same tensors.

    Args:
        planned: the first of them.
        pictures: uint8 (N, 3, H, W) on the device.
        longest: the most steps that any of them takes.
        device: where it runs.
    """

    def __init__(self, planned: PlannedRun, pictures: Tensor, longest: int, device: torch.device) -> None:
        self.pictures, self.device = pictures, device
        train = planned.recipe.train
        self.recipe, self.batch = planned.recipe, train.batch_size
        self.weights = planned.recipe.resolved().train.weights
        self.tokenizer = Tokenizer(planned.recipe.model).to(device).train()
        quantizer = self.tokenizer.quantizer
        if quantizer.restart_below or planned.recipe.model.quantizer.get("start") == "kmeans":
            raise UsageError(
                f"{planned.label} waits for the device in its steps, which a graph cannot; use lexel compare"
            )
        if type(quantizer).anneal is not LivingCodebook.anneal:
            raise UsageError(
                f"{planned.label} has a schedule of its own, which a graph cannot follow; use lexel compare"
            )
        self.learning = [each for each in self.tokenizer.parameters() if each.requires_grad]
        self.average = [each.detach().clone() for each in self.tokenizer.parameters()]
        self.lr = torch.zeros((), device=device)
        graphed = device.type == "cuda"
        lr: Any = self.lr
        self.optimizer = torch.optim.Adam(self.learning, lr, (train.betas[0], train.betas[1]), capturable=graphed)
        self.order = torch.zeros(longest, self.batch, dtype=torch.int64, device=device)
        self.rates = torch.zeros(longest, device=device)
        self.decays = torch.zeros(longest, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(device) if graphed else None
        self.load(planned)

    @torch.no_grad()
    def load(self, planned: PlannedRun) -> None:
        """Begins another training: in place, since a graph knows addresses."""
        self.planned = planned
        train = planned.recipe.train
        assert train.steps is not None
        seed_step(train.seed, -1, 0)
        fresh = Tokenizer(planned.recipe.model)
        self.tokenizer.load_state_dict(fresh.state_dict(), strict=True)
        for averaged, parameter in zip(self.average, self.tokenizer.parameters(), strict=True):
            averaged.copy_(parameter)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        steps, generator = train.steps, torch.Generator().manual_seed(train.seed)
        epochs = math.ceil(steps * self.batch / len(self.pictures))
        order = torch.cat([torch.randperm(len(self.pictures), generator=generator) for _ in range(epochs)])
        self.order[:steps] = order[: steps * self.batch].view(steps, self.batch).to(self.device)
        rates = [train.lr * train.schedule.factor(step, steps) for step in range(steps)]
        self.rates[:steps] = torch.tensor(rates, device=self.device)
        decay = train.average_decay
        decays = [min(decay, (2 + step) / (11 + step)) if train.average_warm_up else decay for step in range(steps)]
        self.decays[:steps] = torch.tensor(decays, device=self.device)
        self.number.zero_()
        self.loss.zero_()
        self.done, self.steps = 0, steps

    def step(self) -> None:
        """One step of learning, without a word from the host."""
        images = self.pictures[self.order[self.number].flatten()].float() / 127.5 - 1
        self.lr.copy_(self.rates[self.number].squeeze())
        quantizer = self.tokenizer.quantizer
        z = self.tokenizer.latents(images)
        quantized = quantizer(z)
        picture = l1(self.tokenizer.decode_codes(quantized.z_q), images)
        loss = self.weights["l1"] * picture + weighted_sum(quantized.losses, self.weights)
        for parameter in self.learning:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.learning if each.grad is not None])
        if self.recipe.train.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.learning, self.recipe.train.clip, norm)
        self.optimizer.step()
        with torch.no_grad():
            rate = 1 - self.decays[self.number].squeeze()
            changes = torch._foreach_sub(list(self.tokenizer.parameters()), self.average)
            torch._foreach_mul_(changes, rate)
            torch._foreach_add_(self.average, changes)
            self.loss.lerp_(picture.detach(), 0.02)
            self.number += 1

    def capture(self) -> None:
        """Records a step; the training begins anew afterwards."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step()
        self.load(self.planned)
        torch.cuda.current_stream().synchronize()

    def advance(self, count: int) -> None:
        """Queues the next steps, or does them where there is no graph."""
        count = min(count, self.steps - self.done)
        if self.graph is None:
            for _ in range(count):
                self.step()
        else:
            with torch.cuda.stream(self.stream):
                for _ in range(count):
                    self.graph.replay()
                self.event = torch.cuda.Event()
                self.event.record()
        self.done += count

    @property
    def idle(self) -> bool:
        """Whether all that was queued is done."""
        return self.graph is None or self.done == 0 or self.event.query()

    @torch.no_grad()
    def measure(self, held_out: Tensor, lpips: LPIPS | None, lpips_images: int) -> dict[str, Any]:
        """The averaged weights on held-out pictures (N, 3, H, W), as `lexel compare` measures."""
        tokenizer = self.tokenizer
        kept = [parameter.clone() for parameter in tokenizer.parameters()]
        for parameter, averaged in zip(tokenizer.parameters(), self.average, strict=True):
            parameter.copy_(averaged)
        tokenizer.eval()
        continuous = tokenizer.continuous
        histogram = None if continuous else CodeHistogram(tokenizer.codebook_size, device=self.device)
        values: list[Tensor] = []
        distances: list[Tensor] = []
        errors: list[Tensor] = []
        for part in held_out.split(256):
            images = part.float() / 127.5 - 1
            z = tokenizer.latents(images)
            z_q = z
            if histogram is not None:
                indices = tokenizer.quantizer.assign(z)
                histogram.add(indices)
                z_q = tokenizer.quantizer.indices_to_codes(indices)
                errors.append(torch.stack([(z - z_q).square().mean(), z.var(0, correction=0).mean()]))
            reconstructions = tokenizer.decode_codes(z_q).clamp(-1, 1)
            values.append(psnr(images, reconstructions))
            if lpips is not None and sum(map(len, distances)) < lpips_images:
                distances.append(lpips(images, reconstructions))
        metrics: dict[str, float] = {"psnr": torch.cat(values).mean().item()}
        if distances:
            metrics["lpips_vgg"] = torch.cat(distances).mean().item()
        health = {}
        if histogram is not None:
            tokens = int(histogram.counts.sum())
            shown = 1 - (1 - 1 / tokenizer.codebook_size) ** tokens  # of evenly used codes
            metrics |= {"usage": histogram.usage, "perplexity": histogram.perplexity}
            metrics["usage_of_possible"] = histogram.usage / shown
            error, spread = torch.stack(errors).mean(0).tolist()
            metrics["relative_error"] = error / max(spread, 1e-30)
            covariance = torch.cov(z.movedim(1, -1).flatten(0, -2).double().T)
            metrics["dimensions"] = (covariance.trace() ** 2 / covariance.square().sum()).item()
            found = gradient_health(tokenizer, held_out[:32].float() / 127.5 - 1)
            health = {"gradient_ratio": found.ratio, "gradient_cosine": found.cosine}
        for parameter, live in zip(tokenizer.parameters(), kept, strict=True):
            parameter.copy_(live)
        tokenizer.train()
        return {"metrics": metrics, **health, "l1": self.loss.item()}


def as_array(images: ImageSet, size: int, limit: int | None) -> Tensor:
    """Pictures of a set as uint8 (N, 3, size, size): the middle square of those that are larger."""
    chosen = np.linspace(0, len(images) - 1, min(limit or len(images), len(images))).round().astype(int)
    pictures = []
    for number in chosen:
        picture = images.read(int(number))
        top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
        pictures.append(picture[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(pictures)).movedim(3, 1).contiguous()


def train_all(
    runs: Sequence[PlannedRun],
    pictures: tuple[Tensor, Tensor],
    device: torch.device,
    slots: int,
    deadline: float,
    lpips: LPIPS | None = None,
    lpips_images: int = 512,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of all runs, and the names of those for which there was no time; long runs begin first.

    Args:
        runs: of one size of picture.
        pictures: to learn from and held out, uint8 (N, 3, H, W).
        slots: how many run at a time.
        deadline: of time.perf_counter(); what is not finished by then is dropped.
    """
    train, held_out = (part.to(device) for part in pictures)
    groups: dict[tuple[Any, ...], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.label, run.codebook_size, run.codebook_dim), []).append(run)
    # A training for each group, longest queue first; a group with many runs may take several slots.
    queues = sorted(groups.values(), key=lambda group: -sum(run.recipe.train.steps or 0 for run in group))
    for queue in queues:
        queue.sort(key=lambda run: -(run.recipe.train.steps or 0))
    results: list[dict[str, Any]] = []
    active: list[tuple[Training, list[PlannedRun]]] = []
    waiting = list(queues)
    while (waiting or active) and time.perf_counter() < deadline:
        while waiting and len(active) < slots:
            queue = waiting.pop(0)
            longest = max(run.recipe.train.steps or 0 for run in queue)
            training = Training(queue.pop(0), train, longest, device)
            if device.type == "cuda":
                training.capture()
            active.append((training, queue))
            for other, _ in active:
                if other.idle and other.done < other.steps:
                    other.advance(AHEAD)
        for training, queue in list(active):
            if not training.idle:
                continue
            if training.done < training.steps:
                training.advance(AHEAD)
                continue
            planned = training.planned
            result = {
                "name": f"{planned.name}-{training.steps}",
                "quantizer": planned.label,
                "codebook_size": planned.codebook_size,
                "codebook_dim": planned.codebook_dim,
                **({} if planned.label == UNQUANTIZED else {"bits": math.log2(planned.codebook_size)}),
                "seed": planned.seed,
                "steps": training.steps,
                "stopped": None,
                **training.measure(held_out, lpips, lpips_images),
            }
            results.append(result)
            if queue:
                training.load(queue.pop(0))
                if device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
                training.advance(AHEAD)
            else:
                active.remove((training, queue))
        if device.type == "cuda":
            time.sleep(0.0005)
    done = {result["name"] for result in results}
    return results, [
        f"{run.name}-{run.recipe.train.steps}" for run in runs if f"{run.name}-{run.recipe.train.steps}" not in done
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a tokenizer's recipe, as for `lexel compare`")
    parser.add_argument("--quantizers", required=True)
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--sizes", default="")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", default="1000")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--limit", type=int, help="held-out pictures")
    parser.add_argument("--lpips", action="store_true")
    parser.add_argument("--slots", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    device = torch.device(arguments.device)
    variants = read_variants(arguments.variants) if arguments.variants else {}
    numbers = {name: [int(n) for n in getattr(arguments, name).split(",") if n] for name in ("sizes", "seeds", "steps")}
    planned: list[PlannedRun] = []
    for steps in numbers["steps"]:
        recipe = load_recipe(arguments.recipe, [*arguments.set, f"train.steps={steps}"])
        assert isinstance(recipe, TokenizerRecipe)
        names = arguments.quantizers.split(",")
        planned += expand(recipe, names, numbers["sizes"], [], numbers["seeds"], variants)
    data = recipe.data
    assert isinstance(data, DataConfig)
    train, held_out = open_data(data)
    pictures = as_array(train, data.size, None), as_array(held_out, data.size, arguments.limit)
    lpips = LPIPS("vgg").to(device) if arguments.lpips else None
    with dense():
        results, dropped = train_all(planned, pictures, device, arguments.slots, started + arguments.seconds, lpips)
    rows = []
    for steps in numbers["steps"]:
        rows += [{"steps": steps, **row} for row in summarise([r for r in results if r["steps"] == steps])]
    arguments.out.write_text(json.dumps({"rows": rows, "runs": results, "dropped": dropped}, indent=1))
    for row in rows:
        numbers_of = {name: row[name]["mean"] for name in METRICS if row.get(name) and row[name]["mean"] is not None}
        shown = (f"{name} {value:.4g}" for name, value in numbers_of.items())
        print(f"{row['steps']:6} {row['quantizer']:24} {row['codebook_size']:6}", *shown, flush=True)
    print(f"{len(results)} trainings in {time.perf_counter() - started:.0f} s; dropped: {len(dropped)}")
