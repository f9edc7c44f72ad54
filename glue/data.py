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
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from glue.settings import GlueConfig
from glue.tasks import TASKS, ColumnKey, FileColumns, HubData, TaskFiles, TextTask
from ponet.files import write_text
from ponet.run.hub import import_datasets

_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".tsv", ".csv", ".jsonl", ".txt")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
_SEPARATORS = ",;\t|"
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


class _NoDataError(DataError):
    """A task without files that the hub does not have either."""


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
    tests: Mapping[str, TextExamples]
    """The same, to score at the end alone."""
    submissions: Mapping[str, TextExamples]
    """Splits without labels, by name of their submission file."""
    differences: tuple[str, ...]
    """Why figures cannot stand beside published ones; none: they can."""

    @cached_property
    def digest(self) -> str:
        """Hash of what decides figures: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for examples in (self.train, *self.evaluation.values(), *self.tests.values()):
            for text in (text for column in examples.texts for text in column):
                digest.update(text.encode() + b"\0")
            assert examples.labels is not None
            digest.update(examples.labels.tobytes())
        return digest.hexdigest()[:16]


def read_table(path: Path, table: FileColumns, labels: Sequence[str]) -> TextExamples:
    """Read the examples of a file.

    Args:
        path: ends in .tsv or .txt (unquoted, as GLUE's), .csv (quoted) or .jsonl, and perhaps .gz
            or .xz after that.
        table: which columns.
        labels: in the order of the classes; none: labels are numbers.

    Raises:
        DataError: the file cannot be read, is empty, or a row is not as the table says.
    """
    classes = {name: number for number, name in enumerate(labels)}
    texts: list[tuple[str, ...]] = []
    found: list[float] = []
    indices: list[str] = []
    skipped = 0
    for where, fields in _read_rows(path, table):
        try:
            row = tuple(_text(where, fields, column, table) for column in table.texts)
            label = None if table.label is None else _field(where, fields, table.label, table)
        except _IncompleteRowError:
            if not table.skips_incomplete:
                raise
            skipped += 1
            continue
        if label is not None:
            found.append(_label(where, label, classes))
        numbered = str(len(texts))
        index = numbered if table.index is None else _field(where, fields, table.index, table)
        indices.append(index)
        texts.append(row)
    if not texts:
        raise DataError(f"{path}: holds no examples")
    if skipped:
        logger.warning("%s: left out %d rows that lack a column or a text", path, skipped)
    dtype = np.int64 if labels else np.float64
    return TextExamples(
        texts=tuple(map(list, zip(*texts, strict=True))),
        labels=None if table.label is None else np.array(found, dtype=dtype),
        indices=indices,
        columns=table.texts,
        origin=str(path),
    )


def label_names(path: Path, table: FileColumns) -> tuple[str, ...]:
    """The labels that a file holds: by value if all are numbers, else in alphabetical order."""
    assert table.label is not None
    found = set()
    for where, fields in _read_rows(path, table):
        label = _field(where, fields, table.label, table)
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
    """Rows of a file, each with its place for messages."""
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
        if line := line.rstrip("\r\n"):
            yield f"{path}, line {number}", line.split("\t")


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    # documents are longer than the module expects of a field
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(file, strict=True)
    try:
        for fields in filter(None, reader):
            yield f"{path}, line {reader.line_num}", fields
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from error


def _name_fields(
    path: Path, rows: Iterator[tuple[str, list[str]]], table: FileColumns
) -> Iterator[tuple[str, Fields]]:
    """Name the fields of rows, by the header if columns are asked for by name."""
    names = [c for c in (*table.texts, table.label, table.index) if isinstance(c, str)]
    header: list[str] = []
    if names:
        where, header = next(rows, (str(path), []))
        for name in names:
            _field(where, dict.fromkeys(header, ""), name, table)
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
        values = {name: value for name, value in record.items() if value is not None}
        yield where, {n: x if isinstance(x, str) else json.dumps(x) for n, x in values.items()}


def _advice(column: ColumnKey, names: Sequence[str], table: FileColumns) -> str:
    """What to do about an absent column."""
    if len(names) == 1 and any(separator in names[0] for separator in _SEPARATORS):
        return " as one column: separate columns by commas in .csv, by tabs in .tsv"
    flag = "--label-column" if column == table.label else "--text-column"
    return f" (see {flag})" if table.from_flags else ""


def _field(where: str, fields: Fields, column: ColumnKey, table: FileColumns) -> str:
    if column in fields:
        return fields[column]
    names = [name for name in fields if isinstance(name, str)]
    named = f"column {column!r}" if isinstance(column, str) else f"column {column + 1}"
    has = f"it has {', '.join(names) or f'{len(fields)} columns'}"
    raise _IncompleteRowError(f"{where}: no {named}; {has}{_advice(column, names, table)}")


def _text(where: str, fields: Fields, column: ColumnKey, table: FileColumns) -> str:
    text = _field(where, fields, column, table)
    # a prediction is due for every row that a submission asks for, even for one without text
    is_submission = table.label is None and table.index is not None
    if not text.strip() and not is_submission:
        raise _IncompleteRowError(f"{where}: the text in column {column!r} is empty")
    return text


def _label(where: str, text: str, classes: dict[str, int]) -> float:
    """A class, or a number where there are no classes."""
    try:
        label = classes[text] if classes else float(text)
    except (KeyError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        expected = f"one of {', '.join(classes)}" if classes else "a number"
        raise DataError(f"{where}: expected {expected} as label, found {text[:_SHOWN]!r}")
    return label


def read_hub(hub: HubData, split: str, labels: Sequence[str]) -> TextExamples:
    """Read a split, by its name here, of a data set of the hub or its local cache."""
    origin = f"the hub's {hub.name}" + (f" ({hub.config})" if hub.config else "")
    origin += f", {hub.splits[split]}"
    try:
        data = import_datasets().load_dataset(hub.name, hub.config, split=hub.splits[split])
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


@lru_cache(maxsize=1)
def load_examples(task: str, config: GlueConfig) -> TaskExamples:
    """Read all examples of a task that a command names; kept for the runs of the task."""
    return load_own(config) if config.train_file else load_task(TASKS[task], Path(config.data_dir))


def load_task(task: TextTask, data_dir: Path) -> TaskExamples:
    """Read a task with a training set from files below a folder, or else from the hub."""
    splits, differences = _read(task, data_dir)
    absent = [name for name in task.evaluation if name not in splits]
    if len(absent) < len(task.evaluation):
        differences += [f"there is no {name}" for name in absent]
    else:
        differences.append("the development set is cut from the training set")
        splits["train"], splits[absent[0]] = cut(splits["train"])
    parts = [(task, splits)]
    is_local = _find(task, data_dir) is not None
    for other in TASKS.values():
        # the model is scored on this one as well
        if other.trained_on == task.name and (not is_local or _find(other, data_dir)):
            try:
                parts.append((other, _read(other, data_dir)[0]))
            except _NoDataError as error:
                logger.warning("%s is left out: %s", other.title, error)
    return _joined(parts, differences)


def load_own(config: GlueConfig) -> TaskExamples:
    """Read a user's own task from --train-file and its companions."""
    (name,) = config.task
    table = FileColumns(texts=config.text_column, label=config.label_column, from_flags=True)
    train = Path(config.train_file or "")
    labels = () if config.regression else label_names(train, table)
    metrics = ("pearson", "spearman") if config.regression else ("accuracy",)
    task = TextTask(
        name=name,
        title=name,
        labels=labels,
        metrics=("accuracy", "f1") if len(labels) == 2 else metrics,
        headline=metrics[-1:],
        submissions={name: "test"},
        writes_label_names=True,
    )
    splits = {"train": read_table(train, table, labels)}
    if config.dev_file:
        splits["dev"] = read_table(Path(config.dev_file), table, labels)
    else:
        splits["train"], splits["dev"] = cut(splits["train"])
    if config.test_file:
        splits["test"] = read_table(Path(config.test_file), replace(table, label=None), labels)
    return _joined([(task, splits)], [])


def cut(examples: TextExamples) -> tuple[TextExamples, TextExamples]:
    """Cut a tenth off: the rest and the tenth, in the order of the file, the same for every run.

    Examples are drawn at equal distances from a random order sorted by label (systematic
    sampling), so each class, or range of numbers, has its share to within an example.
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


def _find(task: TextTask, data_dir: Path) -> tuple[TaskFiles, dict[str, Path]] | None:
    """The layout that is there, with its files by split; the first by name where several fit."""
    for folder, files in product(task.all_folders, task.files):
        paths = {}
        for split, pattern in files.names.items():
            if fitting := sorted((data_dir / folder).glob(pattern)):
                paths[split] = fitting[0]
        if next(iter(files.names)) in paths:
            return files, paths
    return None


def _read(task: TextTask, data_dir: Path) -> tuple[dict[str, TextExamples], list[str]]:
    """The splits that there are, and why they are not the published ones."""
    found = _find(task, data_dir)
    if found is None:
        splits, difference, rows = _read_all_of_hub(task, data_dir)
    else:
        files, paths = found
        splits = {s: read_table(x, files.columns(s), task.labels) for s, x in paths.items()}
        difference, rows = files.difference, files.rows
    whole = splits["train"] if task.parts_of_train else None
    for split, (begin, end) in task.parts_of_train.items():
        assert whole is not None
        splits[split] = whole.take(range(round(begin * len(whole)), round(end * len(whole))))
    expected = task.rows if difference is None else rows
    differences = [] if difference is None else [difference]
    differences += [
        f"{split} has {len(examples):,} of {expected[split]:,} rows"
        for split, examples in splits.items()
        if len(examples) != expected.get(split, len(examples))
    ]
    origin = next(iter(splits.values())).origin
    for text in differences:
        logger.warning("%s: %s: figures do not compare with published ones", origin, text)
    return splits, differences


def _read_all_of_hub(
    task: TextTask, data_dir: Path
) -> tuple[dict[str, TextExamples], str | None, dict[str, int]]:
    """All splits from the hub, or an error that names the files that would do instead."""
    names = [next(iter(files.names.values())) for files in task.files]
    looked = f"{' or '.join(names)} in {' or '.join(str(data_dir / f) for f in task.all_folders)}"
    if task.hub is None:
        raise _NoDataError(f"--task {task.name} has no data: expected {looked} (see --data-dir)")
    try:
        splits = {split: read_hub(task.hub, split, task.labels) for split in task.hub.splits}
    except DataError as error:
        raise _NoDataError(
            f"--task {task.name} has no data: no {looked} (see --data-dir), and {error}"
        ) from error
    return splits, task.hub.difference, {}


def _joined(
    parts: list[tuple[TextTask, dict[str, TextExamples]]], differences: list[str]
) -> TaskExamples:
    """What the model of the first task learns from, and what it is asked of all of them."""
    task, splits = parts[0]
    evaluation, tests, submissions = {}, {}, {}
    for asked, found in parts:
        evaluation |= {name: found[name] for name in asked.evaluation if name in found}
        tests |= {name: found[name] for name in asked.tests if name in found}
        submissions |= {n: found[split] for n, split in asked.submissions.items() if split in found}
    return TaskExamples(
        task=task,
        train=splits["train"],
        evaluation=evaluation,
        tests=tests,
        submissions=submissions,
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
    """Write predictions `[N]`, classes or numbers, in the format of GLUE's test server."""
    if task.is_regression:
        bounded = predictions.clip(*task.bounds) if task.bounds else predictions
        answers = [f"{number:.3f}" for number in bounded]
    else:
        answers = [task.labels[n] if task.writes_label_names else str(n) for n in predictions]
    rows = zip(("index", *examples.indices), ("prediction", *answers), strict=True)
    write_text(path, "".join(f"{index}\t{answer}\n" for index, answer in rows))
