"""The results of runs, read from their folders and put together over seeds."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from lra.published import PUBLISHED
from lra.tasks import COMPARED, TASKS
from ponet.run.report import ResultError, read_object, read_runs, take_fields


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a report takes from one `result.json`."""

    task: str
    """Key of `TASKS`."""
    model: str
    """Token mixer."""
    protocol: str
    """Protocol of training and evaluation."""
    pretrain_epochs: float
    """Epochs of self-pretraining."""
    seed: int
    """Seed of the run."""
    complete: bool
    """Whether it is the whole published run on the whole data."""
    departures: list[str]
    """Names of the settings that are not the published ones."""
    steps: int
    """Training steps done."""
    published_steps: int
    """Training steps of the published run."""
    test_accuracy: float
    """From 0 to 1."""
    majority_rate: float
    """Share of the commonest class in the test set, 0 to 1."""
    num_parameters: int
    """Of the model."""
    steps_per_s: float
    """Training speed."""
    device: str
    """Where it ran."""
    commit: str
    """Of the program."""
    data_digest: str
    """Checksum of the prepared data."""

    @property
    def group(self) -> str:
        """Runs of different groups are never put together."""
        return f"{self.protocol}, self-pretrained" if self.pretrain_epochs else self.protocol


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one task, over its complete runs."""

    accuracies: tuple[float, ...]
    """Test accuracies in percent, by seed."""
    steps_per_s: float
    """Median training speed."""

    @property
    def mean(self) -> float:
        """In percent."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds in percentage points; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """All runs under one protocol."""

    name: str
    """The protocol, and whether models were pre-trained."""
    tasks: tuple[str, ...]
    """Tasks with a run, in the order of `TASKS`."""
    models: tuple[str, ...]
    """Models with a complete run."""
    cells: dict[tuple[str, str], Cell]
    """By model and task."""
    majority: dict[str, float]
    """Accuracy of the commonest class in percent, by task."""
    incomplete: tuple[Result, ...]
    """Runs that are not the published ones, which nothing is averaged over."""
    devices: tuple[str, ...]
    """Where the runs were."""
    commits: tuple[str, ...]
    """Of the program."""

    def average(self, model: str) -> float | None:
        """Mean accuracy over the five tasks in percent; None unless all have complete runs."""
        found = [self.cells[model, task].mean for task in COMPARED if (model, task) in self.cells]
        return statistics.fmean(found) if len(found) == len(COMPARED) else None


def read_results(folder: Path) -> list[Result]:
    """All results below a folder.

    Raises:
        ResultError: there is none, one is damaged, or two are of the same run.
    """
    return read_runs(
        folder, _read, lambda run: (run.group, run.task, run.model, run.seed), "lra/run.py"
    )


def _read(path: Path) -> Result:
    content = read_object(path)
    if not isinstance(content.get("data"), dict):
        raise ResultError(f"{path}: expected an object with the field 'data'")
    result = take_fields(path, content | {"data_digest": content["data"].get("digest")}, Result)
    if result.task not in TASKS:
        raise ResultError(
            f"{path}: task: expected one of {', '.join(TASKS)}, found {result.task!r}"
        )
    return result


def make_groups(results: list[Result]) -> list[Group]:
    """Put runs together.

    Raises:
        ResultError: complete runs of a task in one group are on different data.
    """
    names = sorted(
        {result.group for result in results}, key=lambda name: (name != "published", name)
    )
    return [_group(name, [r for r in results if r.group == name]) for name in names]


def _group(name: str, results: list[Result]) -> Group:
    complete = [result for result in results if result.complete]
    tasks = tuple(task for task in TASKS if any(r.task == task for r in results))
    for task in tasks:
        digests = sorted({result.data_digest for result in complete if result.task == task})
        if len(digests) > 1:
            raise ResultError(
                f"{task}: complete runs of the protocol {name} are on different data "
                f"({', '.join(digests)}), expected one; report on them in separate folders"
            )
    found = {result.model for result in complete}
    rank = {model: number for number, model in enumerate(PUBLISHED)}
    models = tuple(sorted(found, key=lambda model: (rank.get(model, len(rank)), model)))
    cells = {}
    for model in models:
        for task in tasks:
            runs = [r for r in complete if (r.model, r.task) == (model, task)]
            if runs:
                cells[model, task] = _cell(runs)
    return Group(
        name=name,
        tasks=tasks,
        models=models,
        cells=cells,
        majority={r.task: 100 * r.majority_rate for r in [*results, *complete]},
        incomplete=tuple(
            sorted(
                (result for result in results if not result.complete),
                key=lambda r: (tasks.index(r.task), rank.get(r.model, len(rank)), r.model, r.seed),
            )
        ),
        devices=tuple(sorted({result.device for result in results})),
        commits=tuple(sorted({result.commit for result in results})),
    )


def _cell(runs: list[Result]) -> Cell:
    runs = sorted(runs, key=lambda run: run.seed)
    return Cell(
        accuracies=tuple(100 * run.test_accuracy for run in runs),
        steps_per_s=statistics.median(run.steps_per_s for run in runs),
    )
