"""Reference curves: what a healthy run of a recipe logged, kept small, to be drawn behind another run of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lexel
from lexel.checkpoint import atomic, read_json
from lexel.config import Config, flatten
from lexel.errors import UsageError, some
from lexel.provenance import without_folders
from lexel.run_folder import RunFolder
from lexel.run_log import SPEEDS, is_number
from lexel.same_recipe import OPERATIONAL, PATHS

FOLDER = Path(__file__).parent / "curves"  # those of Lexel's own recipes
POINTS = 40  # of a curve, at most
LARGEST = 32 * 1024  # bytes of a file, at most
TIMING = {"kind", "seconds", *SPEEDS}  # of a machine, not of a recipe
SHOWN = 4  # differences from the reference's recipe that a caption names


@dataclass(frozen=True)
class ReferenceCurves:
    """A healthy run: its recipe, and what it logged as columns of equal length."""

    recipe: str  # the name
    settings: Mapping[str, Any]  # the resolved recipe with dotted names, but for what does not change a result
    train: Sequence[Mapping[str, Any]]  # rows with "step", as in metrics.jsonl
    validation: Sequence[Mapping[str, Any]]

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """The options in which a run's recipe differs, the run's length aside: "train.lr = 0.002, here 0.004"."""
        ignored = {"train.steps", "train.epochs", "train.seed", *PATHS - {"data.source"}}
        return [
            f"{name} = {self.settings[name]}, here {settings[name]}"
            for name in sorted(self.settings.keys() & settings.keys() - ignored)
            if self.settings[name] != settings[name]
        ]

    def caption(self, settings: Mapping[str, Any]) -> str:
        """The caption of a page's reference curves: the run they are of, and where its recipe differs."""
        different = self.differences(settings)
        note = f", with {some(different, SHOWN, '; ')}" if different else ""
        return f"Dashed, behind: a healthy run of the recipe {self.recipe}{note}."


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recipe with dotted names, without folders, but for options that change nothing of what is learned."""
    return {name: value for name, value in flatten(without_folders(recipe)).items() if name not in OPERATIONAL}


def curves_of(run: str | Path, name: str) -> ReferenceCurves:
    """The curves of a run, thinned to at most POINTS points each, with four digits.

    Args:
        run: a run folder.
        name: of the recipe that it ran.

    Raises:
        UsageError: the folder is no run, or has logged nothing.
    """
    contents = RunFolder.read(run).contents()
    if not contents.train:
        raise UsageError(f"{run} has logged nothing yet")
    rows = [[rounded(row) for row in thinned(lines)] for lines in (contents.train, contents.validation)]
    return ReferenceCurves(name, settings_of(contents.recipe), *rows)


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most POINTS rows, the first and the last among them."""
    if len(rows) <= POINTS:
        return list(rows)
    return [rows[round(number * (len(rows) - 1) / (POINTS - 1))] for number in range(POINTS)]


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a log without its timing, numbers to four digits."""
    return {
        name: value if isinstance(value, int) else float(f"{value:.4g}")
        for name, value in row.items()
        if name not in TIMING
    }


def write_curves(curves: ReferenceCurves, path: str | Path) -> Path:
    """Writes curves as JSON, a column a number; the same curves give the same file.

    Raises:
        UsageError: they would be larger than LARGEST.
    """
    table = {
        "lexel": lexel.__version__,
        "recipe": curves.recipe,
        "settings": dict(sorted(curves.settings.items())),
        "train": columns(curves.train),
        "validation": columns(curves.validation),
    }
    text = json.dumps(table, allow_nan=False) + "\n"
    if len(text) > LARGEST:
        raise UsageError(f"the curves of {curves.recipe} take {len(text):,} bytes, more than {LARGEST:,}")
    with atomic(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; None where a row has no such number."""
    names = sorted({name for row in rows for name in row})
    return {name: [row.get(name) for row in rows] for name in names}


def read_curves(path: str | Path) -> ReferenceCurves:
    """The curves of a file.

    Raises:
        UsageError: it is no file of reference curves.
    """
    table = read_json(Path(path))
    tables = [table.get(part) for part in ("settings", "train", "validation")]
    if not isinstance(table.get("recipe"), str) or not all(isinstance(part, dict) for part in tables):
        raise UsageError(f"{path} holds no reference curves; `lexel curves RUN --out FILE` writes them")
    train, validation = (rows_of(table[part], path) for part in ("train", "validation"))
    return ReferenceCurves(table["recipe"], table["settings"], train, validation)


def rows_of(table: Mapping[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """Columns as rows."""
    lengths = {len(column) if isinstance(column, list) else -1 for column in table.values()}
    values = [value for column in table.values() if isinstance(column, list) for value in column]
    numbers = all(value is None or is_number(value) for value in values)
    if table and (len(lengths) != 1 or -1 in lengths or "step" not in table or not numbers or None in table["step"]):
        raise UsageError(f"{path}: curves must be columns of numbers of equal length, with one named step")
    return [
        {name: value for name, value in zip(table, row, strict=True) if value is not None}
        for row in zip(*table.values(), strict=True)
    ]


def reference_for(folder: str | Path) -> ReferenceCurves | None:
    """The curves to draw behind a run: `curves.json` in its folder, else those of the recipe of Lexel's nearest to its.

    A recipe counts where the whole network (`model`, or `generator`) is the same and at most eight other options
    differ.
    """
    files = RunFolder(folder, writes=False)
    if files.curves.is_file():
        return read_curves(files.curves)
    settings = settings_of(files.read_recipe())
    near: list[tuple[int, str, ReferenceCurves]] = []
    for path in sorted(FOLDER.glob("*.json")):
        curves = read_curves(path)
        if same_network(curves.settings, settings):
            near.append((len(curves.differences(settings)), path.stem, curves))
    return min(near)[2] if near and min(near)[0] <= 8 else None


def same_network(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two recipes, as `settings_of` gives them, have the same network.

    An option that one of them does not name came after it was written, and has its default there.
    """
    for part, kind, usual in (
        ("generator.", "generator.kind", "next_token"),
        ("model.", "model.autoencoder.kind", "vqgan"),
    ):
        network, other = (
            {name: value for name, value in each.items() if name.startswith(part)} for each in (settings, others)
        )
        if network.get(kind, usual) != other.get(kind, usual) or bool(network) != bool(other):
            return False
        if not network:
            continue
        named = network.get(kind, usual)
        if part == "generator.":  # networks are imported where two recipes are compared
            from lexel.generators import GENERATORS

            fields: type[Config] = GENERATORS[named].Config
        else:
            from lexel.autoencoders import AUTOENCODERS

            fields = AUTOENCODERS[named].config_class
        prefix = kind.removesuffix("kind")
        for name, field in fields.model_fields.items():
            if not field.is_required() and field.default is not None:
                network.setdefault(prefix + name, field.default)
                other.setdefault(prefix + name, field.default)
        if network != other:
            return False
    return True
