"""Validation of a tokenizer under training, on images it does not learn from."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.data import Batch as LoadedBatch
from lexel.data import ImageSet, Transform, ordered_batches, to_uint8
from lexel.data.batches import OnError
from lexel.evaluate.measure import Options, measure, results_of
from lexel.evaluate.metric import Batch, Context, Metric, SamplePlan
from lexel.evaluate.metrics.latents import Latents
from lexel.evaluate.metrics.lpips import LPIPSDistance
from lexel.evaluate.metrics.pixels import L1, PSNR
from lexel.evaluate.metrics.usage import Usage
from lexel.evaluate.prefixes import Prefix
from lexel.evaluate.reconstructions import describe, reconstruct
from lexel.evaluate.sources import Source
from lexel.losses import LPIPS
from lexel.metrics.health import gradient_health
from lexel.metrics.protocols import PROTOCOLS, PixelRule
from lexel.nested_dropout import powers_of_two
from lexel.spacing import evenly_spaced
from lexel.tokenizer import Tokenizer
from lexel.train.processes import Processes

SHOWN = 8  # images in a snapshot, and for the gradient's health
SAMPLED = 2048  # latents, and codes, in a snapshot at most
RULES = dataclasses.replace(PROTOCOLS["lexel"], name="validation", psnr=PixelRule(rounding="float"), lpips=())


class ValidationResult(NamedTuple):
    """The numbers of a validation line, and the tensors of a snapshot."""

    values: dict[str, float | None]
    snapshot: dict[str, Tensor]
    unreadable: dict[str, str]  # images that were left out, and why


@torch.no_grad()
def validate(
    tokenizer: Tokenizer,
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    processes: Processes,
    limit: int | None = None,
    lpips: LPIPS | None = None,
    workers: int = 0,
    on_error: OnError = "replace",
) -> ValidationResult:
    """Measures a tokenizer in evaluation mode; every process must call, and all get the same numbers.

    The pass is that of `lexel.evaluate`: the numbers do not depend on batch size or processes. Continuous latents have
    reconstructions and no codes: usage, perplexity and the like are left out.

    Args:
        tokenizer: in evaluation mode.
        images: to measure on; at least one can be read.
        transform: resizes and crops them.
        batch_size: images a batch, of each process.
        processes: this process and those beside it.
        limit: measure on so many images only, evenly spaced.
        lpips: measures perceptual distance too.
        workers: processes that read images.
        on_error: "stop" raises for an unreadable image instead of taking another.
    """
    runtime = processes.runtime
    places = SpacedImages(images, transform, limit, workers, on_error)
    side = transform.size
    context = Context(
        protocol=RULES,
        plan=SamplePlan.of(len(places), RULES),
        size=(side, side),
        device=runtime.device,
        paired=True,
        **describe(tokenizer, tokenizer.token_spec(side, side)),
    )
    metrics: dict[str, Metric] = {"l1": L1(context), "psnr": PSNR(context), "latents": Latents(context)}
    if lpips is not None:
        rules = dataclasses.replace(RULES, lpips=(lpips.network,))
        metrics["lpips"] = LPIPSDistance(dataclasses.replace(context, protocol=rules), {lpips.network: lpips})
    usage = None if tokenizer.continuous else Usage(context)
    if usage is not None:
        metrics["usage"] = usage

    def reconstructed(images: Tensor, numbers: Tensor) -> Batch:
        with runtime.autocast():
            return reconstruct(tokenizer, RULES, images.to(runtime.device), numbers)

    visited = measure(places, metrics, reconstructed, Options(batch_size=batch_size), least=1)
    values: dict[str, float | None] = {**results_of(metrics).metrics}
    if lpips is not None and f"lpips_{lpips.network}" in values:
        values["lpips"] = values.pop(f"lpips_{lpips.network}")

    # A handful of images, the same in every process, for the gradient and the snapshot.
    few = SpacedImages(images, transform, SHOWN, 0, on_error)
    shown = torch.cat([batch for batch, _ in few.batches(range(len(few)), SHOWN)]).to(runtime.device)
    with runtime.autocast():
        passed = tokenizer.reconstruct(shown)
    snapshot = {
        "originals": torch.from_numpy(to_uint8(shown)),
        "reconstructions": torch.from_numpy(to_uint8(passed.images)),
        "latents": _sample(passed.latents.float().movedim(1, -1).flatten(0, -2)),
    }
    if usage is not None:
        histogram = usage.states["histogram"]
        with runtime.autocast():
            health = gradient_health(tokenizer, shown)
        codes = tokenizer.quantizer.codebook.detach().float().flatten(0, -2)
        values |= {
            "dead_codes": histogram.dead,
            "tokens": float(histogram.counts[0].sum()),
            "softmax_perplexity": health.softmax_perplexity,
            "gradient_ratio": health.ratio,
            "gradient_cosine": health.cosine,
            "code_norm": float(codes.norm(dim=1).mean()),
        }
        snapshot |= {"indices": passed.tokens, "histogram": histogram.counts.sum(0), "codes": _sample(codes)}
    if tokenizer.prefixes is not None:
        with runtime.autocast():
            snapshot["prefixes"] = worth_of_prefixes(tokenizer, shown, passed.tokens)
    plain = {name: tensor.cpu().contiguous() for name, tensor in snapshot.items()}
    return ValidationResult(values, plain, visited.unreadable)


def worth_of_prefixes(tokenizer: Tokenizer, images: Tensor, tokens: Tensor) -> Tensor:
    """Bits of the first of an image's tokens, and the mean PSNR of images decoded from these: float32 (2, prefixes)."""
    bits, found = [], []
    for count in powers_of_two(tokenizer.prefixes):
        prefix = Prefix(tokenizer, count)
        error = ((prefix.decode(tokens[:, :count]) - images) / 2).square().flatten(1).mean(1)
        bits.append(prefix.token_spec(*images.shape[2:]).bits)
        found.append(float((-10 * error.clamp_min(1e-10).log10()).mean()))
    return torch.tensor([bits, found], dtype=torch.float32)


class SpacedImages(Source):
    """At most `limit` images of a set, evenly spaced over it.

    An unreadable image gives its place to the next readable one before the following place, so that which images are
    measured depends on the set alone, not on how processes share it.

    Args:
        images: the set.
        transform: resizes and crops them.
        limit: so many places at most.
        workers: processes that read images.
        on_error: "stop" raises for an unreadable image instead of taking another.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        limit: int | None = None,
        workers: int = 0,
        on_error: OnError = "replace",
    ) -> None:
        super().__init__()
        self._images, self._transform, self._workers, self._on_error = images, transform, workers, on_error
        self._first = evenly_spaced(len(images), limit)
        self._end = [*self._first[1:], len(images)]
        self.size = (transform.size, transform.size)

    def __len__(self) -> int:
        return len(self._first)

    def read(self, numbers: Sequence[int], batch_size: int) -> Iterator[LoadedBatch]:
        """Batches of the images at these places, with the numbers of the places; one without any is passed over."""
        wanted = {place: self._first[place] for place in numbers}  # the image that stands at a place
        while wanted:
            of = torch.tensor(list(wanted))
            chosen = self._images.subset(list(wanted.values()))
            reading = {"workers": self._workers, "on_error": self._on_error}
            batches = ordered_batches(chosen, self._transform, batch_size, **reading)
            for batch in batches:
                yield batch._replace(numbers=of[batch.numbers])
            self.unreadable.update(batches.unreadable)
            wanted = {
                place: number + 1
                for place, number in wanted.items()
                if self._images.names[number] in batches.unreadable and number + 1 < self._end[place]
            }

    def batches(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.read(numbers, batch_size):
            yield batch.images, batch.numbers

    def listing(self) -> str:
        return self._images.fingerprint()


def _sample(rows: Tensor) -> Tensor:
    """At most SAMPLED rows, evenly spaced."""
    stride = -(-len(rows) // SAMPLED)
    return rows[::stride]
