"""The models and runs that a studio shows; weights are read when they are first asked for."""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lexel.checkpoint import CONFIG, read_json
from lexel.data import Transform
from lexel.errors import UsageError, unknown
from lexel.generators import Generator
from lexel.loading import load, own_transform
from lexel.regular import expanded
from lexel.run_folder import RunFolder
from lexel.run_log import Run
from lexel.runtime import runtime
from lexel.studio import results
from lexel.studio.pictures import drawings
from lexel.tokenizer import Tokenizer

EXAMPLES = 24  # pictures to try a model on
DEMO = Path("runs/demo")  # looked at where no model is named


class Use(NamedTuple):
    """Counts of each code's choices."""

    counts: np.ndarray  # (books, K)
    order: np.ndarray  # (books, K), codes by use, most used first
    pictures: int | None  # that were counted here; None where the run's last validation counted


@dataclass
class Entry:
    """One model or run of a studio.

    Args:
        key: its name in addresses.
        source: what `lexel.load` takes.
        kind: "tokenizer" or "generator".
        folder: of the run, where it is one.
        made_here: whether the studio makes the model itself.
        others: the entries of the library, among which a generator may find its tokenizer.
        device: where it runs.
        text_encoder: of captions, for a generator of captions.
    """

    key: str
    source: str
    kind: str
    folder: Path | None = None
    made_here: bool = False
    others: Mapping[str, "Entry"] = field(default_factory=dict, repr=False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text_encoder: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    loaded: Tokenizer | Generator | None = None
    use: Use | None = None  # counted when it is first asked for

    @property
    def model(self) -> Tokenizer | Generator:
        """The model, in evaluation mode; loading takes a moment the first time.

        Raises:
            UsageError: it cannot be loaded.
        """
        with self.lock:
            if self.loaded is None:
                if self.made_here:
                    from lexel.studio.example import example_run  # which trains

                    self.folder = example_run()
                    self.source = str(self.folder)
                self.loaded = load(self.source)
                if isinstance(self.loaded, Generator):
                    self._find_tokenizer(self.loaded)
                    self.loaded.tokenizer.to(self.device)
                self.loaded.to(self.device)
            return self.loaded

    def _find_tokenizer(self, generator: Generator) -> None:
        """Gives a generator without a tokenizer, as in an unfinished run, the one in the library that is its own."""
        try:
            _ = generator.tokenizer
        except UsageError:
            for other in self.others.values():
                if other.kind == "tokenizer" and other.tokenizer.fingerprint() == generator.config.tokenizer:
                    generator.attach(other.tokenizer)
                    return
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: the model itself, or the one of a generator."""
        model = self.model
        return model if isinstance(model, Tokenizer) else model.tokenizer

    @property
    def generator(self) -> Generator:
        """The generator.

        Raises:
            UsageError: it is a tokenizer.
        """
        model = self.model
        if isinstance(model, Tokenizer):
            raise UsageError(f"{self.key} is a tokenizer; choose a generator")
        return model

    @cached_property
    def transform(self) -> Transform:
        """The transform that resizes and crops pictures for the tokenizer, at a size that fits it."""
        size = None
        if isinstance(self.model, Generator) and len(self.model.sampled_shape) == self.tokenizer.autoencoder.axes:
            size = self.tokenizer.image_size(self.model.sampled_shape)[0]  # whose tokens the generator writes
        transform = own_transform(self.tokenizer, size)
        self.tokenizer.grid(transform.size, transform.size)
        return transform

    @cached_property
    def examples(self) -> np.ndarray:
        """Pictures to try, uint8 (N, size, size, C): a run's held-out ones, else made-up drawings."""
        size = self.transform.size
        for entry in self._kin():
            run = entry.run()
            if run is not None and "originals" in run.last and run.last["originals"].shape[1] == size:
                return run.last["originals"][:EXAMPLES]
        made = drawings(EXAMPLES, size, seed=1)
        channels = self.tokenizer.channels
        return made if channels == 3 else made.mean(-1, keepdims=True).astype(np.uint8).repeat(channels, -1)

    def _kin(self) -> list["Entry"]:
        """This entry, and for a generator the entries of its tokenizer."""
        if isinstance(self.model, Tokenizer):
            return [self]
        wanted = self.tokenizer.fingerprint()
        tokenizers = [other for other in self.others.values() if other.kind == "tokenizer"]
        return [other for other in tokenizers if other.tokenizer.fingerprint() == wanted]

    def run(self) -> Run | None:
        """The present contents of the run folder; None where there is none."""
        run = None if self.folder is None else RunFolder.read(self.folder)
        return None if run is None or run.kind is None else run.contents(self.key)


class Library:
    """The entries of a studio, by key.

    Args:
        sources: runs, folders of runs, model folders, published checkpoints, hub ids, results of `lexel evaluate` and
            folders of `lexel compare`; without any, those of the demo, or a tokenizer that is made on the spot.
        device: where models run: auto, cpu, cuda, ...
        text_encoder: for the captions of generators: a folder or a hub id.

    Raises:
        UsageError: a source holds nothing that can be shown.
    """

    def __init__(
        self, sources: Sequence[str | Path] = (), device: str = "cpu", text_encoder: str | None = None
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.results: dict[str, Path] = {}
        self._settings: dict[str, Any] = {"device": runtime(device).device, "text_encoder": text_encoder}
        for source in sources:
            self._add_all(source)
        if not sources and DEMO.is_dir():
            for folder in _inside(DEMO):
                self._add(folder)
        self.only_results = bool(self.results) and not self.entries
        if not self.entries:
            self.entries["example"] = Entry("example", "example", "tokenizer", made_here=True, **self._settings)

    def find(self, key: str) -> Entry:
        """An entry.

        Raises:
            UsageError: there is none of this name.
        """
        if key not in self.entries:
            raise unknown("model", key, self.entries)
        return self.entries[key]

    def _add_all(self, source: str | Path) -> None:
        path = expanded(source)
        found = results.find(path)
        if found is not None:
            results.check(found)
            name = found.parent.resolve().name if found.name == results.COMPARISON else found.stem
            self.results[self._key(name, self.results)] = found
            for folder in _inside(found.parent / "runs") if found.name == results.COMPARISON else ():
                self._add(folder)
            return
        if _kind(path) is not None:
            self._add(path)
            return
        inside = _inside(path) if path.is_dir() else []
        for folder in inside:
            self._add(folder)
        if not inside:  # a published checkpoint or a hub id; a wrong name is refused before a page opens
            model = load(source)
            kind = "tokenizer" if isinstance(model, Tokenizer) else "generator"
            key = self._key(path.stem or str(source))
            self.entries[key] = Entry(key, str(source), kind, others=self.entries, **self._settings)
            self.entries[key].loaded = model.to(self.entries[key].device)

    def _add(self, folder: Path) -> None:
        key = self._key(folder.resolve().name)
        kind = _kind(folder)
        assert kind is not None
        run = folder if RunFolder(folder, writes=False).kind is not None else None
        self.entries[key] = Entry(key, str(folder), kind, run, others=self.entries, **self._settings)

    def _key(self, name: str, taken: Mapping[str, object] | None = None) -> str:
        taken = self.entries if taken is None else taken
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
        key, number = base, 2
        while key in taken:
            key, number = f"{base}-{number}", number + 1
        return key


def _kind(folder: Path) -> str | None:
    """The kind of model in a run or model folder of Lexel's; None where it is neither."""
    kind = RunFolder(folder, writes=False).kind
    if kind is not None:
        return kind
    if (folder / CONFIG).is_file():
        table = read_json(folder / CONFIG)
        if "lexel" in table and table.get("model") in ("tokenizer", "generator"):
            return str(table["model"])
    return None


def _inside(folder: Path) -> list[Path]:
    """The runs and models in a folder, tokenizers first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(path, _kind(path)) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [path for wanted in ("tokenizer", "generator") for path, kind in found if kind == wanted]
