"""Reports on finished runs: read `result.json` files with their types checked, write tables."""

import argparse
import json
import math
import sys
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ponet.checkpoint import write_atomically, write_json, write_text

if TYPE_CHECKING:
    # programs that draw nothing read results, too, in each of their processes
    from matplotlib.figure import Figure

RESULT = "result.json"

Record = TypeVar("Record")


class ResultError(ValueError):
    """A result that cannot be used, in words that name its file."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ResultError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ResultError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def take_fields(path: Path, content: Mapping[str, Any], cls: type[Record]) -> Record:
    """Make a dataclass of those entries of an object that it has fields for.

    Args:
        path: of the object, for messages.
        content: the object.
        cls: the dataclass.

    Raises:
        ResultError: an entry is missing or of another type.
    """
    hints = typing.get_type_hints(cls)
    # a type variable cannot say that the class is a dataclass
    names = [field.name for field in fields(typing.cast(Any, cls))]
    return cls(**{name: _checked(path, content, name, hints[name]) for name in names})


def _checked(path: Path, content: Mapping[str, Any], name: str, expected: Any) -> Any:
    if name not in content:
        raise ResultError(f"{path}: {name}: missing")
    value = content[name]
    if not _fits(value, expected):
        kind = getattr(expected, "__name__", str(expected))
        raise ResultError(f"{path}: {name}: expected {kind}, found {value!r}")
    return value


def _fits(value: Any, expected: Any) -> bool:
    arguments = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(x, arguments[1]) for x in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(x, arguments[0]) for x in value)
    if arguments:
        return any(_fits(value, kind) for kind in arguments)
    if expected is Any:
        return True
    if expected is float:
        # to Python true is an int, and JSON writes NaN
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is expected


def read_runs(
    folder: Path,
    read: Callable[[Path], Record],
    identity: Callable[[Record], Hashable],
    program: str,
) -> list[Record]:
    """All results below a folder, in the order of their paths.

    Args:
        folder: of the runs.
        read: makes a record of a `result.json`.
        identity: what two results of the same run have in common.
        program: that makes them, for messages.

    Raises:
        ResultError: there is none, one is damaged, or two are of the same run.
    """
    paths = sorted(folder.rglob(RESULT))
    if not paths:
        raise ResultError(f"{folder}: holds no {RESULT}, python {program} makes them")
    seen: dict[Hashable, Path] = {}
    results = []
    for path in paths:
        result = read(path)
        run = identity(result)
        if run in seen:
            raise ResultError(f"{path}: the same run as {seen[run]}, expected one result a run")
        seen[run] = path
        results.append(result)
    return results


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_text(value: float | None) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def write_report_files(folder: Path, text: str, content: Any, figure: "Figure") -> None:
    """Write `report.md`, `report.json` and `report.png`, each whole or not at all.

    Raises:
        OSError: one cannot be written.
    """
    write_text(folder / "report.md", text)
    write_json(folder / "report.json", content)
    write_atomically(folder / "report.png", partial(figure.savefig, format="png", dpi=130))


def report_program(
    program: str, description: str, default: str, report: Callable[[Path], str]
) -> None:
    """The whole of a program that reports on a folder of runs and prints the Markdown.

    Args:
        program: its path, for complaints.
        description: for `--help`.
        default: the folder when none is given.
        report: writes the files of a folder and returns the Markdown.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(default), help=f"of the runs [{default}]"
    )
    try:
        print(report(parser.parse_args().folder), end="")
    except (ResultError, OSError) as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        sys.exit(1)
