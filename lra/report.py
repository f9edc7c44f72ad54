"""Tables of finished runs beside published figures: `python lra/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes it to `report.md` there.
Protocols, and runs with and without self-pretraining, are reported apart.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lra.tasks import COMPARED, TASKS
from ponet.run.report import (
    PLUS_MINUS,
    ResultError,
    figure_text,
    markdown_table,
    read_published,
    read_results,
    report_program,
    scores_text,
    write_report,
)

Table = Any
"""A `pandas.DataFrame`: its type stubs take nearly every access for an error."""

TITLES = {name: name.title() for name in TASKS} | {"listops": "ListOps", "pathx": "Path-X"}
"""Tasks in print."""

_PUBLISHED = read_published(Path(__file__).with_name("published.yaml"))
PUBLISHED: dict[str, dict[str, Any]] = {mixer: row for row in _PUBLISHED for mixer in row["mixers"]}
"""Rows of the published table by token mixer, in the order of reports."""

_NOTES = (
    f"Test accuracy in percent: mean {PLUS_MINUS} standard deviation over (n) seeds. "
    "Published figures: PoNet, arXiv 2110.02442, Table 1, number of seeds not stated. The average "
    "is over the five tasks, where all have complete runs."
)

_IDENTITY = ("protocol", "pretrain_epochs", "task", "model", "seed")


@dataclass
class DataOfResult:
    """What a report takes from the data of a result."""

    digest: str
    source: str = ""
    generator: int = 1


@dataclass
class ArenaResult:
    """What a report takes from a `result.json`."""

    task: str
    model: str
    protocol: str
    pretrain_epochs: float
    seed: int
    complete: bool
    differences: list[str]
    steps: int
    published_steps: int
    test_accuracy: float
    """From 0 to 1."""
    majority_rate: float
    """Accuracy of always answering the most frequent label, 0 to 1."""
    step_ms: float
    device: str
    commit: str
    data: DataOfResult


def read_runs(folder: Path) -> Table:
    """All results below a folder, accuracies in percent, tasks and models in the order of reports.

    Complete runs of a task on different data are refused.
    """
    runs: Table = read_results(folder, ArenaResult, _IDENTITY, "lra/run.py")
    for path, task in zip(runs["path"], runs["task"], strict=True):
        if task not in TASKS:
            raise ResultError(f"{path}: task: expected one of {', '.join(TASKS)}, found {task!r}")
    pretrained = runs["pretrain_epochs"] > 0
    runs["group"] = runs["protocol"] + pretrained.map({True: ", self-pretrained", False: ""})
    runs["digest"] = runs["data"].map(lambda data: data.digest)
    notes = zip(runs["task"], runs["data"], strict=True)
    runs["note"] = [TASKS[task].note(data.source, data.generator) for task, data in notes]
    runs["complete"] &= runs["note"] == ""
    runs[["test_accuracy", "majority_rate"]] *= 100
    for (group, task), cell in runs[runs["complete"]].groupby(["group", "task"]):
        digests = sorted(set(cell["digest"]))
        if len(digests) > 1:
            raise ResultError(
                f"{task}: complete runs of the protocol {group} are on different data "
                f"({', '.join(digests)}), expected one; report on them in separate folders"
            )
    for column, known in (("task", TASKS), ("model", PUBLISHED)):
        # models that no table has come last, by name
        names = [*known, *sorted(set(runs[column]) - set(known))]
        runs[column] = pd.Categorical(runs[column], names, ordered=True)
    return runs.sort_values(["task", "model", "seed"])


def model_title(model: str) -> str:
    """A model in print: the mixer `attention` is `Transformer (attention)`."""
    title = PUBLISHED[model]["title"] if model in PUBLISHED else model
    return title if title.lower() == model.lower() else f"{title} ({model})"


def report(folder: Path) -> str:
    """Write `report.md` on the runs below a folder into it; returns the Markdown."""
    runs, parts = read_runs(folder), ["# Long Range Arena", _NOTES]
    for name in sorted(set(runs["group"]), key=lambda name: (name != "published", name)):
        group = runs[runs["group"] == name]
        complete, incomplete = group[group["complete"]], group[~group["complete"]]
        parts.append(f"## Protocol: {name}")
        if len(complete):
            speeds = _cells(complete, "step_ms", lambda ms: f"{ms.median():.4g}")
            head = ["model", *map(TITLES.get, speeds.columns)]
            rows = [[model_title(model), *row] for model, *row in speeds.itertuples()]
            parts += [_accuracy_table(group, complete), "Milliseconds per training step:"]
            parts.append(markdown_table(head, rows))
        else:
            parts.append("No complete runs.")
        if len(incomplete):
            parts += ["### Incomplete runs, in no mean", _incomplete_table(incomplete)]
        devices, commits = (sorted(set(group[column])) for column in ("device", "commit"))
        parts.append(f"Device: {'; '.join(devices)}. Commit: {', '.join(commits)}.")
    text = "\n\n".join(parts) + "\n"
    write_report(folder, text)
    return text


def _cells(complete: Table, column: str, text: Any) -> Table:
    """A text for the runs of each model (rows) on each task (columns)."""
    grouped = complete.groupby(["model", "task"], observed=True)[column]
    return grouped.agg(text).unstack(fill_value="")


def _accuracy_table(group: Table, complete: Table) -> str:
    tasks = [str(task) for task in group["task"].unique()]
    majority = group.groupby("task", observed=True)["majority_rate"].last()
    means = complete.groupby(["model", "task"], observed=True)["test_accuracy"].mean()
    texts = _cells(complete, "test_accuracy", scores_text).reindex(columns=tasks, fill_value="")
    rows = [["majority baseline", *(figure_text(majority[task]) for task in tasks), ""]]
    for model, *row in texts.itertuples():
        of_model = means[model]
        has_all = set(COMPARED) <= set(of_model.index)
        average = of_model[list(COMPARED)].mean() if has_all else None
        rows.append([model_title(model), *row, figure_text(average)])
        if model in PUBLISHED:
            rows.append(_published_row(PUBLISHED[model], tasks))
    return markdown_table(["model", *(TITLES[task] for task in tasks), "average"], rows)


def _published_row(published: dict[str, Any], tasks: list[str]) -> list[str]:
    accuracy = published["accuracy"]
    cells = [
        "fails" if task in accuracy and accuracy[task] is None else figure_text(accuracy.get(task))
        for task in tasks
    ]
    row = [f"{published['title']}, {published['source']}", *cells]
    row.append(figure_text(published["average"]))
    return [f"*{text}*" if text else "" for text in row]


def _incomplete_table(incomplete: Table) -> str:
    head = ["task", "model", "seed", "steps", "of", "accuracy", "majority baseline", "ms/step"]
    rows = [
        [
            TITLES[run["task"]],
            model_title(run["model"]),
            *(str(run[name]) for name in ("seed", "steps", "published_steps")),
            *(figure_text(run[name]) for name in ("test_accuracy", "majority_rate")),
            f"{run['step_ms']:.4g}",
            ", ".join([*run["differences"], *filter(None, [run["note"]])]) or "data",
        ]
        for run in incomplete.to_dict("records")
    ]
    return markdown_table([*head, "not as published"], rows)


if __name__ == "__main__":
    report_program("lra/report.py", "tables of Long Range Arena runs", "runs/lra", report)
