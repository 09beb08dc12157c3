"""Tables of what can be added: looking a name up, and building it from checked options.

Every extension point is a dictionary from a name to a class or function. Other packages extend it by an entry point
of the same group (`lexel.quantizers`, `lexel.autoencoders`, ...), which is looked up only when a name is unknown.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from lexel.errors import UsageError, unknown

Entry = TypeVar("Entry")

LARGEST = 2**53  # integers beyond are typing errors, and cannot be told apart once a tool has read them as floats


def lookup(table: Mapping[str, Entry], name: str, what: str, group: str | None = None) -> Entry:
    """The entry of a table, or of another package's entry point in `group`.

    Args:
        table: the names that Lexel knows.
        name: the name asked for.
        what: what the table holds, for the error: "quantizer".
        group: the entry-point group in which other packages may have registered it.

    Raises:
        UsageError: nobody has registered that name, or the package that did cannot be imported.
    """
    if isinstance(name, str) and name in table:  # a recipe may say anything
        return table[name]
    for point in entry_points(group=group) if group else ():
        if point.name == name:
            try:
                return typing.cast(Entry, point.load())
            except (ImportError, AttributeError) as error:
                raise UsageError(f"{what} {name!r}: {point.value} cannot be loaded: {error}") from None
    raise unknown(what, name, names(table, group))


def names(table: Mapping[str, Any], group: str | None = None) -> list[str]:
    """All names that `lookup` finds, sorted: those of the table and of other packages."""
    return sorted({*table, *(point.name for point in (entry_points(group=group) if group else ()))})


def build(constructor: Callable[..., Entry], kind: str, options: Mapping[str, Any], what: str) -> Entry:
    """Calls a constructor with options whose names and types were checked against its signature.

    Args:
        constructor: a class or function with annotated parameters.
        kind: its name in a table, for errors.
        options: keyword arguments, as read from TOML or JSON.
        what: what it is, for errors: "quantizer".

    Raises:
        UsageError: an option is unknown, missing, or of a wrong type; or what the constructor itself refuses.
    """
    parameters = inspect.signature(constructor, eval_str=True).parameters
    for name, value in options.items():
        if name not in parameters:
            raise UsageError(f"{what} {kind!r} has no option {name!r}; its options are {', '.join(parameters)}")
        annotation = parameters[name].annotation
        if not fits(value, annotation):
            raise UsageError(f"{what} {kind!r}: {name} = {value!r} is not {_described(annotation)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"{what} {kind!r} needs the option {name!r}")
    return constructor(**options)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value read from TOML or JSON is of an annotated type; numbers must be finite and below 2**53."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if annotation is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    kind = origin or annotation
    if not isinstance(kind, type):
        return True
    if issubclass(kind, tuple) and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return not arguments or (len(value) == len(arguments) and all(map(fits, value, arguments)))
    if issubclass(kind, Mapping):
        key, item = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if issubclass(kind, Sequence) and not issubclass(kind, str):
        return isinstance(value, list | tuple) and all(fits(item, *(arguments or (Any,))) for item in value)
    return isinstance(value, kind)


def _described(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    plain = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}
    if annotation in plain:
        return plain[annotation]
    if isinstance(origin, type) and issubclass(origin, Sequence | tuple):
        item = _described(arguments[0]).removeprefix("a ").removeprefix("an ") if arguments else "value"
        return f"a list of {item}s"
    if isinstance(origin or annotation, type) and issubclass(origin or annotation, Mapping):
        return "a table"
    return f"a {getattr(annotation, '__name__', annotation)}"
