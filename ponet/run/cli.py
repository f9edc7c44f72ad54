"""How a program begins and ends: dataclass defaults < YAML preset < flags, and errors in a line.

What is wrong with a flag or a file is a `UsageError`.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ponet.run.trainer import TrainingError

USER_ERRORS = (ValueError, TrainingError, OSError)
"""Causes outside a program: usage, data, checkpoints (all ValueErrors), a diverging loss, disks."""


class UsageError(ValueError):
    """A flag or a configuration file that cannot be used."""


@contextmanager
def errors_in_one_line(
    program: str, *, advice: str = "", leave: Callable[[int], Any] = sys.exit
) -> Iterator[None]:
    """Let a program that one of `USER_ERRORS` or Ctrl-C ends do so in one line on stderr.

    `advice` says how to go on after Ctrl-C; `leave` ends the process with a status: 2 for wrong
    usage, 130 for Ctrl-C, 1 otherwise.
    """
    try:
        yield
    except USER_ERRORS as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        leave(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted{advice}", file=sys.stderr, flush=True)
        leave(130)


def require(holds: bool, name: str, expected: str, found: object) -> None:
    """Refuse the value of a field if something does not hold."""
    if not holds:
        raise UsageError(f"{_flag(name)} must be {expected}, found {found}")


def require_at_least(config: object, bounds: Mapping[str, float]) -> None:
    """Refuse a configuration with a field below its bound; None is no number."""
    for name, least in bounds.items():
        value = getattr(config, name)
        require(value is None or value >= least, name, f"at least {least}", value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_yaml(path: Path, cls: type) -> dict[str, Any]:
    """Fields of a dataclass from a YAML file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(content).__name__}")
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            meant = f", did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{path}: unknown key {key!r}{meant}")
    return {key: _fitted(value, hints[key], f"{path}: {key}") for key, value in content.items()}


def _preset_path(name: str, presets: Path) -> Path:
    for path in (presets / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    raise UsageError(f"--config: no preset or file {name!r}; the presets are {_names_in(presets)}")


def _names_in(presets: Path) -> str:
    return ", ".join(sorted(path.stem for path in presets.glob("*.yaml")))


def parse_arguments(
    cls: type[Any],
    argv: Sequence[str] | None,
    *,
    description: str,
    default_preset: str,
    presets: Path,
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Parse a command line, that of the process when None, with a flag for each field of `cls`.

    Returns the file of the preset, its fields, and those that flags give. An unknown flag ends the
    process with status 2.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=False)
    text = f"{_names_in(presets)}, or a YAML file [{default_preset}]"
    parser.add_argument("--config", default=default_preset, metavar="PRESET", help=text)
    # launchers may pass it; the environment variable LOCAL_RANK is what counts
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    # the other flags are shown with the values that the preset gives them
    path = _preset_path(parser.parse_known_args(argv)[0].config, presets)
    preset = read_yaml(path, cls)
    parser.add_argument("-h", "--help", action="help", help="show this, with the preset's values")
    _add_flags(parser, cls, preset)
    given = vars(parser.parse_args(argv))
    del given["config"], given["local_rank"]
    hints = typing.get_type_hints(cls)
    flags = {name: _fitted(given[name], hints[name], _flag(name)) for name in given}
    return path, preset, flags


def _add_flags(parser: argparse.ArgumentParser, cls: type, preset: dict[str, Any]) -> None:
    """Absent flags stay absent."""
    docs, hints = _field_docs(cls), typing.get_type_hints(cls)
    # own fields before those it inherits
    for field in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        kind = _without_none(hints[field.name])
        value = preset.get(field.name, field.default)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text = f"{docs.get(field.name, '')} [{shown}]".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "metavar": "ITEM"}
        else:
            options["metavar"] = "|".join(typing.get_args(kind)) or kind.__name__.upper()
        parser.add_argument(_flag(field.name), **options)


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those it inherits from, on one line."""
    docs = {}
    for owner in [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for pair in itertools.pairwise(tree.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _without_none(hint: Any) -> Any:
    """`int` for `int | None`."""
    if not isinstance(hint, types.UnionType):
        return hint
    (kind,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return kind


def _fitted(value: Any, hint: Any, where: str) -> Any:
    """Bring a value from YAML or a flag to the type of its field."""
    kind = _without_none(hint)
    item = kind
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        # in YAML one may stand alone
        value = [value] if isinstance(value, str | int | float) else value
    parts = value if isinstance(value, list | tuple) else [value]
    if item in (int, float) and any(isinstance(part, bool) for part in parts):
        # which would do as 1 or 0
        raise UsageError(f"{where}: expected {item.__name__}, found {value!r}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        allowed = typing.get_args(item)
        expected = f"one of {', '.join(allowed)}" if allowed else item.__name__
        found = error.errors()[0]["input"]
        raise UsageError(f"{where}: expected {expected}, found {found!r}") from error
