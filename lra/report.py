"""Tables of finished runs beside published figures: `python lra/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes it to `report.md` there.
Protocols, and runs with and without self-pretraining, are reported apart. A row is a model, in one
of its forms, with or without parts of its block.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lra.published_mixers import PUBLISHED_FORMS
from lra.settings import PARTS
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

PUBLISHED: list[dict[str, Any]] = read_published(Path(__file__).with_name("published.yaml"))
"""Rows of the published table, in the order of reports."""

_MODELS = list(dict.fromkeys(model for row in PUBLISHED for model in row["models"]))

_NOTES = (
    f"Test accuracy in percent: mean {PLUS_MINUS} standard deviation over (n) seeds. Published "
    "figures, *in italics*: PoNet, arXiv 2110.02442, Table 1, and the LRA repository; number of "
    "seeds not stated. Those from other code and settings than the protocol published come last. "
    "The average is over the five tasks, where all have complete runs."
)

_IDENTITY = ("protocol", "pretrain_epochs", "task", "model", "mixer", "ablation", "seed")


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
    mixer: str = ""
    """The form of the model; results of earlier versions do not say it: the paper's own."""
    ablation: list[str] = field(default_factory=list)
    """Keys of `lra.settings.PARTS`."""


def read_runs(folder: Path) -> Table:
    """All results below a folder, accuracies in percent, tasks and rows in the order of reports.

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
    # models that no table has come last, by name
    models = [*_MODELS, *sorted(set(runs["model"]) - set(_MODELS))]
    for column, names in (("task", list(TASKS)), ("model", models)):
        runs[column] = pd.Categorical(runs[column], names, ordered=True)
    runs["row"] = [row_title(run) for run in runs.to_dict("records")]
    rows = runs.sort_values(["model", "row"])["row"].unique()
    runs["row"] = pd.Categorical(runs["row"], rows, ordered=True)
    return runs.sort_values(["task", "row", "seed"])


def row_title(run: dict[str, Any]) -> str:
    """A model in print, `Transformer (attention)`, with its form and what it lacks."""
    model = run["model"]
    titles = [row["title"] for row in PUBLISHED if model in row["models"]]
    title = titles[0] if titles else model
    if title.lower() != model.lower():
        title += f" ({model})"
    if model in PUBLISHED_FORMS:
        published = run["mixer"] == PUBLISHED_FORMS[model]
        title += ", as published" if published else ", as in its paper"
    parts = [str(PARTS.get(part, part)) for part in run["ablation"]]
    return f"{title} without {' and '.join(parts)}" if parts else title


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
            rows = [list(row) for row in speeds.itertuples()]
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
    """A text for the runs of each row on each task (columns)."""
    grouped = complete.groupby(["row", "task"], observed=True)[column]
    return grouped.agg(text).unstack(fill_value="")


def _accuracy_table(group: Table, complete: Table) -> str:
    tasks = [str(task) for task in group["task"].unique()]
    majority = group.groupby("task", observed=True)["majority_rate"].last()
    means = complete.groupby(["row", "task"], observed=True)["test_accuracy"].mean()
    texts = _cells(complete, "test_accuracy", scores_text).reindex(columns=tasks, fill_value="")
    rows = [["majority baseline", *(figure_text(majority[task]) for task in tasks), ""]]
    models = dict(zip(complete["row"], complete["model"], strict=True))
    others = list(PUBLISHED)
    for model in dict.fromkeys(models[row] for row in texts.index):
        for row, *cells in texts[texts.index.map(models) == model].itertuples():
            of_row = means[row]
            has_all = set(COMPARED) <= set(of_row.index)
            average = of_row[list(COMPARED)].mean() if has_all else None
            rows.append([row, *cells, figure_text(average)])
        beside = [row for row in others if row["comparable"] and model in row["models"]]
        others = [row for row in others if row not in beside]
        rows += [_published_row(row, tasks) for row in beside]
    others.sort(key=lambda row: not row["comparable"])
    rows += [_published_row(row, tasks) for row in others]
    return markdown_table(["model", *(TITLES[task] for task in tasks), "average"], rows)


def _published_row(published: dict[str, Any], tasks: list[str]) -> list[str]:
    accuracy = published["accuracy"]
    cells = [
        "fails" if task in accuracy and accuracy[task] is None else figure_text(accuracy.get(task))
        for task in tasks
    ]
    name = f"{published['title']}, {published['source']}"
    setting = "" if published["comparable"] else ", other setting"
    learnt = [value for value in accuracy.values() if value is not None]
    share = "" if len(learnt) == len(accuracy) else f" (mean of {len(learnt)})"
    row = [name + setting, *cells, figure_text(published["average"]) + share]
    return [f"*{text}*" if text else "" for text in row]


def _reasons(run: dict[str, Any]) -> list[str]:
    """Why a run is in no mean; its row tells the ablation."""
    differences = [name for name in run["differences"] if name not in run["ablation"]]
    return [*differences, *filter(None, [run["note"]])]


def _incomplete_table(incomplete: Table) -> str:
    head = ["task", "model", "seed", "steps", "of", "accuracy", "majority baseline", "ms/step"]
    rows = [
        [
            TITLES[run["task"]],
            run["row"],
            *(str(run[name]) for name in ("seed", "steps", "published_steps")),
            *(figure_text(run[name]) for name in ("test_accuracy", "majority_rate")),
            f"{run['step_ms']:.4g}",
            ", ".join(_reasons(run)) or "data",
        ]
        for run in incomplete.to_dict("records")
    ]
    return markdown_table([*head, "not as published"], rows)


if __name__ == "__main__":
    report_program("lra/report.py", "tables of Long Range Arena runs", "runs/lra", report)
