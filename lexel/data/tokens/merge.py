"""Merging token sets whose shards were written apart, by jobs without a common disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lexel.checkpoint import atomic
from lexel.data.tokens.format import (
    Manifest,
    features_path,
    find_manifest,
    plan_of,
    read_manifest,
    read_shard_description,
    shard_path,
)
from lexel.data.tokens.token_set import TokenSet
from lexel.data.tokens.write import begin, check_plan, complete
from lexel.errors import UsageError, some
from lexel.regular import sha256_of
from lexel.runtime import ProgressCallback

NAMED = 5  # shards that are named where many are missing


def merge_tokens(folder: str | Path, parts: Sequence[str | Path], progress: ProgressCallback | None = None) -> TokenSet:
    """Puts the shards of several folders of one encoding together; the same bytes as one process would have written.

    The parts stay as they are. Every shard is compared with its checksum before it is taken; the same call again goes
    on where it was stopped.

    Args:
        folder: new, begun by the same call before, or one of the parts.
        parts: folders that `write_tokens` was given, each with another share of the shards; they may overlap.
        progress: called with (shards done, shards).

    Returns:
        The whole set.

    Raises:
        UsageError: the parts are of different encodings, a shard is in none of them, or is damaged.
    """
    folder, sources = Path(folder), [Path(part) for part in parts]
    if not sources:
        raise UsageError("there is nothing to merge: give the folders of the parts")
    plans = [_plan(source) for source in sources]
    (manifest, plan), first = plans[0], sources[0]
    for (_, other), source in zip(plans[1:], sources[1:], strict=True):
        check_plan(other, plan, f"{source} and {first} hold parts of different encodings", str(source), str(first))
    begin(folder, plan)
    count = -(-manifest.images // manifest.shard_size)
    missing: list[int] = []
    for shard in range(count):
        if not shard_path(folder, shard, ".json").is_file():
            holder = next((part for part in sources if shard_path(part, shard, ".json").is_file()), None)
            if holder is None:
                missing.append(shard)
                continue
            _take(holder, folder, shard, manifest)
        if progress is not None:
            progress(shard + 1, count)
    if missing:
        named = some([*map(str, missing)], NAMED)
        raise UsageError(
            f"{len(missing)} of {count} shards are in none of the parts (counted from 0: {named}); part I of N writes "
            "the shards I - 1, I - 1 + N, ...: run the parts that were stopped again, then merge again"
        )
    return complete(folder, plan)


def _plan(source: Path) -> tuple[Manifest, dict[str, Any]]:
    """The encoding's options as a part records them."""
    found = find_manifest(source)
    if found is None:
        raise UsageError(f"{source} holds no tokens; give folders that `lexel encode --part I/N` wrote")
    manifest, facts = read_manifest(found)
    return manifest, plan_of(facts)


def _take(source: Path, folder: Path, shard: int, manifest: Manifest) -> None:
    """Copies a shard, its tokens first, as its writer does."""
    description = shard_path(source, shard, ".json")
    facts = read_shard_description(description, manifest)
    digests = {shard_path(source, shard, ".npy"): facts.sha256}
    if facts.caption_features is not None:
        digests[features_path(source, shard)] = facts.caption_features.sha256
    for path, wanted in digests.items():
        if sha256_of(path) != wanted:
            raise UsageError(
                f"{path} is damaged: its content does not match its checksum; delete it and {description.name}"
                f" and run that part again"
            )
    for path in (*digests, description):
        with atomic(folder / path.name) as partial:
            shutil.copyfile(path, partial)
