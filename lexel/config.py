"""Recipes: TOML files checked against typed models. A typo must not train for a week."""

import datetime
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lexel.errors import UsageError
from lexel.regular import expanded


class Config(BaseModel):
    """Base of every recipe section: typed, frozen, and closed to unknown keys, infinities and NaN.

    Attributes:
        REPLACES: options that exclude each other, such as steps and epochs: an override of the one takes the other
            away.
        LARGEST: integers beyond are typing errors. Those of networks, whose options are sizes and counts, lie lower.
        LARGER: options that may be larger, and their own bounds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
    REPLACES: ClassVar[dict[str, str]] = {}
    LARGEST: ClassVar[int] = 2**53
    LARGER: ClassVar[dict[str, int]] = {}

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, table: Any) -> Any:
        """Refuses integers that no run could use, before anything is computed from them."""
        for name, value in table.items() if isinstance(table, Mapping) else ():
            most = cls.LARGER.get(name, cls.LARGEST)
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and abs(number) > most:
                    raise ValueError(f"{name} must be at most {most:,}, got {_short(number)}")
        return table


UNSET = "none"  # the value of an override that takes an option away
Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Reads a TOML recipe, applies `section.key=value` overrides and checks the result against `model`.

    Raises:
        UsageError: the file is missing, is no TOML, or holds a key or value the model does not know.
    """
    return check(override(read(path), overrides, model), model, Path(path).name)


def read(path: str | Path) -> dict[str, Any]:
    """A recipe as plain tables, not yet checked."""
    path = expanded(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is no regular file; give the path of a recipe (a .toml file)")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the path of a recipe (a .toml file)") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; give the path of a recipe (a .toml file)") from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors are ValueErrors, as are numbers too long
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def own_recipes() -> dict[str, Path]:
    """The files of Lexel's own recipes by their names: beside the package in a checkout, inside it where installed."""
    package = Path(__file__).parent
    folders = (package / "recipes", package.parent / "recipes")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one of Lexel's own (`tiny`, `openmoji`, ...)."""
    path = expanded(name)
    if path.suffix == ".toml" or path.exists():
        return path
    own = own_recipes()
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


def parse_override(text: str, option: str = "--set") -> tuple[str, Any]:
    """The name and the value of `section.key=value`; a bare word is a string: `data.source=openmoji`.

    Raises:
        UsageError: it has another form; `option` is what the text was given to.
    """
    name, value = _split(text, option)
    return name, _parse(value)


def override(table: dict[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """The table with `section.key=value` overrides applied.

    Where the option is a string, the text counts as it stands (`data.source=2024-05-17`), with or without quotes.
    `none` takes away an option that may be missing, and giving one of two options that exclude each other takes the
    other away.

    Raises:
        UsageError: an override has another form, or treats a value as a section.
    """
    for text in overrides:
        _override(table, text, model)
    return table


def _override(table: dict[str, Any], text: str, model: type[BaseModel]) -> None:
    name, value = _split(text)
    keys = [key.strip() for key in name.split(".")]
    annotation: Any = model
    for key in keys[:-1]:
        annotation = _field(annotation, key)
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {text!r}: {key!r} is a value, not a section")
    for section in _models(annotation):
        replaced = getattr(section, "REPLACES", {}).get(keys[-1])
        if replaced is not None and value != UNSET:
            table.pop(replaced, None)
    allowed = _types(_field(annotation, keys[-1]))
    # An option of a free table (a quantizer's, the weights) may always be missing.
    if value == UNSET and (type(None) in allowed or not _models(annotation)):
        table.pop(keys[-1], None)
        return
    table[keys[-1]] = _typed(value, allowed)


def _split(text: str, option: str = "--set") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not all(key.strip() for key in name.split(".")):
        raise UsageError(f"{option} {text!r} is not of the form {'section.key' if option == '--set' else 'name'}=value")
    return name.strip(), value.strip()


def _parse(text: str) -> Any:
    """The TOML value that a text is, or the text itself; dates count as text, since no option is a date."""
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    found = value.pop("value")
    return text if value or isinstance(found, datetime.date | datetime.time) else found


def _typed(text: str, allowed: set[Any]) -> Any:
    value = _parse(text)
    fits = type(value) in allowed or (type(value) is int and float in allowed)
    return text if str in allowed and not fits else value


def _types(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _types(arguments[0])
    if origin is Literal:
        return {type(value) for value in arguments}
    if origin in (Union, UnionType):
        return {kind for argument in arguments for kind in _types(argument)}
    return {origin or annotation}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows."""
    return [kind for kind in _types(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _field(annotation: Any, key: str) -> Any:
    """The annotation of an option of a section, or of a table's values; None where it is not known."""
    for section in _models(annotation):
        if key in section.model_fields:
            return section.model_fields[key].annotation
    arguments = get_args(annotation)
    return arguments[1] if get_origin(annotation) is dict and arguments else None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every mistake in words: where it is, what was given, what would work."""
    messages: dict[str, list[str]] = {}  # what is wrong, by the place: a union has a message for each of its members
    for mistake in error.errors(include_url=False):
        place, message = _describe(mistake, model)
        reasons = messages.setdefault(place, [])
        if message not in reasons:
            reasons.append(message)
    return "; ".join(place + " or ".join(reasons) for place, reasons in messages.items())


def _describe(mistake: Any, model: type[BaseModel]) -> tuple[str, str]:
    """The place of a mistake, the value given, and what is wrong with it."""
    path = list(_path(mistake["loc"], model))
    where, name = ".".join(path[:-1]) or "the recipe", path[-1] if path else "the recipe"
    if mistake["type"] == "extra_forbidden":
        return "", f"{where} has no option {name!r}; its options are {', '.join(_options(model, path[:-1]))}"
    if mistake["type"] == "missing":
        return "", f"{where} lacks the option {name!r}"
    message = mistake["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    if isinstance(mistake["input"], dict):  # options that do not go together: the message names them
        return (f"{'.'.join(path)}: " if path else ""), message
    return f"{'.'.join(path)} = {_short(mistake['input'])}: ", message


def _path(location: Sequence[int | str], model: type[BaseModel]) -> Iterator[str]:
    """The names of a location, without the labels that pydantic gives to the members of a union."""
    annotation: Any = model
    parts = list(location)
    while parts:
        members = _types(annotation) - {type(None)}
        if len(members) > 1 and len(parts) > 1 and _field(annotation, str(parts[0])) is None:
            label = parts.pop(0)
            annotation = next((kind for kind in members if label in (getattr(kind, "__name__", ""), _kind(kind))), None)
        elif len(members) > 1 and _field(annotation, str(parts[0])) is None:
            return  # the label of a plain member
        part = parts.pop(0)
        annotation = _field(annotation, str(part))
        yield str(part)


def _kind(section: Any) -> str | None:
    """The value of `kind` that chooses a section among several."""
    fields = getattr(section, "model_fields", {})
    return fields["kind"].default if "kind" in fields else None


def _options(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    annotation: Any = model
    for part in path:
        annotation = _field(annotation, part)
    return [name for section in _models(annotation) for name in section.model_fields]


def _short(value: Any) -> str:
    """A value for a message; what would fill the screen is cut."""
    if isinstance(value, int) and abs(value) > 10**80:  # Python refuses to write very long numbers
        return f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
