"""From config classes to command-line flags and back: one field is one flag and one help text.

Knows pydantic fields and argparse; does not know any config by name, so that the runtime never imports training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mope.errors import ConfigError

NONE = "none"  # how an empty list or no value is typed
ModelT = TypeVar("ModelT", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a `ConfigError`, one line like all others, and that guesses no abbreviations.

    Args:
        prog: the command's name, as a user types it.
        description: what it does.
        usage: the arguments in short, after the command's name.
        example: what a user could type, shown at the end of the help.
    """

    def __init__(self, prog: str, description: str, usage: str, example: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def flag_name(field: str) -> str:
    """The flag of a field: `learning_rate` is `--learning-rate`."""
    return "--" + field.replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser, section: str, model: type[BaseModel], *, skip: Collection[str] = ()
) -> None:
    """Give a parser a group with one flag for each field of a config class.

    Args:
        parser: gets the flags.
        section: name of the config's part; `given` returns the values below it.
        model: the config class.
        skip: fields without a flag.
    """
    group = parser.add_argument_group(cleandoc(model.__doc__ or section).splitlines()[0].rstrip("."))
    for name, field in model.model_fields.items():
        if name not in skip:
            action = group.add_argument(flag_name(name), dest=f"{section}.{name}", **_options(field))
            action.default = argparse.SUPPRESS  # so that what was not typed leaves the recipe's value


def given(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The values that were typed, by section and field; what was not typed is not there."""
    found: dict[str, dict[str, Any]] = {}
    for target, value in vars(arguments).items():
        section, dot, field = target.partition(".")
        if dot:
            found.setdefault(section, {})[field] = value
    return found


def validated(
    model: type[ModelT], values: Mapping[str, Any], name_of: Callable[[tuple[int | str, ...]], str]
) -> ModelT:
    """A config from values that users wrote.

    Args:
        model: the config class.
        values: its fields.
        name_of: what a user calls the field at a place, for example `--learning-rate`.

    Raises:
        ConfigError: the first value that can't be used, in one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = name_of(first["loc"])
        if first["type"] == "missing":
            raise ConfigError(f"{where} is missing") from error
        expected = first["msg"].partition(", unable to parse")[0].replace("Input should be ", "")
        raise ConfigError(f"{where}: got {first['input']!r}; expected {expected}") from error


def _options(field: FieldInfo) -> dict[str, Any]:
    """What argparse is told about a field."""
    kind, optional = _kind(field.annotation)
    options: dict[str, Any] = {"help": _help(field).replace("%", "%%")}
    if kind is bool:
        return {**options, "action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        values = ",".join(map(str, get_args(item))) if get_origin(item) is Literal else _metavar(item)
        return {**options, "type": _split, "metavar": values if get_origin(item) is Literal else f"{values},..."}
    if get_origin(kind) is Literal:
        return {**options, "choices": get_args(kind)}
    return {**options, "type": _or_none if optional else str, "metavar": _metavar(kind)}


def _kind(annotation: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether that was there."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"a flag has one type, or none at all; got {annotation}")
    return kinds[0], True


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _help(field: FieldInfo) -> str:
    """The field's description with its default, if it has one that is the same everywhere."""
    text = field.description or ""
    if field.is_required() or field.default_factory is not None:
        return text
    value = field.default
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, tuple):
        value = ",".join(map(str, value)) or NONE
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"{text} (default: {NONE if value is None else value})"


def _split(text: str) -> tuple[str, ...]:
    if text.strip() in ("", NONE):
        return ()
    return tuple(part.strip() for part in text.split(","))


def _or_none(text: str) -> str | None:
    return None if text == NONE else text
