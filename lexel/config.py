"""Recipes: TOML files checked against typed models. A typo must not train for a week."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from lexel.errors import UsageError


class Config(BaseModel):
    """Base of every recipe section: typed, frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Recipes lie beside the package in a checkout, inside it where it is installed.
RECIPES = [Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes"]

Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Reads a TOML recipe, applies `section.key=value` overrides and checks the result against `model`.

    Raises:
        UsageError: the file is missing, is no TOML, or holds a key or value the model does not know.
    """
    return check(read(path, overrides), model, Path(path).name)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as plain tables, overrides applied, not yet checked."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the path of a recipe (a .toml file)") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; give the path of a recipe (a .toml file)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return table


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one of Lexel's own (`tiny`, `openmoji`, ...)."""
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        return path
    own = {file.stem: file for folder in RECIPES for file in sorted(folder.glob("*.toml"))}
    if str(name) not in own:
        raise UsageError(f"{name} is neither a .toml file nor a recipe of Lexel's: {', '.join(own)}")
    return own[str(name)]


def check(table: dict[str, Any], model: type[Model], source: str) -> Model:
    """The typed model for a table; `source` names it in errors."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(error, model)}") from None


def dump(model: BaseModel) -> str:
    """The resolved recipe as TOML; options that are None are left out."""
    return tomli_w.dumps(model.model_dump(mode="json", exclude_none=True))


def to_toml(table: Mapping[str, Any]) -> str:
    """A plain table as TOML."""
    return tomli_w.dumps(dict(table))


def parse_override(override: str) -> tuple[str, Any]:
    """The name and the value of `section.key=value`; a bare word is a string: `data.source=openmoji`."""
    name, equals, text = override.partition("=")
    if not equals or not all(key.strip() for key in name.split(".")):
        raise UsageError(f"--set {override!r} is not of the form section.key=value")
    try:
        return name.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), text.strip()


def _override(table: dict[str, Any], override: str) -> None:
    name, value = parse_override(override)
    keys = [key.strip() for key in name.split(".")]
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override!r}: {key!r} is a value, not a section")
    table[keys[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake in words: where it is, what was given, what would work."""
    first = error.errors(include_url=False)[0]
    *where, name = [str(part) for part in first["loc"]] or ["the recipe"]
    place = ".".join(where) or "the recipe"
    if first["type"] == "extra_forbidden":
        return f"{place} has no option {name!r}; its options are {', '.join(_options(model, where))}"
    if first["type"] == "missing":
        return f"{place} lacks the option {name!r}"
    message = first["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    if isinstance(first["input"], dict):  # options that do not go together: the message names them
        return message if not first["loc"] else f"{'.'.join([*where, name])}: {message}"
    return f"{'.'.join([*where, name])} = {first['input']!r}: {message}"


def _options(model: type[BaseModel], where: list[str]) -> list[str]:
    for part in where:
        field = model.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
