"""A program's configuration: dataclass defaults < YAML preset < flags made from the fields."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


class UsageError(ValueError):
    """A flag or a configuration file that cannot be used."""


def require(holds: bool, name: str, expected: str, found: object) -> None:
    """Refuse the value of a field.

    Raises:
        UsageError: it does not hold.
    """
    if not holds:
        raise UsageError(f"{_flag(name)} must be {expected}, found {found}")


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those it inherits from, on one line."""
    docs = {}
    for owner in [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _optional(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was allowed."""
    if isinstance(hint, types.UnionType):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner, True
    return hint, False


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Bring a value from YAML or a flag to the type of its field.

    Args:
        value: what was given.
        hint: the field's annotation: int, float, str, bool, Literal, a tuple of one of these
            of any length, or any of them with None.
        where: the flag or file and key, for the error.

    Raises:
        UsageError: the value does not fit.
    """
    inner, nullable = _optional(hint)
    if value is None and nullable:
        return None
    if typing.get_origin(inner) is typing.Literal:
        allowed = typing.get_args(inner)
        if value in allowed:
            return value
        raise UsageError(f"{where}: expected one of {', '.join(allowed)}, found {value!r}")
    if typing.get_origin(inner) is tuple:
        kind, _ = typing.get_args(inner)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(coerce(item, kind, where) for item in items)
    # YAML reads 1e-4 as a string, and true is an int to Python
    number = _number(value) if inner in (int, float) else None
    if number is not None and (inner is float or float(number).is_integer()):
        return inner(number)
    if inner in (bool, str) and isinstance(value, inner):
        return value
    raise UsageError(f"{where}: expected {inner.__name__}, found {value!r}")


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    # a float would round a long integer, a seed for example
    for kind in (int, float) if isinstance(value, str) else (float,):
        try:
            return kind(value)
        except (TypeError, ValueError):
            pass
    return None


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give `parser` a flag for each field of the dataclass `cls`; absent flags stay absent."""
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner, _ = _optional(hints[field.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": docs.get(field.name)}
        if options["help"] is not None:
            options["help"] = options["help"].replace("%", "%%") + f" [{field.default}]"
        if inner is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(inner) is tuple:
            options |= {"nargs": "+", "metavar": "ITEM"}
        else:
            choices = "|".join(map(str, typing.get_args(inner)))
            options["metavar"] = choices or inner.__name__.upper()
        parser.add_argument(_flag(field.name), **options)


def read_yaml(path: Path, cls: type) -> dict[str, Any]:
    """Fields of `cls` from a YAML file.

    Raises:
        UsageError: the file is missing or no mapping, a key is unknown, or a value does not fit.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(content).__name__}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise UsageError(
                f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
    return {key: coerce(value, hints[key], f"{path}: {key}") for key, value in content.items()}


def preset_path(name: str, presets: Path) -> Path:
    """The file of a preset by name, or a YAML file by path.

    Raises:
        UsageError: there is neither.
    """
    path = presets / f"{name}.yaml"
    if path.is_file():
        return path
    if Path(name).is_file():
        return Path(name)
    known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
    raise UsageError(f"--config: no preset or file {name!r}; the presets are {known}")


def flag_values(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Fields of `cls` that were given as flags.

    Raises:
        UsageError: a value does not fit its field.
    """
    hints = typing.get_type_hints(cls)
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(cls)
        if hasattr(arguments, field.name)
    }
    return {name: coerce(value, hints[name], _flag(name)) for name, value in given.items()}


def parse_arguments(
    cls: type[Any], argv: Sequence[str] | None, *, description: str, default_preset: str
) -> tuple[str, dict[str, Any]]:
    """Parse the command line of a program.

    Args:
        cls: the dataclass of the program.
        argv: arguments, those of the process when None.
        description: for `--help`.
        default_preset: the preset used without `--config`.

    Returns:
        The preset's name or path, and the fields given as flags.

    Raises:
        UsageError: a value does not fit; an unknown flag ends the process with status 2.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", default=default_preset, metavar="PRESET", help="name or YAML file"
    )
    # launchers of older versions pass it; the environment variable LOCAL_RANK is what counts
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_flags(parser, cls)
    arguments = parser.parse_args(argv)
    return arguments.config, flag_values(arguments, cls)
