"""The results of runs, read from their folders and put together over seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from glue.metrics import mean_of
from glue.tasks import NINE_COLUMNS, TASKS
from ponet import ConfigError, PoolerConfig
from ponet.mixers import MIXERS
from ponet.poolers import POOLERS
from ponet.run.report import RESULT, ResultError, read_object, read_runs, take_fields


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a row of a report is about: runs of it differ in task, point of the grid and seed."""

    checkpoint: str
    """Name of the pre-trained model."""
    mixer: str
    """Token mixer of its encoder."""
    from_scratch: bool
    """The encoder was randomly initialised."""
    segments: str | None
    """What is pooled by segment, where it is not what was published."""
    pooler: PoolerConfig
    """What the classifier reads."""

    @property
    def encoder(self) -> "Model":
        """The same for all poolers."""
        return replace(self, pooler=PoolerConfig())

    @property
    def pooler_title(self) -> str:
        """The pooler in print: its name, and settings that are not the published ones."""
        usual = PoolerConfig(name=self.pooler.name)
        changed = [
            f"{field.name} {getattr(self.pooler, field.name)}"
            for field in fields(PoolerConfig)
            if getattr(self.pooler, field.name) != getattr(usual, field.name)
        ]
        return ", ".join([self.pooler.name, *changed]).replace("reading literal", "literal")

    @property
    def encoder_title(self) -> str:
        """The encoder in print."""
        named = self.mixer in self.checkpoint
        title = self.checkpoint if named else f"{self.checkpoint} ({self.mixer})"
        title += ", from scratch" if self.from_scratch else ""
        return title + (f", segments {self.segments}" if self.segments else "")

    @property
    def title(self) -> str:
        """All of it in print."""
        return f"{self.encoder_title}, {self.pooler_title}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of a task."""

    title: str
    """In print."""
    task: str
    """Whose runs have it."""
    names: tuple[str, ...] | None
    """Metrics whose mean it is; None: the score of the run."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a report takes from one `result.json`."""

    task: str
    """Name."""
    checkpoint: str
    """Name of the pre-trained model."""
    mixer: str
    """Token mixer."""
    pooler_settings: dict[str, Any]
    """Fields of `PoolerConfig`."""
    from_scratch: bool
    """The encoder was randomly initialised."""
    segments: str
    """What is pooled by segment."""
    seed: int
    """Of the run."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Peak."""
    epochs: int
    """Passes over the training set."""
    max_length: int
    """Tokens of an example."""
    precision: str
    """Arithmetic."""
    num_train: int
    """Examples learned from."""
    num_eval: int
    """Examples scored."""
    metrics: dict[str, float | None]
    """From 0 to 1; None: undefined."""
    majority_metrics: dict[str, float | None]
    """The same of a constant prediction."""
    score: float | None
    """Headline metric."""
    majority: float | None
    """The same of a constant prediction."""
    seconds: float
    """Time of the run."""
    steps_per_s: float
    """Speed of the training."""
    peak_memory_mib: float
    """Of the process on a CPU, allocated on a GPU."""
    device: str
    """Where it ran."""
    commit: str
    """Of the program."""
    complete: bool
    """On the published data."""
    departures: list[str]
    """Why not."""

    @property
    def model(self) -> Model:
        """The row that it belongs to."""
        published = TASKS[self.task].segments if self.task in TASKS else "texts"
        return Model(
            checkpoint=self.checkpoint,
            mixer=self.mixer,
            from_scratch=self.from_scratch,
            segments=None if self.segments == published else self.segments,
            pooler=PoolerConfig(**self.pooler_settings),
        )

    @property
    def data(self) -> tuple[Any, ...]:
        """Figures of other data do not compare; better data are greater."""
        return (self.complete, self.num_eval, self.num_train, self.max_length)

    @property
    def point(self) -> tuple[Any, ...]:
        """Runs that differ in nothing but the seed have the same."""
        return (*self.data, self.batch_size, self.learning_rate, self.epochs, self.precision)

    def value(self, column: Column) -> float | None:
        """In percent; None: undefined."""
        value = self.score if column.names is None else mean_of(self.metrics, column.names)
        return None if value is None else 100 * value

    def majority_value(self, column: Column) -> float | None:
        """Of the constant prediction."""
        names, metrics = column.names, self.majority_metrics
        value = self.majority if names is None else mean_of(metrics, names)
        return None if value is None else 100 * value

    def has(self, column: Column) -> bool:
        """Whether the run was scored on it."""
        if column.task != self.task:
            return False
        return column.names is None or all(name in self.metrics for name in column.names)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model in one column: the runs of the best point of its grid."""

    values: tuple[float | None, ...]
    """In percent, by seed; None: undefined."""
    runs: tuple[Result, ...]
    """The runs."""
    num_points: int
    """Points of the grid that the best was chosen from."""

    @property
    def mean(self) -> float | None:
        """In percent; None where the value of a seed is undefined."""
        defined = [value for value in self.values if value is not None]
        return statistics.fmean(defined) if len(defined) == len(self.values) else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds in percentage points; None for one seed."""
        defined = [value for value in self.values if value is not None]
        if len(defined) < len(self.values) or len(defined) < 2:
            return None
        return statistics.stdev(defined)

    @property
    def complete(self) -> bool:
        """On the published data."""
        return self.runs[0].complete


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All runs below a folder."""

    results: tuple[Result, ...]
    """Finished runs."""
    unfinished: tuple[str, ...]
    """Folders of the others."""

    @property
    def columns(self) -> list[Column]:
        """Those that a run has: the nine of the published average, other tasks, own ones."""
        known = [
            Column(title=title, task=task, names=names)
            for title, (task, names) in NINE_COLUMNS.items()
        ]
        nine = {column.task for column in known}
        for task in TASKS.values():
            if task.name not in nine:
                owner = task.trained_on or task.name
                known.append(Column(title=task.title, task=owner, names=task.headline))
        own = sorted({result.task for result in self.results} - set(TASKS))
        known += [Column(title=name, task=name, names=None) for name in own]
        return [c for c in known if any(result.has(c) for result in self.results)]

    @property
    def models(self) -> list[Model]:
        """With pre-trained encoders before random ones, poolers in the order of `POOLERS`."""
        mixers, poolers = list(MIXERS), list(POOLERS)
        return sorted(
            {result.model for result in self.results},
            key=lambda m: (
                m.from_scratch,
                mixers.index(m.mixer),
                m.checkpoint,
                m.segments or "",
                poolers.index(m.pooler.name),
                m.pooler_title,
            ),
        )

    def runs_of(self, model: Model, task: str) -> list[Result]:
        """On the best data that there are runs on: the published, the most examples."""
        runs = [r for r in self.results if r.task == task and r.model == model]
        best = max((run.data for run in runs), default=None)
        return [run for run in runs if run.data == best]

    def cell(self, model: Model, column: Column, batch_size: int | None = None) -> Cell | None:
        """The best point of a grid by the mean score over seeds, as published.

        Points with fewer seeds than another are not in the running: the luck of one run would beat
        the mean of several.

        Args:
            model: the row.
            column: of the table.
            batch_size: to choose among points with this one alone.
        """
        points: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
        for run in self.runs_of(model, column.task):
            if batch_size in (None, run.batch_size):
                points[run.point].append(run)
        if not points:
            return None
        best = max(points.values(), key=_rank)
        runs = tuple(sorted(best, key=lambda run: run.seed))
        if not runs[0].has(column):
            return None
        values = tuple(run.value(column) for run in runs)
        return Cell(values=values, runs=runs, num_points=len(points))

    def majority(self, column: Column) -> float | None:
        """Of a constant prediction in percent, on the best data; None: undefined."""
        runs = [result for result in self.results if result.has(column)]
        return max(runs, key=lambda run: run.data).majority_value(column)

    def average(self, model: Model) -> float | None:
        """Of the nine columns in percent; None if one is undefined or was not run."""
        columns = [column for column in self.columns if column.title in NINE_COLUMNS]
        means = [cell.mean for c in columns if (cell := self.cell(model, c)) is not None]
        defined = [mean for mean in means if mean is not None]
        return statistics.fmean(defined) if len(defined) == len(NINE_COLUMNS) else None

    def ratio(self, model: Model, other: Model) -> tuple[list[str], float] | None:
        """Average of a model over that of another, in the columns of the nine that both have.

        Returns:
            The columns, and the ratio in percent; None if there is no column in common.
        """
        pairs: dict[str, tuple[float, float]] = {}
        for column in self.columns:
            ours, theirs = self.cell(model, column), self.cell(other, column)
            if column.title not in NINE_COLUMNS or ours is None or theirs is None:
                continue
            above, below = ours.mean, theirs.mean
            if above is not None and below is not None and ours.runs[0].data == theirs.runs[0].data:
                pairs[column.title] = (above, below)
        total = sum(below for _, below in pairs.values())
        # correlations can cancel out or be negative, and a ratio of such averages says nothing
        if total <= 0:
            return None
        return list(pairs), 100 * sum(above for above, _ in pairs.values()) / total


def _rank(runs: list[Result]) -> tuple[int, float]:
    """Seeds, then the mean; of equally many, a point with an undefined score comes last."""
    scores = [run.score for run in runs if run.score is not None]
    return len(runs), statistics.fmean(scores) if len(scores) == len(runs) else -math.inf


def read_summary(folder: Path) -> Summary:
    """All runs below a folder.

    Raises:
        ResultError: none is finished, a result is damaged, or two are of the same run.
    """
    results = read_runs(
        folder, _read, lambda run: (run.model, run.task, run.point, run.seed), "glue/run.py"
    )
    return Summary(results=tuple(results), unfinished=tuple(_unfinished(folder)))


def _unfinished(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("config.json")):
        run = path.parent
        # model folders have a configuration, too
        if not (run / RESULT).exists() and "settings" in read_object(path):
            yield str(run.relative_to(folder))


def _read(path: Path) -> Result:
    result = take_fields(path, read_object(path), Result)
    try:
        pooler = result.model.pooler
    except (ConfigError, TypeError) as error:
        raise ResultError(f"{path}: pooler_settings: {error}") from error
    for name, value, known in (
        ("mixer", result.mixer, MIXERS),
        ("pooler", pooler.name, POOLERS),
    ):
        if value not in known:
            raise ResultError(f"{path}: {name}: expected one of {', '.join(known)}, found {value}")
    return result
