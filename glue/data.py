"""Examples of a task: read from files before the hub, counted, cut where a part is missing."""

import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glue.tasks import TASKS, ColumnKey, FileColumns, HubData, TaskFiles, TextTask
from ponet.files import write_text

_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".tsv", ".csv", ".jsonl", ".txt")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
_SHOWN = 40
_LONGEST_FIELD = 2**31 - 1
_CUT_SHARE = 0.1
_CUT_SEED = 0

logger = logging.getLogger(__name__)

Fields = dict[ColumnKey, str]
"""One row of a file, by name of column and by place."""


class DataError(ValueError):
    """Data that are absent, damaged or not what a task needs, in words for whoever named them."""


class _IncompleteRowError(DataError):
    """A row that lacks a column or a text."""


@dataclass(frozen=True, kw_only=True)
class TextExamples:
    """A split of N examples."""

    texts: tuple[list[str], ...]
    """One list of N texts, or two for pairs."""
    labels: np.ndarray | None
    """`[N]`, int64 classes or float64 numbers; None: there are none."""
    indices: list[str]
    """What a submission calls each row."""
    columns: tuple[ColumnKey, ...]
    """Of the texts, where they were read."""
    origin: str
    """Where they were read, for messages."""

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, places: Sequence[int] | np.ndarray) -> "TextExamples":
        """Some examples, in the order given."""
        chosen = [int(place) for place in places]
        return replace(
            self,
            texts=tuple([column[place] for place in chosen] for column in self.texts),
            labels=None if self.labels is None else self.labels[chosen],
            indices=[self.indices[place] for place in chosen],
        )


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """All examples of a task."""

    task: TextTask
    train: TextExamples
    evaluation: Mapping[str, TextExamples]
    """Labelled splits to score, by name."""
    submissions: Mapping[str, TextExamples]
    """Splits without labels, by name of their submission file."""
    differences: tuple[str, ...]
    """Why figures cannot stand beside published ones; none: they can."""

    @cached_property
    def digest(self) -> str:
        """Hash of what decides figures: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for examples in (self.train, *self.evaluation.values()):
            for text in (text for column in examples.texts for text in column):
                digest.update(text.encode() + b"\0")
            assert examples.labels is not None
            digest.update(examples.labels.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """A user's own task."""

    train: Path
    dev: Path | None
    """None: a tenth of `train` is cut off."""
    test: Path | None
    """Without labels, to predict."""
    texts: tuple[str, ...]
    """Names of the columns of one text or two."""
    label: str
    """Name of the column of labels."""
    is_regression: bool
    """Labels are numbers."""


def read_table(path: Path, table: FileColumns, labels: Sequence[str]) -> TextExamples:
    """Read the examples of a file.

    Args:
        path: ends in .tsv or .txt (unquoted, as GLUE's), .csv (quoted) or .jsonl, and perhaps .gz
            or .xz after that.
        table: which columns.
        labels: in the order of the classes; none: labels are numbers.

    Raises:
        DataError: the file cannot be read or is empty, or a row is not as the table says.
    """
    classes = {name: number for number, name in enumerate(labels)}
    texts: list[list[str]] = [[] for _ in table.texts]
    found: list[float] = []
    indices: list[str] = []
    skipped = 0
    for where, fields in _read_rows(path, table):
        try:
            row = [_text(where, fields, column, table) for column in table.texts]
            label = None if table.label is None else _field(where, fields, table.label)
        except _IncompleteRowError:
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
    dtype = np.int64 if labels else np.float64
    return TextExamples(
        texts=tuple(texts),
        labels=None if table.label is None else np.array(found, dtype=dtype),
        indices=indices,
        columns=table.texts,
        origin=str(path),
    )


def label_names(path: Path, table: FileColumns) -> tuple[str, ...]:
    """The labels that a file holds: by value if all are numbers, else in alphabetical order.

    Raises:
        DataError: as for `read_table`, or there are less than two labels.
    """
    assert table.label is not None
    found = set()
    for where, fields in _read_rows(path, table):
        label = _field(where, fields, table.label)
        if not label.strip():
            raise DataError(f"{where}: the label in column {table.label!r} is empty")
        found.add(label)
    if len(found) < 2:
        raise DataError(
            f"{path}: expected at least two labels in {table.label!r}, found {sorted(found)}"
        )
    try:
        return tuple(sorted(found, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(found))


def _read_rows(path: Path, table: FileColumns) -> Iterator[tuple[str, Fields]]:
    """Rows of a file, each with its place for messages.

    Raises:
        DataError: the file cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    opener = _COMPRESSED.get(suffixes[-1], open) if suffixes else open
    kind = next((s for s in reversed(suffixes) if s not in _COMPRESSED), "")
    if kind not in _FORMATS:
        raise DataError(f"{path}: expected a name that ends in {', '.join(_FORMATS)}")
    try:
        # lines end with "\n" alone; texts hold other characters that Python would break lines at
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="\n") as file:
            if kind == ".jsonl":
                yield from _json_rows(path, file)
            else:
                rows = _csv_rows(path, file) if kind == ".csv" else _tsv_rows(path, file)
                yield from _name_fields(path, rows, table)
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


def _name_fields(
    path: Path, rows: Iterator[tuple[str, list[str]]], table: FileColumns
) -> Iterator[tuple[str, Fields]]:
    """Name the fields of rows, by the header if columns are asked for by name."""
    columns = [*table.texts, *(c for c in (table.label, table.index) if c is not None)]
    names = [column for column in columns if isinstance(column, str)]
    header: list[str] = []
    if names:
        _, header = next(rows, ("", []))
        for name in names:
            if name not in header:
                has = ", ".join(header) or "nothing"
                raise DataError(f"{path}: no column {name!r}; its header has {has}")
    for where, fields in rows:
        if names and len(fields) > len(header):
            raise DataError(f"{where}: {len(fields)} columns, but {len(header)} in the header")
        # a row with too few columns lacks its last ones
        yield where, dict(enumerate(fields)) | dict(zip(header, fields, strict=False))


def _json_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[str, Fields]]:
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
        yield (
            where,
            {
                name: value if isinstance(value, str) else json.dumps(value)
                for name, value in record.items()
                if value is not None
            },
        )


def _field(where: str, fields: Fields, column: ColumnKey) -> str:
    if column not in fields:
        named = f"column {column!r}" if isinstance(column, str) else f"column {column + 1}"
        known = ", ".join(name for name in fields if isinstance(name, str))
        raise _IncompleteRowError(f"{where}: no {named}; it has {known or len(fields)}")
    return fields[column]


def _text(where: str, fields: Fields, column: ColumnKey, table: FileColumns) -> str:
    text = _field(where, fields, column)
    # a prediction is due for every row that a submission asks for, even for one without text
    is_submission = table.label is None and table.index is not None
    if not text.strip() and not is_submission:
        raise _IncompleteRowError(f"{where}: the text in column {column!r} is empty")
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


def read_hub(hub: HubData, split: str, labels: Sequence[str]) -> TextExamples:
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
    indices = data["idx"] if "idx" in data.column_names else range(len(texts[0]))
    return TextExamples(
        texts=texts,
        labels=None if secret else found.astype(np.int64 if labels else np.float64),
        indices=list(map(str, indices)),
        columns=hub.texts,
        origin=origin,
    )


def load_task(task: TextTask, data_dir: Path) -> TaskExamples:
    """Read a task from local files, or from the hub where there are none.

    Args:
        task: one of `TASKS` with a training set.
        data_dir: holds its folder.

    Raises:
        DataError: there are no data, or they are not what the task needs.
    """
    splits, differences = _read(task, data_dir)
    absent = [name for name in task.evaluation if name not in splits]
    if len(absent) < len(task.evaluation):
        differences += [f"there is no {name}" for name in absent]
    else:
        differences.append("the development set is cut from the training set")
        splits["train"], splits[absent[0]] = cut(splits["train"])
    is_local = _find(task, data_dir) is not None
    for other in _scored_besides(task):
        if not is_local or _find(other, data_dir):
            splits |= _read_besides(other, data_dir)
    return _task_examples(task, splits, differences)


def load_own(name: str, own: OwnFiles) -> TaskExamples:
    """Read a user's own task.

    Args:
        name: for its folder and tables.
        own: its files.

    Raises:
        DataError: they are not what the columns say.
    """
    table = FileColumns(file=own.train.name, texts=own.texts, label=own.label)
    labels = () if own.is_regression else label_names(own.train, table)
    metrics = ("pearson", "spearman") if own.is_regression else ("accuracy",)
    if len(labels) == 2:
        metrics = ("accuracy", "f1")
    task = TextTask(
        name=name,
        title=name,
        labels=labels,
        metrics=metrics,
        headline=("spearman",) if own.is_regression else ("accuracy",),
        submissions={name: "test"},
        writes_label_names=True,
    )
    splits = {"train": read_table(own.train, table, labels)}
    if own.dev:
        splits["dev"] = read_table(own.dev, table, labels)
    else:
        splits["train"], splits["dev"] = cut(splits["train"])
    if own.test:
        splits["test"] = read_table(own.test, replace(table, label=None), labels)
    return _task_examples(task, splits, [])


def cut(examples: TextExamples) -> tuple[TextExamples, TextExamples]:
    """Cut a tenth off, with all labels in proportion, the same for every run.

    Examples are drawn at equal distances from a random order sorted by label (systematic
    sampling), so each class, or range of numbers, has its share to within an example.

    Returns:
        The rest, and the tenth, in the order of the file.

    Raises:
        DataError: there are fewer than two examples.
    """
    count = len(examples)
    if count < 2:
        raise DataError(f"{examples.origin}: one row cannot be cut into a training and a dev set")
    assert examples.labels is not None
    size = max(1, round(_CUT_SHARE * count))
    order = np.random.default_rng(_CUT_SEED).permutation(count)
    order = order[np.argsort(examples.labels[order], kind="stable")]
    chosen = np.sort(order[(2 * np.arange(size) + 1) * count // (2 * size)])
    return examples.take(np.setdiff1d(order, chosen)), examples.take(chosen)


def _find(task: TextTask, data_dir: Path) -> tuple[Path, TaskFiles] | None:
    """The folder and layout that are there."""
    for name in task.all_folders:
        for files in task.files:
            needed = files.splits.get("train") or next(iter(files.splits.values()))
            if _path(data_dir / name, needed):
                return data_dir / name, files
    return None


def _path(folder: Path, table: FileColumns) -> Path | None:
    """The file of a table; the first by name where several fit."""
    return min(folder.glob(table.file), default=None)


def _read(task: TextTask, data_dir: Path) -> tuple[dict[str, TextExamples], list[str]]:
    """The splits that there are, and why they are not the published ones."""
    found = _find(task, data_dir)
    if found is None:
        splits, difference, rows = _read_all_of_hub(task, data_dir)
    else:
        folder, files = found
        paths = {split: _path(folder, table) for split, table in files.splits.items()}
        splits = {
            split: read_table(path, files.splits[split], task.labels)
            for split, path in paths.items()
            if path is not None
        }
        difference, rows = files.difference, files.rows
    differences = []
    if difference is not None:
        logger.warning("%s: %s", splits["train"].origin, difference)
        differences.append(difference)
    expected = task.rows if rows is None and difference is None else rows or {}
    for split, examples in splits.items():
        if len(examples) != expected.get(split, len(examples)):
            short = f"{split} has {len(examples):,} of {expected[split]:,} rows"
            differences.append(short)
            logger.warning(
                "%s: %s: figures do not compare with published ones", examples.origin, short
            )
    return splits, differences


def _read_all_of_hub(
    task: TextTask, data_dir: Path
) -> tuple[dict[str, TextExamples], str | None, None]:
    """All splits from the hub.

    Raises:
        DataError: they cannot be had; names the files that would do instead.
    """
    names = [table.file for files in task.files for table in list(files.splits.values())[:1]]
    looked = f"{' or '.join(names)} in {' or '.join(str(data_dir / f) for f in task.all_folders)}"
    if task.hub is None:
        raise DataError(f"--task {task.name} has no data: expected {looked} (see --data-dir)")
    try:
        splits = {split: read_hub(task.hub, split, task.labels) for split in task.hub.splits}
    except DataError as error:
        raise DataError(
            f"--task {task.name} has no data: no {looked} (see --data-dir), and {error}"
        ) from error
    return splits, task.hub.difference, None


def _read_besides(task: TextTask, data_dir: Path) -> dict[str, TextExamples]:
    """Splits of a task that another's model is scored on, tests by the name of their submission."""
    try:
        splits, _ = _read(task, data_dir)
    except DataError as error:
        if _find(task, data_dir):
            raise
        logger.warning("%s is left out: %s", task.title, error)
        return {}
    submitted = {split: name for name, split in task.submissions.items()}
    return {submitted.get(split, split): examples for split, examples in splits.items()}


def _scored_besides(task: TextTask) -> list[TextTask]:
    """Tasks that the model of this one is scored on."""
    return [other for other in TASKS.values() if other.trained_on == task.name]


def _task_examples(
    task: TextTask, splits: Mapping[str, TextExamples], differences: list[str]
) -> TaskExamples:
    others = _scored_besides(task)
    evaluation = (*task.evaluation, *(name for other in others for name in other.evaluation))
    # a split of another task already bears the name of its submission
    submissions = dict(task.submissions)
    submissions |= {name: name for other in others for name in other.submissions}
    return TaskExamples(
        task=task,
        train=splits["train"],
        evaluation={name: splits[name] for name in evaluation if name in splits},
        submissions={name: splits[s] for name, s in submissions.items() if s in splits},
        differences=tuple(differences),
    )


def class_counts(task: TextTask, examples: TextExamples) -> str:
    """How many examples there are of each class, or the range of a regression's labels."""
    labels = examples.labels
    assert labels is not None
    if task.is_regression:
        return f"labels from {labels.min():g} to {labels.max():g}"
    counts = np.bincount(labels, minlength=len(task.labels))
    return ", ".join(f"{n:,} of {name}" for name, n in zip(task.labels, counts, strict=True))


def write_submission(
    path: Path, task: TextTask, examples: TextExamples, predictions: np.ndarray
) -> None:
    """Write predictions in the format of GLUE's test server: a header, and a line for each row.

    Args:
        path: of the file.
        task: decides whether names of labels or numbers of classes are written, and the range
            that numbers are cut to.
        examples: N.
        predictions: `[N]`, int64 classes or float64 numbers.
    """
    lines = ["index\tprediction"]
    for index, prediction in zip(examples.indices, predictions.tolist(), strict=True):
        lines.append(f"{index}\t{_written(task, prediction)}")
    write_text(path, "\n".join(lines) + "\n")


def _written(task: TextTask, prediction: float) -> str:
    if task.is_regression:
        lowest, highest = task.bounds or (prediction, prediction)
        return f"{min(max(prediction, lowest), highest):.3f}"
    return task.labels[int(prediction)] if task.writes_label_names else str(int(prediction))
