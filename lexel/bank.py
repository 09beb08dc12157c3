"""Banks of features for VQGAN-LC, from the pictures of a folder and any encoder at hand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lexel import networks
from lexel.data import PIXEL_LIMIT, TRANSFORMS, Batch, first_reason, open_images, ordered_batches
from lexel.errors import UsageError
from lexel.loading import own_transform
from lexel.memory import check_memory
from lexel.quantizers.vqgan_lc import build_bank, check_free, save_bank
from lexel.runtime import ProgressCallback, Runtime
from lexel.tokenizer import Tokenizer

NETWORK_SIZE = 224  # pixels a side for feature networks


@torch.no_grad()
def make_bank(
    encoder: Tokenizer | str,
    data: str | Path,
    out: str | Path,
    codes: int,
    runtime: Runtime,
    *,
    size: int | None = None,
    split: str | None = None,
    per_class: bool = False,
    features_per_image: int = 16,
    batch_size: int = 32,
    pixel_limit: int = PIXEL_LIMIT,
    max_unreadable: float = 1.0,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Clusters an encoder's features of a set of images and writes the centres.

    Args:
        encoder: a tokenizer, whose latents at random positions are taken; or the name of a feature network, which gives
            one feature an image.
        data: a folder, a file or an embedded set; unreadable pictures are left out.
        out: the file to write.
        codes: number of centres, K.
        runtime: device and precision.
        size: pixels a side; the tokenizer's own by default, NETWORK_SIZE for a feature network.
        split: "train" or "validation", if the data set has these splits.
        per_class: an equal share of the centres for each class of the images, as in the paper.
        features_per_image: latents taken of each image.
        batch_size: images at a time.
        pixel_limit: files of images with more pixels are unreadable.
        max_unreadable: the part of the images, or of their source's shards, that may be unreadable and left out.
        seed: of the positions and of the clustering.
        progress: called with (images done, images).

    Returns:
        The bank: float32 (K, F).
    """
    check_free(out)
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    take: Callable[[Batch], Tensor]  # features (B, n, F) of a batch
    if isinstance(encoder, Tokenizer):
        transform, channels = own_transform(encoder, size), encoder.channels
        encoder.grid(transform.size, transform.size)  # raises where the size does not fit
        check_memory(encoder, runtime, transform.size, transform.size, batch_size)
        take = partial(_latents, encoder.to(runtime.device).eval(), runtime, features_per_image, seed)
    else:
        transform, channels = TRANSFORMS["published"](size or NETWORK_SIZE), 3
        take = partial(_pooled, networks.build(encoder).to(runtime.device))
    images = open_images(
        data, split, transform.size, channels=channels, pixel_limit=pixel_limit, max_unreadable=max_unreadable
    )
    if per_class and images.labels is None:
        raise UsageError("a bank for each class needs pictures with classes: one folder a class")
    features, labels, done = [], [], 0
    batches = ordered_batches(images, transform, batch_size, max_unreadable=max_unreadable)
    for batch in batches:
        found = take(batch._replace(images=batch.images.to(runtime.device)))
        features.append(found.flatten(0, 1).float().cpu())
        if batch.labels is not None:
            labels.append(batch.labels.repeat_interleave(found.shape[1]))
        done += len(batch.numbers)
        if progress:
            progress(done, len(images))
    if not features:
        raise UsageError(f"no picture of {data} can be read; {first_reason(batches.unreadable)}")
    bank = build_bank(torch.cat(features), codes, torch.cat(labels) if per_class else None, seed)
    save_bank(bank, out)
    return bank


def _pooled(network: networks.FeatureNetwork, batch: Batch) -> Tensor:
    """One feature a picture: (B, 1, F)."""
    return network(batch.images).pooled[:, None]


def _latents(tokenizer: Tokenizer, runtime: Runtime, count: int, seed: int, batch: Batch) -> Tensor:
    """Latents (B, count, D) at random positions of each picture, which depend on the picture, not on its batch."""
    with runtime.autocast():
        latents = tokenizer.latents(batch.images).flatten(2).transpose(1, 2)  # (B, h w, D)
    generators = [torch.Generator().manual_seed(seed + int(number)) for number in batch.numbers]
    scores = torch.stack([torch.rand(latents.shape[1], generator=generator) for generator in generators])
    chosen = scores.argsort(1)[:, :count].to(latents.device)
    return latents.gather(1, chosen[..., None].expand(-1, -1, latents.shape[2]))
