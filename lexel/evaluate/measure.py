"""One pass over images under every evaluation: of tokenizers, of samples, of a reference, and of validation."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel.data import PIXEL_LIMIT
from lexel.data.unreadable import check_unreadable, too_many
from lexel.distributed import broadcast, gather, processes, rank
from lexel.errors import UsageError
from lexel.evaluate.features import Networks, described
from lexel.evaluate.metric import Batch, Context, Metric, Values, unmet
from lexel.evaluate.sources import Source
from lexel.evaluate.stream import Partial, Visited
from lexel.machine import commit
from lexel.metrics import Protocol, ReferenceStatistics
from lexel.parts import Part
from lexel.runtime import ProgressCallback


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation; only `limit`, `pixel_limit` and `precision` change its numbers.

    Attributes:
        limit: at most so many images.
        batch_size: images at a time.
        device, precision: where the tokenizer runs; features and metrics are always taken in float32 and above.
        workers: processes that read images; 0 reads them here, None takes as many as pay (`default_workers`).
        pixel_limit: files of images with more pixels are unreadable.
        max_unreadable: the part of the images that may be unreadable and left out: of all that are asked for, of the
            share of a `part`, and of the reference by itself; of shards the part that may be damaged.
        cache: keeps statistics of real images by the fingerprint of data, protocol and network, and finds them again.
        resume: a folder for the partial state; the same call goes on where the last one was stopped. Removed at the
            end. With a network of D features it holds about 160 * D^2 bytes.
        part: measure only this share of the images, cut where batches are, and keep its state in `resume`; the same
            call without it, given the states of all parts there, gives the result.
        save_every: seconds between writes of the partial state.
        progress: called after every batch.
    """

    limit: int | None = None
    batch_size: int = 32
    device: str = "auto"
    precision: str = "float32"
    workers: int | None = 0
    pixel_limit: int = PIXEL_LIMIT
    max_unreadable: float = 1.0
    cache: bool = True
    resume: str | Path | None = None
    part: Part | None = None
    save_every: float = 120.0
    progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.limit is not None and self.limit < 2:
            raise UsageError(f"limit must be at least 2 images, got {self.limit}")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable must lie in [0, 1], got {self.max_unreadable}")
        if self.part is not None and self.resume is None:
            raise UsageError(f"part {self.part} needs a folder for its state: --resume DIR, the same for all parts")

    def changed(self, changes: Mapping[str, Any]) -> "Options":
        """The same with some attributes changed."""
        return dataclasses.replace(self, **changes) if changes else self


@torch.no_grad()
def measure(
    source: Source,
    metrics: Mapping[str, Metric],
    batch_of: Callable[[Tensor, Tensor], Batch],
    options: Options | None = None,
    identity: Mapping[str, Any] | None = None,
    least: int = 2,
) -> Visited:
    """Feeds every image of a source to metrics, once; then each process has the sums of all.

    Under torch.distributed every process calls it with the same arguments; they share the images without padding.

    Args:
        source: numbered images.
        metrics: by name; they are filled.
        batch_of: makes a batch of images (B, 3, H, W) and their numbers int64 (B,), as the source gives them: passes
            them through a tokenizer, for instance.
        options: batch size, progress, and where the partial state lies.
        identity: what the partial state is of; with another one it is refused.
        least: as many images must be readable; intervals need two.

    Returns:
        Which images were measured, of a part its own. The partial state stays until `discard_partial` is called.

    Raises:
        UsageError: fewer than `least` images can be read, more than `max_unreadable` cannot, or the partial state is of
            another evaluation.
    """
    options = options or Options()
    commit()  # for the result: a checkout may have moved on by the end
    visited = Visited(len(source))
    partial = None if options.resume is None else Partial(Path(options.resume), identity or {}, options.part)
    if partial is not None:
        partial.load(metrics, visited)
        visited.unreadable.clear()  # they are tried again: some may have been mended
    whole = range(len(source))
    share = whole if options.part is None else options.part.blocks(len(source), options.batch_size)
    wanted = torch.zeros(len(source), dtype=torch.bool)
    wanted[share.start : share.stop] = True
    remaining = (wanted & ~broadcast(visited.done)).nonzero().flatten()[rank() :: processes()].tolist()
    done, saved = 0, time.monotonic()
    for images, numbers in source.batches(remaining, options.batch_size):
        if too_many(len(source.unreadable), len(share), options.max_unreadable):
            break  # all processes say so below: one that ended here would leave the others waiting
        batch = batch_of(images, numbers)
        for metric in metrics.values():
            metric.update(batch)
        visited.add(images, numbers)
        done += len(numbers)
        if partial is not None and time.monotonic() - saved >= options.save_every:
            partial.save(metrics, visited)
            saved = time.monotonic()
        if options.progress is not None:
            options.progress(done, len(remaining))
    visited.unreadable.update(source.unreadable)
    if partial is not None:
        partial.save(metrics, visited)  # what follows takes a while too: no image is to be measured twice
    for metric in metrics.values():
        metric.all_reduce()
    visited.all_reduce()
    visited.unreadable = dict(sorted(visited.unreadable.items()))
    check_unreadable(visited.unreadable, len(share), options.max_unreadable)
    if options.part is not None:
        return visited
    if visited.count < least:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(visited.unreadable.items())[:1])
        needed = "one readable image is" if least == 1 else "two readable images are"
        raise UsageError(f"at least {needed} needed, got {visited.count}{reasons and f' ({reasons})'}")
    return visited


def build_metrics(
    classes: Mapping[str, type[Metric]],
    context: Context,
    networks: Networks,
    warnings: list[str],
    references: Mapping[str | None, ReferenceStatistics] | None = None,
) -> dict[str, Metric]:
    """The metrics that can be taken in a context, each with its feature network; a warning for each that cannot.

    Args:
        classes: by name.
        context: without a network.
        networks: gives the network of each.
        warnings: what is left out is added here, with the reason.
        references: statistics of the real images by the name of the network; None is the protocol's.

    Raises:
        UsageError: none of them can.
    """
    built, left_out = {}, {}
    for name, kind in classes.items():
        network = networks.get(kind.network) if "features" in kind.needs else None
        own = dataclasses.replace(context, network=network, reference=(references or {}).get(kind.network))
        reason = networks.reasons.get(kind.network) if "features" in kind.needs else None
        reason = reason or unmet(kind, own)
        if reason is None:
            built[name] = kind(own)
            if not built[name].states:  # nothing of it can be measured
                reason = "; ".join(built.pop(name).left_out.values()) or "it measures nothing here"
        if reason is not None:
            left_out[name] = reason
    check_alike({name: sorted(metric.states) for name, metric in built.items()}, left_out)
    warnings += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    if not built:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UsageError(f"nothing can be measured: {reasons or 'no metric was asked for'}")
    return built


def check_alike(measured: Mapping[str, list[str]], left_out: Mapping[str, str]) -> None:
    """Refuses processes that would measure different things, where one machine lacks weights that another has.

    They would wait for each other for ever when their sums are added.

    Raises:
        UsageError: in all of them; says what one lacks and why.
    """
    everyones = gather((dict(measured), dict(left_out)))
    for number, (found, reasons) in enumerate(everyones):
        if found != everyones[0][0]:
            lacking = next((f"{name}: {why}" for name, why in (reasons | everyones[0][1]).items()), "weights differ")
            raise UsageError(
                f"processes 0 and {number} cannot measure the same ({lacking}); give every machine the same weights"
            )


def identity_of(
    kind: str, protocol: Protocol, metrics: Mapping[str, Metric], networks: Networks, source: Source, precision: str
) -> dict[str, Any]:
    """What an evaluation is of, as plain data: partial states of another one are refused."""
    return {
        "kind": kind,
        "protocol": protocol.choices(),
        "metrics": sorted(metrics),
        "network": described(networks.main),
        "weights": {name: metric.about() for name, metric in metrics.items()},
        "source": source.listing(),
        "precision": precision,
    }


def part_measured(part: Part, visited: Visited, warnings: Sequence[str]) -> dict[str, Any]:
    """The result of a part, as plain data: no metrics yet."""
    return {
        "kind": "part",
        "part": str(part),
        "images": visited.count,
        "unreadable": dict(visited.unreadable),
        "warnings": list(warnings),
    }


def results_of(metrics: Mapping[str, Metric]) -> Values:
    """The numbers of metrics, computed on rank 0 (eigenvalues take a while) and broadcast.

    A metric that fails (too few images for it, a damaged statistic) is left out with a warning.
    """
    values = Values()
    for name, metric in metrics.items() if rank() == 0 else ():
        try:
            values.update(metric.compute())
        except UsageError as error:
            metric.left_out[name] = str(error)
        for number, reason in metric.left_out.items():
            values.metrics.pop(number, None)
            values.intervals.pop(number, None)
            values.warnings.append(f"{number} is left out: {reason}")
    return broadcast(values)
