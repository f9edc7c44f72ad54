"""Files of examples, unquoted TSV, CSV or JSON lines, perhaps compressed; and the hub's tables."""

import csv
import gzip
import io
import json
import logging
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glue.rows import DataError, Rows
from glue.tasks import Column, Hub, Table

_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".tsv", ".csv", ".jsonl", ".txt")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
_SHOWN = 40
_LONGEST_FIELD = 2**31 - 1

logger = logging.getLogger(__name__)


class _Incomplete(DataError):
    """A row that lacks a column or a text."""


Record = tuple[str, dict[Column, str]]
"""Place for messages, and fields by name of column and by place."""


def read_table(path: Path, table: Table, labels: Sequence[str]) -> Rows:
    """Read the examples of a file.

    Args:
        path: ends in .tsv or .txt (unquoted, as GLUE's), .csv (quoted) or .jsonl, and perhaps .gz
            or .xz after that.
        table: which columns.
        labels: in the order of the classes; none: labels are numbers.

    Raises:
        DataError: the file cannot be read or is empty, or a row is not as the table says.
    """
    names = table.labels or tuple(labels)
    classes = {name: number for number, name in enumerate(names)}
    texts: list[list[str]] = [[] for _ in table.texts]
    found: list[float] = []
    indices: list[str] = []
    skipped = 0
    for where, fields in _records(path, table):
        try:
            row = [_text(where, fields, column, table) for column in table.texts]
            label = None if table.label is None else _field(where, fields, table.label)
        except _Incomplete:
            if not table.skips_incomplete:
                raise
            skipped += 1
            continue
        for column, text in zip(texts, row, strict=True):
            column.append(text)
        if label is not None:
            found.append(_label(where, label, classes))
        index = str(len(indices)) if table.index is None else _field(where, fields, table.index)
        indices.append(index)
    if not indices:
        raise DataError(f"{path}: holds no examples")
    if skipped:
        logger.warning("%s: left out %d rows that lack a column or a text", path, skipped)
    return Rows(
        texts=tuple(texts),
        labels=None if table.label is None else _as_array(found, bool(names)),
        indices=indices,
        origin=str(path),
        skipped=skipped,
    )


def label_names(path: Path, table: Table) -> tuple[str, ...]:
    """The labels that a file holds, numbers in their order and others in that of the alphabet.

    Raises:
        DataError: as for `read_table`, or there are less than two labels.
    """
    assert table.label is not None
    found = {_field(where, fields, table.label) for where, fields in _records(path, table)}
    if len(found) < 2:
        raise DataError(
            f"{path}: expected at least two labels in {table.label!r}, found {sorted(found)}"
        )
    if all(name.isdigit() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def read_hub(hub: Hub, split: str, labels: Sequence[str]) -> Rows:
    """Read a split of a data set of the hub, downloaded or from the local cache.

    Args:
        hub: which.
        split: the name here.
        labels: in the order of the classes; none: labels are numbers.

    Raises:
        DataError: it cannot be had, or a label is out of range.
    """
    # seconds to import, and needed by this source only
    import datasets

    origin = f"the hub's {hub.name}" + (f" ({hub.config})" if hub.config else "")
    origin += f", {hub.splits[split]}"
    try:
        data = datasets.load_dataset(hub.name, hub.config, split=hub.splits[split])
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise DataError(f"{origin} cannot be loaded ({error})") from error
    texts = tuple(list(data[column]) for column in hub.texts)
    found = np.array(list(data["label"]))
    # labels that are kept secret are -1 there
    secret = len(found) > 0 and bool((found == -1).all())
    if labels and not secret and not ((found >= 0) & (found < len(labels))).all():
        raise DataError(
            f"{origin}: expected labels from 0 to {len(labels) - 1}, found {found.min()} to "
            f"{found.max()}"
        )
    rows = len(texts[0])
    indices = list(map(str, data["idx"])) if "idx" in data.column_names else None
    return Rows(
        texts=texts,
        labels=None if secret else found.astype(np.int64 if labels else np.float64),
        indices=indices or [str(number) for number in range(rows)],
        origin=origin,
    )


def _as_array(labels: list[float], are_classes: bool) -> np.ndarray:
    return np.array(labels, dtype=np.int64 if are_classes else np.float64)


def _records(path: Path, table: Table) -> Iterator[Record]:
    """Rows of a file with their places.

    Raises:
        DataError: the file cannot be read.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if kind not in _FORMATS:
        raise DataError(f"{path}: expected a name that ends in {', '.join(_FORMATS)}")
    opener = _COMPRESSED.get(path.suffix, open)
    try:
        # lines end with "\n" alone; texts hold other characters that Python would break lines at
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="\n") as file:
            if kind == ".jsonl":
                yield from _json_records(path, file)
            elif kind == ".csv":
                yield from _with_columns(path, _csv_rows(path, file), table)
            else:
                yield from _with_columns(path, _tsv_rows(path, file), table)
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _tsv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(file, start=1):
        line = line.rstrip("\r\n")
        if line:
            yield f"{path}, line {number}", line.split("\t")


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    # documents are longer than the module expects of a field
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(file, strict=True)
    try:
        for fields in reader:
            if fields:
                yield f"{path}, line {reader.line_num}", fields
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from error


def _with_columns(
    path: Path, rows: Iterator[tuple[str, list[str]]], table: Table
) -> Iterator[Record]:
    """Name the fields of rows, by the header if columns are asked for by name."""
    columns = [*table.texts, *(c for c in (table.label, table.index) if c is not None)]
    names = [column for column in columns if isinstance(column, str)]
    header: list[str] = []
    if names:
        _, header = next(rows, ("", []))
        absent = [name for name in names if name not in header]
        if absent:
            raise DataError(
                f"{path}: no column {absent[0]!r}; its header has {', '.join(header) or 'nothing'}"
            )
    for where, fields in rows:
        if names and len(fields) > len(header):
            raise DataError(f"{where}: {len(fields)} columns, but {len(header)} in the header")
        by_place: dict[Column, str] = dict(enumerate(fields))
        # a row with too few columns lacks its last ones
        yield where, by_place | dict(zip(header, fields, strict=False))


def _json_records(path: Path, file: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not a JSON document ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
        fields = {name: value for name, value in record.items() if value is not None}
        yield where, {name: _as_text(value) for name, value in fields.items()}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _field(where: str, fields: dict[Column, str], column: Column) -> str:
    if column not in fields:
        named = f"column {column!r}" if isinstance(column, str) else f"column {column + 1}"
        known = ", ".join(name for name in fields if isinstance(name, str))
        found = f"it has {known}" if known else f"it has {len(fields)}"
        raise _Incomplete(f"{where}: no {named}; {found}")
    return fields[column]


def _text(where: str, fields: dict[Column, str], column: Column, table: Table) -> str:
    text = _field(where, fields, column)
    # a prediction is due for every row that a submission asks for, even for one without text
    if not text.strip() and table.label is not None:
        raise _Incomplete(f"{where}: the text in column {column!r} is empty")
    return text


def _label(where: str, text: str, classes: dict[str, int]) -> float:
    """A class, or a number where there are no classes."""
    if classes:
        if text not in classes:
            known = ", ".join(classes)
            raise DataError(f"{where}: unknown label {text[:_SHOWN]!r}, expected one of {known}")
        return classes[text]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: expected a number as label, found {text[:_SHOWN]!r}")
    return number
