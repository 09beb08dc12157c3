"""A token set over a smaller codebook: every index replaced by its new number."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lexel.checkpoint import atomic, atomic_write
from lexel.data.tokens.format import (
    INDEX,
    features_path,
    index_dtype,
    plan_of,
    read_manifest,
    read_shard_description,
    sealed,
    shard_path,
)
from lexel.data.tokens.token_set import TokenSet
from lexel.data.tokens.write import begin, complete, write_indices
from lexel.errors import UsageError
from lexel.runtime import ProgressCallback


def remap_tokens(
    tokens: TokenSet,
    folder: str | Path,
    kept: np.ndarray,
    fingerprint: str,
    progress: ProgressCallback | None = None,
) -> TokenSet:
    """Writes the same pictures with the indices of a pruned codebook; the same call again goes on where it stopped.

    Args:
        tokens: a whole set.
        folder: new, or begun by the same call before.
        kept: int64 (n,), ascending: code i of the new codebook is code kept[i] of the old one.
        fingerprint: of the pruned tokenizer.
        progress: called with (shards done, shards).

    Raises:
        UsageError: the set has an index that was dropped, or the folder holds something else.
    """
    folder, facts = Path(folder), tokens.facts
    dtype = index_dtype(len(kept))
    origin = {"pruned_from": tokens.fingerprint, "codebook_size": tokens.codebook_size}
    plan = plan_of(facts) | {
        "codebook_size": len(kept),
        "dtype": dtype.name,
        "fingerprint": fingerprint,
        "provenance": {**(facts.get("provenance") or {}), **origin},
    }
    begin(folder, plan)
    new_number = np.full(tokens.codebook_size, -1, np.int64)
    new_number[kept] = np.arange(len(kept))
    manifest, _ = read_manifest(tokens.folder / INDEX)
    shards = manifest.shards or 0
    for shard in range(shards):
        if not shard_path(folder, shard, ".json").is_file():
            description = read_shard_description(shard_path(tokens.folder, shard, ".json"), manifest)
            mapped = new_number[tokens.shard(shard)]
            if mapped.size and mapped.min() < 0:
                raise UsageError(f"{tokens.folder} has codes that are not among the {len(kept):,} that stay")
            written = write_indices(shard_path(folder, shard, ".npy"), mapped.astype(dtype))
            if description.caption_features is not None:
                with atomic(features_path(folder, shard)) as partial:
                    shutil.copyfile(features_path(tokens.folder, shard), partial)
            table = description.model_dump(mode="json") | written
            with atomic_write(shard_path(folder, shard, ".json")) as file:
                file.write(sealed({name: value for name, value in table.items() if _stated(name, value)}))
        if progress is not None:
            progress(shard + 1, shards)
    return complete(folder, plan)


def _stated(name: str, value: Any) -> bool:
    """Whether the writer of shards states this key: `labels` always, the others where there are some."""
    return value is not None or name == "labels"
