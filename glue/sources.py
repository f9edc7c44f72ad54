"""The rows of a task: local files before the hub, counted, and cut where a part is missing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glue.readers import label_names, read_hub, read_table
from glue.rows import DataError, Rows, TaskData
from glue.tasks import TASKS, Files, Table, Task

_CUT_SHARE = 0.1
_CUT_SEED = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """A user's own task."""

    train: Path
    """Examples to learn from."""
    dev: Path | None
    """Examples to score; None: a tenth of `train` is cut off."""
    test: Path | None
    """Examples without labels to predict; None: none."""
    texts: tuple[str, ...]
    """Names of the columns of one text or two."""
    label: str
    """Name of the column of labels."""
    is_regression: bool
    """Labels are numbers."""


def load_task(task: Task, data_dir: Path) -> TaskData:
    """Read a task from local files, or from the hub where there are none.

    Args:
        task: one of `TASKS` with a training set.
        data_dir: holds its folder.

    Raises:
        DataError: there are no data, or they are not what the task needs.
    """
    splits, departures, is_local = _read(task, data_dir)
    absent = [name for name in task.evaluation if name not in splits]
    if len(absent) < len(task.evaluation):
        departures += [f"there is no {name}" for name in absent]
    else:
        departures.append("the development set is cut from the training set")
        splits["train"], splits[absent[0]] = cut(splits["train"])
    for other in _scored_besides(task):
        if not is_local or _find(other, data_dir):
            splits |= _read_besides(other, data_dir)
    return _task_data(task, splits, departures)


def load_own(name: str, own: OwnFiles) -> TaskData:
    """Read a user's own task.

    Args:
        name: for its folder and tables.
        own: its files.

    Raises:
        DataError: they are not what the columns say.
    """
    table = Table(file=own.train.name, texts=own.texts, label=own.label)
    labels = () if own.is_regression else label_names(own.train, table)
    metrics = ("pearson", "spearman") if own.is_regression else ("accuracy",)
    if len(labels) == 2:
        metrics = ("accuracy", "f1")
    task = Task(
        name=name,
        title=name,
        labels=labels,
        metrics=metrics,
        headline=("spearman",) if own.is_regression else ("accuracy",),
        files=(),
        folders=(),
        rows={},
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
    return _task_data(task, splits, [])


def cut(rows: Rows) -> tuple[Rows, Rows]:
    """Cut a tenth off, with all labels in proportion, the same for every run.

    Rows are drawn at equal distances from a random order sorted by label (systematic sampling), so
    each class, or range of numbers, has its share to within a row.

    Returns:
        The rest, and the tenth, in the order of the file.

    Raises:
        DataError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"{rows.origin}: one row cannot be cut into a training and a dev set")
    assert rows.labels is not None
    size = max(1, round(_CUT_SHARE * len(rows)))
    order = np.random.default_rng(_CUT_SEED).permutation(len(rows))
    order = order[np.argsort(rows.labels[order], kind="stable")]
    chosen = np.sort(order[(2 * np.arange(size) + 1) * len(rows) // (2 * size)])
    return rows.take(np.setdiff1d(order, chosen)), rows.take(chosen)


def _find(task: Task, data_dir: Path) -> tuple[Path, Files] | None:
    """The folder and layout that are there."""
    for name in task.folders:
        folder = data_dir / name
        for layout in task.files:
            needed = layout.tables.get("train") or next(iter(layout.tables.values()))
            if _path(folder, needed):
                return folder, layout
    return None


def _path(folder: Path, table: Table) -> Path | None:
    """The file of a table; the first by name where several fit."""
    return min(folder.glob(table.file), default=None)


def _read(task: Task, data_dir: Path) -> tuple[dict[str, Rows], list[str], bool]:
    """The splits that there are, why they are not the published ones, and if they are local."""
    found = _find(task, data_dir)
    if found is None:
        splits, layout = _read_hub(task, data_dir), task.hub
        expected = None
    else:
        folder, layout = found
        splits = _read_files(task, folder, layout)
        expected = layout.rows
    departures = []
    if layout is not None and layout.departure is not None:
        logger.warning("%s: %s", splits["train"].origin, layout.departure)
        departures.append(layout.departure)
    elif expected is None:
        expected = task.rows
    return splits, departures + _miscounted(splits, expected or {}), found is not None


def _read_files(task: Task, folder: Path, layout: Files) -> dict[str, Rows]:
    paths = {split: _path(folder, table) for split, table in layout.tables.items()}
    return {
        split: read_table(path, layout.tables[split], task.labels)
        for split, path in paths.items()
        if path is not None
    }


def _read_besides(task: Task, data_dir: Path) -> dict[str, Rows]:
    """Splits of a task that another's model is scored on, tests by the name of their submission."""
    try:
        splits, _, _ = _read(task, data_dir)
    except DataError as error:
        if _find(task, data_dir):
            raise
        logger.warning("%s is left out: %s", task.title, error)
        return {}
    submitted = {split: name for name, split in task.submissions.items()}
    return {submitted.get(split, split): rows for split, rows in splits.items()}


def _read_hub(task: Task, data_dir: Path) -> dict[str, Rows]:
    """All splits from the hub.

    Raises:
        DataError: they cannot be had; names the files that would do instead.
    """
    names = [table.file for layout in task.files for table in list(layout.tables.values())[:1]]
    looked = f"{' or '.join(names)} in {' or '.join(str(data_dir / f) for f in task.folders)}"
    if task.hub is None:
        raise DataError(f"--task {task.name} has no data: expected {looked} (see --data-dir)")
    try:
        return {split: read_hub(task.hub, split, task.labels) for split in task.hub.splits}
    except DataError as error:
        raise DataError(
            f"--task {task.name} has no data: no {looked} (see --data-dir), and {error}"
        ) from error


def _miscounted(splits: Mapping[str, Rows], expected: Mapping[str, int]) -> list[str]:
    """Say where a split has not the number of rows that it should have."""
    found = []
    for split, rows in splits.items():
        if len(rows) != expected.get(split, len(rows)):
            found.append(f"{split} has {len(rows):,} of {expected[split]:,} rows")
            logger.warning(
                "%s: %d rows, published were %d: figures do not compare with published ones",
                rows.origin,
                len(rows),
                expected[split],
            )
    return found


def _scored_besides(task: Task) -> list[Task]:
    """Tasks that the model of this one is scored on."""
    return [other for other in TASKS.values() if other.trained_on == task.name]


def _task_data(task: Task, splits: Mapping[str, Rows], departures: list[str]) -> TaskData:
    others = _scored_besides(task)
    evaluation = (*task.evaluation, *(name for other in others for name in other.evaluation))
    # a split of another task already bears the name of its submission
    submissions = dict(task.submissions)
    submissions |= {name: name for other in others for name in other.submissions}
    return TaskData(
        task=task,
        train=splits["train"],
        evaluation={name: splits[name] for name in evaluation if name in splits},
        submissions={name: splits[s] for name, s in submissions.items() if s in splits},
        departures=tuple(departures),
    )
