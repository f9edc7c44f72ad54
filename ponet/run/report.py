"""Reports on finished runs: `result.json` files as one table, checked, and Markdown of it."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import TypeAdapter, ValidationError

from ponet.files import write_atomically, write_text
from ponet.run.cli import errors_in_one_line
from ponet.run.runs import RESULT

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


class ResultError(ValueError):
    """A result that cannot be used, in words that name its file."""


def read_results(
    folder: Path, record: type[Any], identity: Sequence[str], program: str
) -> pd.DataFrame:
    """All results below a folder that a program made, one row per run in the order of their paths.

    Their fields are those of the dataclass `record`; results of the same run, which agree in the
    fields of `identity`, are refused.
    """
    paths = sorted(folder.rglob(RESULT))
    if not paths:
        raise ResultError(f"{folder}: holds no {RESULT}, python {program} makes them")
    adapter, rows, seen = TypeAdapter(record), [], {}
    for path in paths:
        row = vars(_read_result(path, adapter)) | {"path": str(path)}
        first = seen.setdefault(json.dumps([row[name] for name in identity]), path)
        if first is not path:
            raise ResultError(f"{path}: the same run as {first}, expected one result")
        rows.append(row)
    return pd.DataFrame(rows)


def _read_result(path: Path, adapter: TypeAdapter[Any]) -> Any:
    try:
        # JSON's true is no number, its 1 no text
        return adapter.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([str(path), *filter(None, [".".join(map(str, first["loc"]))])])
        raise ResultError(f"{where}: {first['msg']}, found {first['input']!r}") from error


def read_published(path: Path) -> Any:
    """Published figures that belong to a program, from its YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_text(value: float | None) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def scores_text(values: Sequence[float]) -> str:
    """Mean, standard deviation and number of the scores of several seeds."""
    scores = pd.Series(values, dtype=float)
    spread = f" {PLUS_MINUS} {scores.std():.2f}" if len(scores) > 1 else ""
    return f"{scores.mean():.2f}{spread} ({len(scores)})"


def write_report(folder: Path, text: str, figure: Any = None) -> None:
    """Write `report.md`, and `report.png` of a figure of matplotlib, each whole or not at all."""
    write_text(folder / "report.md", text)
    if figure is not None:
        write_figure(folder / "report.png", figure)


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all."""
    write_atomically(path, partial(figure.savefig, format="png", dpi=130))


def report_program(
    program: str, description: str, default: str, report: Callable[[Path], str]
) -> None:
    """The whole of a program that writes a report on a folder of runs and prints its Markdown."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(default), help=f"of the runs [{default}]"
    )
    with errors_in_one_line(program):
        print(report(parser.parse_args().folder), end="")
