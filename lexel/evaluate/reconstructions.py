"""Tokenizers, measured by what they make of real images."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lexel import checkpoint
from lexel.data import ImageSet, crop_back
from lexel.distributed import all_sum, broadcast, join, rank
from lexel.evaluate.features import GROUPS, Plan, described, look, network_for, reference_choices
from lexel.evaluate.results import as_result, wanted_of
from lexel.evaluate.sources import Pictures, chosen_numbers, digest, open_set, resized, transform_of
from lexel.evaluate.stream import Progress, Seen, forget, stream
from lexel.evaluate.values import (
    Values,
    add_jackknifed,
    add_mean,
    add_score,
    groups_of,
    on_one_process,
    warn_of_damage,
    warn_of_size,
)
from lexel.losses import LPIPS
from lexel.metrics import (
    CodeHistogram,
    MeanState,
    MomentState,
    Protocol,
    ScoreState,
    WindowUsage,
    frechet_terms,
    psnr_of,
    squared_error,
    ssim,
)
from lexel.metrics.protocols import protocol as find_protocol
from lexel.networks import FeatureNetwork
from lexel.runtime import cache_folder, exact_float32, runtime
from lexel.tokenizer import Tokenizer

LOOKS = {"frechet", "inception_score"}  # metrics that need a feature network


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    source: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    *,
    split: str | None = None,
    size: int | Literal["native"] | None = None,
    metrics: Sequence[str] | None = None,
    network: str | None = None,
    weights: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "float32",
    workers: int = 0,
    cache: bool = True,
    resume: str | Path | None = None,
    save_every: float = 120.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a tokenizer by what it makes of real images.

    Under torch.distributed every process calls it with the same arguments, and gets the same result.

    Args:
        tokenizer: images to indices and back.
        source: the real images: a folder, the name of an embedded set, or an ImageSet.
        protocol: a key of `lexel.metrics.PROTOCOLS`, or a Protocol of your own.
        split: of the source, if it has any.
        size: pixels a side; by default the tokenizer's own, or the protocol's if its provenance has none; "native"
            takes whole pictures one by one, padded to the tokenizer's factor by repeating their edge and cropped back.
        metrics: some of the protocol's `reconstruction` metrics; all by default.
        network: feature network for Fréchet distance and class scores. By default the protocol's, if its weights are
            given or at hand, else `efficientnet_lite0` (and the numbers are named so).
        weights: the network's published weights file.
        limit: takes at most so many images, evenly spaced over the set.
        batch_size: images at a time.
        device, precision: where the tokenizer runs; features and metrics are always taken in float32 and above.
        workers: processes that read images; 0 reads them here.
        cache: keeps what the network saw of the real images by the fingerprint of data, protocol and network, and
            finds it again: the next tokenizer takes half the time. 80 * D^2 bytes.
        resume: a folder for the partial state; the same call goes on where the last one was stopped. Removed at the
            end. With a network of D features it holds about 160 * D^2 bytes.
        save_every: seconds between writes of the partial state.
        progress: called after every batch.

    Returns:
        A result of plain data: `metrics` by name, `intervals` for those that have one, `warnings`, and what is needed
        to compare it with another (`protocol`, `network`, `data`, `versions`, ...).

    Raises:
        UsageError: the source, the protocol, the network or the partial state does not fit.
    """
    started = time.monotonic()
    chosen = resized(find_protocol(protocol), size or tokenizer.provenance.get("size"))
    wanted = wanted_of(chosen.reconstruction, metrics)
    where = runtime(join(device), precision)
    images = open_set(source, split, chosen.size or None)
    real = Pictures(images, transform_of(chosen), workers, chosen_numbers(len(images), limit))
    with exact_float32(where.device.type):
        warnings: list[str] = []
        extractor = network_for(chosen, network, weights, where, warnings) if wanted & LOOKS else None
        perceptual = {name: LPIPS(name).to(where.device) for name in chosen.lpips} if "lpips" in wanted else {}
        tokenizer = tokenizer.to(where.device)
        plan = Plan.of(len(real), chosen)
        states = _reconstruction_states(wanted, chosen, extractor, plan, tokenizer, perceptual)
        real_file = _file_of_real(real, chosen, extractor) if cache and "real.pooled" in states else None
        if real_file is not None and broadcast(real_file.is_file()):
            del states["real.pooled"]  # known from an earlier evaluation

        def take(pictures: Tensor, numbers: Tensor) -> None:
            originals = pictures.to(where.device)
            with where.autocast():
                # Whole pictures are padded; a square that does not fit is refused by the tokenizer.
                padded = tokenizer.pad(originals) if size == "native" else originals
                indices = tokenizer.encode(padded)
                made = crop_back(tokenizer.decode(indices).float(), *originals.shape[-2:])
            _compare(states, chosen, perceptual, originals, made)
            if "histogram" in states:
                states["histogram"].add(indices.cpu())
            if "window" in states:
                states["window"].add(indices, numbers)
            for side, side_images in (("real", originals), ("made", made)):
                look(states, side, extractor, chosen, side_images, numbers, plan)

        identity = {
            "kind": "reconstruction",
            "protocol": chosen.choices(),
            "metrics": sorted(wanted),
            "tokenizer": tokenizer.fingerprint(),
            "network": described(extractor),
            "lpips": {
                name: checkpoint.fingerprint({}, dict(model.named_buffers())) for name, model in perceptual.items()
            },
            "source": real.listing(),
            "precision": precision,
        }
        seen = stream(real, states, take, identity, batch_size, resume, save_every, progress)
        if real_file is not None:
            _keep_or_find_real(real_file, states, rank())
        values = on_one_process(lambda: _reconstruction_values(states, chosen, extractor, seen, wanted))
        forget(resume)
    return as_result(identity, chosen, real, seen, values, warnings, where, started)


def _reconstruction_states(
    wanted: set[str],
    protocol: Protocol,
    extractor: FeatureNetwork | None,
    plan: Plan,
    tokenizer: Tokenizer,
    perceptual: Mapping[str, LPIPS],
) -> dict[str, Any]:
    states: dict[str, Any] = {}
    if "psnr" in wanted:
        states |= {"error": MeanState(), "psnr": MeanState()}
    if "ssim" in wanted:
        states["ssim"] = MeanState()
    states |= {f"lpips_{name}": MeanState() for name in perceptual}
    if "usage" in wanted:
        states["histogram"] = _Histogram(tokenizer.codebook_size, getattr(tokenizer.quantizer, "books", None))
        if protocol.usage.window is not None:
            states["window"] = WindowUsage(tokenizer.codebook_size, protocol.usage.window)
    if extractor is not None and "frechet" in wanted:
        states |= {
            "real.pooled": MomentState(extractor.dims, GROUPS),
            "made.pooled": MomentState(extractor.dims, GROUPS),
        }
    if extractor is not None and "inception_score" in wanted:
        states["made.score"] = ScoreState(extractor.classes, plan.splits, GROUPS)
    return states


def _compare(
    states: dict[str, Any], protocol: Protocol, perceptual: Mapping[str, LPIPS], originals: Tensor, made: Tensor
) -> None:
    if "psnr" in states:
        errors = squared_error(originals, made, protocol.psnr.rounding, protocol.psnr.channels)
        states["error"].add(errors)
        states["psnr"].add(psnr_of(errors))
    if "ssim" in states:
        rule = protocol.ssim
        states["ssim"].add(ssim(originals, made, rule.rounding, rule.channels, rule.window, rule.data_range))
    for name, distance in perceptual.items():
        states[f"lpips_{name}"].add(distance(originals, made))


def _file_of_real(real: Pictures, protocol: Protocol, extractor: FeatureNetwork | None) -> Path:
    """Where the cache keeps the moments of these pictures, seen by this network under these choices."""
    key = digest([real.listing(), reference_choices(protocol), described(extractor), GROUPS])
    return cache_folder() / "statistics" / f"{key}.pt"


def _keep_or_find_real(file: Path, states: dict[str, Any], rank: int) -> None:
    """Puts the moments of the real pictures into the cache, or takes them from there."""
    if rank != 0:
        return  # one process makes the result
    if "real.pooled" in states:
        checkpoint.save_state(file, states["real.pooled"].state_dict())
        return
    kept = checkpoint.load_state(file)
    states["real.pooled"] = MomentState(kept["total"].shape[1], GROUPS)
    states["real.pooled"].load_state_dict(kept)


class _Histogram(CodeHistogram):
    """A code histogram that can be saved half-way, and summed whatever moves what processes exchange."""

    def all_reduce(self) -> None:
        self.counts = all_sum(self.counts)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]


def _reconstruction_values(
    states: dict[str, Any], protocol: Protocol, extractor: FeatureNetwork | None, seen: Seen, wanted: set[str]
) -> Values:
    values = Values()
    if extractor is not None and "frechet" in wanted:
        # The real images are a sample too, the very one: a group is left out of both sides.
        made, real = states["made.pooled"], states["real.pooled"]
        terms = [frechet_terms(made.moments(group), real.moments(group)) for group in (None, *groups_of(made))]
        name = "rfid" if extractor.name == "inception" else f"fd_{extractor.name}"
        add_jackknifed(values, name, [term.distance for term in terms])
        warn_of_damage(values, name, max(term.clipped for term in terms))
        warn_of_size(values, seen.count, protocol, extractor)
    if extractor is not None and "inception_score" in wanted:
        add_score(values, states["made.score"], extractor)
    if "psnr" in states:
        if protocol.psnr.pooled:
            values.metrics["psnr"] = float(psnr_of(torch.tensor(states["error"].mean)))
        else:
            add_mean(values, "psnr", states["psnr"])
        if math.isinf(values.metrics["psnr"]):
            values.warnings.append("psnr is infinite: an image is reproduced exactly")
    for name in states:
        if name == "ssim" or name.startswith("lpips_"):
            add_mean(values, name, states[name])
    if "histogram" in states:
        histogram = states["histogram"]
        values.metrics["usage"] = states["window"].usage if "window" in states else histogram.usage
        if "window" in states:
            values.metrics["usage_whole_set"] = histogram.usage
        values.metrics["perplexity"] = histogram.perplexity
        draws = float(histogram.counts.sum()) / histogram.counts.numel()
        if draws < 10:
            values.warnings.append(
                f"usage of {draws:.1f} tokens a code is limited by the sample: even uniform codes would not all be seen"
            )
    return values
