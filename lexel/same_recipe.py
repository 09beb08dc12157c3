"""Whether a run may go on under a recipe: what may change, what may only grow, and what must stay."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexel import config
from lexel.config import Config, flatten
from lexel.errors import UsageError, some

# Options that change where a run stands or what it writes, never what it learns; a resumed run may change them.
OPERATIONAL = {
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.validate_every",
    "train.collapse_patience",
    "train.checkpointing",
    "train.shard_codebook",
    "train.fsdp",
    "train.sharded_checkpoints",
    "train.trackers",
    "train.evaluations",
    *(
        f"{section}.{name}"
        for section in ("data", "data.images")
        for name in ("workers", "memory", "on_error", "max_unreadable")
    ),
}
LENGTHS = {"train.steps", "train.epochs"}  # a resumed run may grow, never shrink
# What these name is compared by its content (`RunFolder.check_data`), so that it may move and be spelled otherwise.
PATHS = {
    "data.source",
    "data.validation",
    "data.tokens",
    "data.tokenizer",
    "data.images.source",
    "data.images.validation",
    "init.source",
}


def check_same_recipe(before: Mapping[str, Any], recipe: Config, folder: Path, begun: bool) -> None:
    """Refuses to go on with a run under another recipe.

    Once a run has `begun`, that is, has a checkpoint, the model that it started from may be left out.

    Raises:
        UsageError: names the options that differ.
    """
    now = recipe.model_dump(mode="json", exclude_none=True)
    with contextlib.suppress(UsageError):  # options that came later have their defaults
        before = config.check(dict(before), type(recipe), str(folder)).model_dump(mode="json", exclude_none=True)
    old, new = flatten(before), flatten(now)
    one_has_none = ("init.source" in old) != ("init.source" in new)
    lasting = {"decoder", "proxy"} & {old.get("init.what"), new.get("init.what")}  # these matter at every step
    if begun and one_has_none and not lasting:
        old, new = (
            {name: value for name, value in flat.items() if not name.startswith("init.")} for flat in (old, new)
        )
    differing = []
    for name in sorted({*old, *new} - OPERATIONAL):
        was, wanted = old.get(name), new.get(name)
        grows = name in LENGTHS and was is not None and wanted is not None and wanted >= was
        moved = name in PATHS and isinstance(was, str) and isinstance(wanted, str)
        if was != wanted and not grows and not moved:
            differing.append(name)
    if not differing:
        return
    hint = "a run may grow but not shrink; " if LENGTHS & set(differing) else ""
    changes = [f"{name} = {old.get(name)!r}, the recipe now says {new.get(name)!r}" for name in differing]
    raise UsageError(
        f"{folder} holds a run with {some(changes, 5)}; "
        f"{hint}use the recipe of the run ({folder / 'recipe.toml'}) or another folder"
    )
