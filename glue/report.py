"""Tables and a figure of finished runs: `python glue/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes `report.md` and `report.png`
into it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import FiniteFloat

from glue.metrics import mean_of
from glue.settings import FineTuningSettings, pooler_label
from glue.tasks import NINE_COLUMNS, TASKS
from ponet.poolers import POOLERS
from ponet.run.report import (
    PLUS_MINUS,
    figure_text,
    markdown_table,
    read_published,
    read_results,
    report_program,
    scores_text,
    write_report,
)
from ponet.run.runs import RESULT

_DAGGER = "\N{DAGGER}"
_NOTES = (
    f"In percent: mean {PLUS_MINUS} standard deviation over (n) seeds, at the point of the grid "
    "(batch size, learning rate, epochs) with the best mean, among those with the most seeds, "
    "chosen on the development set that is reported, as published. QQP, MRPC: mean of accuracy "
    "and F1; CoLA: Matthews correlation; STS-B: Spearman correlation; HND, IMDb: F1 of class 1; "
    "others: accuracy. The average is over the nine columns MNLI-m to RTE. The majority baseline "
    "says the same of all examples. Rows in italics are published figures, for BERT with the "
    f"pooler named or for the model named. {_DAGGER}: on other data than the published, see below; "
    "not to be compared with them."
)
_BATCH_SIZE_NOTE = (
    "Each at the best learning rate. Published for BERT: MaxPoolBERT at batch size 32, mean of "
    "three seeds; CS475, one run each; both, in this order, where there are two figures."
)
_MAXPOOL_BATCH_SIZE = 32
# figures on other data do not compare; better data are greater
_DATA = ["complete", "num_eval", "num_train", "max_length"]
_POINT = "batch_size learning_rate epochs warmup_fraction weight_decay dropout precision".split()
# a run's name holds its settings
_IDENTITY = ["name", "checkpoint", "mixer", "from_scratch", "num_train", "num_eval"]
# Okabe and Ito's palette, told apart by colour-blind readers too; the marks differ as well
_STYLES = (("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "^"), ("#E69F00", "v"))
_PUBLISHED_STYLE: dict[str, Any] = {"color": "#D55E00", "marker": "D", "linestyle": "none"}

logger = logging.getLogger(__name__)

_Table = Any
"""A pandas table, whose types checkers cannot follow."""

PUBLISHED: list[dict[str, Any]] = read_published(Path(__file__).with_name("published.yaml"))
"""Figures of one model each, in percent by title of a column, in the order of reports."""
for _row in PUBLISHED:
    # two figures are accuracy and F1
    _row["figures"] = {title: float(np.mean(x)) for title, x in _row["figures"].items()}


@dataclass(frozen=True, kw_only=True)
class FineTuningResult(FineTuningSettings):
    """What a report takes from one `result.json`."""

    checkpoint: str
    mixer: str
    num_train: int
    num_eval: int
    metrics: dict[str, FiniteFloat | None]
    """From 0 to 1; None: undefined."""
    majority_metrics: dict[str, FiniteFloat | None]
    score: FiniteFloat | None
    majority: FiniteFloat | None
    differences: list[str]
    """Why the data are not the published ones."""
    device: str
    commit: str


def _encoder_title(run: Any) -> str:
    title = f"{run.checkpoint} ({run.mixer})" + (", from scratch" if run.from_scratch else "")
    published = TASKS[run.task].segments if run.task in TASKS else "texts"
    return title + ("" if run.segments == published else f", segments {run.segments}")


def read_scores(folder: Path) -> _Table:
    """The scores of all finished runs below a folder, in the order of a report's rows.

    There is one row per run and column that it was scored on: the fields of `FineTuningResult`;
    model, encoder and pooler in print; `complete`, whether the data are the published ones; the
    title of the column with `value` and `majority` in percent, not a number where undefined.
    """
    runs: _Table = read_results(folder, FineTuningResult, _IDENTITY, "glue/run.py")
    poolers = {name: number for number, name in enumerate(POOLERS)}
    rows = []
    for run in runs.itertuples(index=False):
        encoder, pooler = _encoder_title(run), pooler_label(run.pooler)
        number = poolers.get(run.pooler.name, len(poolers))
        shared = run._asdict() | {
            "model": f"{encoder}, {pooler}",
            "encoder": encoder,
            "pooler": pooler,
            "complete": not run.differences,
            "order": (run.from_scratch, encoder, number, pooler, run.seed),
        }
        for title, value, majority in _columns_of(run):
            rows.append(shared | {"column": title, "value": value, "majority": majority})
    scores = pd.DataFrame(rows).sort_values("order", kind="stable")
    percentages = ["value", "majority"]
    scores[percentages] = 100 * scores[percentages].astype(float)
    return scores


def _columns_of(run: Any) -> list[tuple[str, float | None, float | None]]:
    """Titles of the columns that a run was scored on, with its scores and the majority's."""
    if run.task not in TASKS:
        return [(run.task, run.score, run.majority)]
    columns = {t: names for t, (task, names) in NINE_COLUMNS.items() if task == run.task}
    for task in TASKS.values():
        if task.trained_on == run.task or (task.name == run.task and not columns):
            columns[task.title] = task.headline
    return [
        (title, mean_of(run.metrics, names), mean_of(run.majority_metrics, names))
        for title, names in columns.items()
        if run.metrics.keys() >= set(names)
    ]


def _titles(scores: _Table) -> list[str]:
    """Columns with a score: the nine of the published average, other tasks, own ones."""
    known = dict.fromkeys([*NINE_COLUMNS, *(task.title for task in TASKS.values())])
    found = set(scores["column"])
    return [title for title in [*known, *sorted(found - known.keys())] if title in found]


def _on_best_data(scores: _Table, of: list[str]) -> _Table:
    """The first score of each of some things on the best data there are runs on."""
    return scores.sort_values(_DATA, ascending=False, kind="stable").drop_duplicates(of)


def best_points(scores: _Table, *further: str) -> _Table:
    """The scores at the best point of each model's grid per task, by the mean over seeds.

    Only runs on the best data count: the published, the most examples. Points with fewer seeds than
    another are not in the running: the luck of one run would beat the mean of several. Each value
    of `further` fields has a best point of its own.
    """
    data = _on_best_data(scores, ["model", "task"])
    scores = scores.merge(data[["model", "task", *_DATA]])
    headline = scores.assign(score=pd.to_numeric(scores["score"])).drop_duplicates("path")
    points = headline.groupby(["model", "task", *_POINT], sort=False)["score"].agg(
        seeds="size", mean=lambda x: x.mean(skipna=False)
    )
    # a point with an undefined score comes last among those of as many seeds
    points = points.reset_index().sort_values(["seeds", "mean"], ascending=False, kind="stable")
    best = points.drop_duplicates(["model", "task", *further])
    return scores.merge(best[["model", "task", *_POINT]])


def _cells(scores: _Table, *by: str) -> dict[Any, str]:
    """Text of the scores of each group of runs."""
    return {key: _cell_text(runs) for key, runs in scores.groupby(list(by), sort=False)}


def _cell_text(runs: _Table) -> str:
    missing = int(runs["value"].isna().sum())
    undefined = f"undefined in {missing} of {len(runs)}"
    text = undefined if missing else scores_text(list(runs["value"]))
    return text + ("" if runs["complete"].all() else _DAGGER)


def _means(scores: _Table) -> dict[str, float | None]:
    """Mean by column of one model; None where the score of a seed is undefined."""
    means = scores.groupby("column", sort=False)["value"].agg(lambda x: x.mean(skipna=False))
    return {title: None if pd.isna(mean) else mean for title, mean in means.items()}


def _average(means: dict[str, float | None]) -> float | None:
    """Of the nine columns; None if one is undefined or missing."""
    nine = [mean for title in NINE_COLUMNS if (mean := means.get(title)) is not None]
    return float(np.mean(nine)) if len(nine) == len(NINE_COLUMNS) else None


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Scores of the runs that a checkpoint has had, this command's and earlier ones; logged, too.

    Returns:
        For each model the columns in percent, at the best point of each grid, and the average of
        the nine published ones, None while one is undefined or missing.
    """
    summary = []
    for model, scores in best_points(read_scores(folder)).groupby("model", sort=False):
        means = _means(scores)
        average = _average(means)
        for title, seeds in scores.groupby("column", sort=False):
            mean, first = _percent_text(means[title]), seeds.iloc[0]
            point = f"batch size {first.batch_size}, learning rate {first.learning_rate:g}"
            logger.info("%s | %s: %s (seeds: %d, %s)", model, title, mean, len(seeds), point)
        if means.keys() >= NINE_COLUMNS.keys():
            logger.info("%s | average of the nine columns: %s", model, _percent_text(average))
        summary.append({"model": model, "columns": means, "average": average})
    return summary


def _percent_text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f} %"


def _published_beside(scores: _Table) -> list[dict[str, Any]]:
    """The published rows that measured ones stand beside: same pooler, or same mixer."""
    # BERT is what poolers were studied on; whatever the encoder here, its figures are the only ones
    mixers = {*scores["mixer"], "attention"}
    poolers = set(scores["pooler"])
    return [row for row in PUBLISHED if row["pooler"] in poolers and row["mixer"] in mixers]


def _italic(texts: list[str]) -> list[str]:
    return [f"*{text}*" if text else "" for text in texts]


def _main_table(scores: _Table) -> str:
    titles, best = _titles(scores), best_points(scores)
    cells = _cells(best, "model", "column")
    majority = _on_best_data(scores, ["column"]).set_index("column")["majority"]
    constant = ["undefined" if pd.isna(majority[t]) else figure_text(majority[t]) for t in titles]
    rows = [["majority baseline", *constant, ""]]
    for model, of_model in best.groupby("model", sort=False):
        average = figure_text(_average(_means(of_model)))
        nine = of_model[of_model["column"].isin(list(NINE_COLUMNS))]
        mark = _DAGGER if average and not nine["complete"].all() else ""
        rows.append([model, *(cells.get((model, t), "") for t in titles), average + mark])
    for row in _published_beside(scores):
        spreads = {t: f" {PLUS_MINUS} {x:.2f}" for t, x in row.get("spreads", {}).items()}
        texts = [figure_text(row["figures"].get(t)) + spreads.get(t, "") for t in titles]
        # a study of batch sizes has a table of its own
        if "batch_size" not in row and any(texts):
            rows.append(_italic([row["name"], *texts, figure_text(row.get("average"))]))
    return markdown_table(["model", *titles, "average"], rows)


def _batch_size_tables(scores: _Table) -> str:
    """A table for each encoder that several poolers or batch sizes were tried on."""
    titles, tables = _titles(scores), []
    for encoder, best in best_points(scores, "batch_size").groupby("encoder", sort=False):
        poolers = list(dict.fromkeys(best["pooler"]))
        if len(poolers) == 1 and best["batch_size"].nunique() == 1:
            continue
        cells = _cells(best, "column", "batch_size", "pooler")
        rows = []
        for title in titles:
            for size in sorted(set(best["batch_size"][best["column"] == title])):
                rows.append([title, str(size), *(cells.get((title, size, p), "") for p in poolers)])
                published = [_published_at(title, size, pooler) for pooler in poolers]
                if any(published):
                    rows.append(_italic([f"{title}, BERT", str(size), *published]))
        tables += [f"{encoder}:", markdown_table(["task", "batch size", *poolers], rows)]
    return "\n\n".join([_BATCH_SIZE_NOTE, *tables]) if tables else ""


def _published_at(title: str, batch_size: int, pooler: str) -> str:
    """Published figures of a pooler for BERT at a batch size."""
    return " / ".join(
        figure_text(row["figures"][title])
        for row in PUBLISHED
        if (row["mixer"], row["pooler"]) == ("attention", pooler)
        and title in row["figures"]
        and batch_size == row.get("batch_size", _MAXPOOL_BATCH_SIZE)
    )


def draw(scores: _Table) -> Figure:
    """A panel per column: models by batch size, hollow on other data, and published rows."""
    titles, best = _titles(scores), best_points(scores, "batch_size")
    published = [row for row in _published_beside(scores) if row["figures"].keys() & set(titles)]
    names = list(dict.fromkeys([*best["model"], *(row["name"] for row in published)]))
    sizes = sorted(set(best["batch_size"]))
    across = min(len(titles), 4)
    down = -(-len(titles) // across)
    figure = Figure((3.4 + 2.5 * across, down * (1.2 + 0.3 * len(names)) + 0.8))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, title in zip(panels.flat, titles, strict=False):
        of_column = best[best["column"] == title]
        for (model, size), seeds in of_column.groupby(["model", "batch_size"], sort=False):
            number = sizes.index(size)
            colour, marker = _STYLES[number % len(_STYLES)]
            axes.errorbar(
                seeds["value"].mean(skipna=False),
                # points of several sizes lie side by side on the line of their model
                names.index(model) + 0.6 * ((number + 0.5) / len(sizes) - 0.5),
                xerr=seeds["value"].std() if len(seeds) > 1 else None,
                color=colour,
                marker=marker,
                markerfacecolor=colour if seeds["complete"].all() else "none",
                linestyle="none",
                label=f"batch size {size}",
            )
        for row in published:
            if title in row["figures"]:
                height = names.index(row["name"])
                axes.plot(row["figures"][title], height, label="published", **_PUBLISHED_STYLE)
        axes.axvline(
            of_column["majority"].iloc[0], color="black", linestyle=":", label="majority baseline"
        )
        axes.set_title(title)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels.flat[len(titles) :]:
        axes.axis("off")
    found = [axes.get_legend_handles_labels() for axes in panels.flat]
    legend = {label: handle for both in found for handle, label in zip(*both, strict=True)}
    figure.suptitle(f"%, {PLUS_MINUS} standard deviation over seeds; hollow: on other data")
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=4)
    return figure


def _differences(scores: _Table) -> str:
    """Why figures of some runs cannot stand beside published ones."""
    runs = scores[~scores["complete"]].drop_duplicates("path")
    reasons = runs["task"] + ": " + runs["differences"].map("; ".join)
    counts = reasons.value_counts().sort_index().items()
    return "\n".join(f"- {reason} (runs: {count})" for reason, count in counts)


def _unfinished(folder: Path) -> str:
    # model folders have a configuration, but no records of TensorBoard
    runs = (path.parent for path in sorted(folder.rglob("tensorboard")))
    return "\n".join(f"- {run.relative_to(folder)}" for run in runs if not (run / RESULT).exists())


def report(folder: Path) -> str:
    """Write `report.md` and `report.png` on the runs below a folder; returns the Markdown."""
    scores = read_scores(folder)
    sections = {
        "Scores": _main_table(scores),
        "Poolers by batch size": _batch_size_tables(scores),
        "Runs on other data than the published": _differences(scores),
        "Unfinished runs, in no figure": _unfinished(folder),
    }
    parts = ["# Fine-tuning", _NOTES]
    for title, text in sections.items():
        parts += [f"## {title}", text] if text else []
    devices, commits = sorted(set(scores["device"])), sorted(set(scores["commit"]))
    parts.append(
        f"Runs: {scores['path'].nunique()}. Device: {'; '.join(devices)}. "
        f"Commit: {', '.join(commits)}."
    )
    text = "\n\n".join(parts) + "\n"
    write_report(folder, text, draw(scores))
    return text


if __name__ == "__main__":
    report_program("glue/report.py", "tables and a figure of fine-tuning", "runs/glue", report)
