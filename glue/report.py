"""Tables and a figure of finished runs: `python glue/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes `report.md` and `report.png`
into it.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import FiniteFloat

from glue.metrics import mean_of
from glue.settings import FineTuningSettings, pooler_label
from glue.tasks import NINE_COLUMNS, TASKS
from ponet import PoolerConfig
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
    "chosen on the development set that is reported, as published. MNLI, QNLI, SST-2, RTE, WNLI: "
    "accuracy; QQP, MRPC: mean of accuracy and F1; CoLA: Matthews correlation; STS-B: Spearman "
    "correlation; HND, IMDb: F1 of class 1; Yelp-5, Arxiv-11: accuracy. The average is over the "
    "nine columns MNLI-m to RTE. The majority baseline says the same of all examples. Rows in "
    "italics are published figures, for BERT with the pooler named or for the model named. "
    f"{_DAGGER}: on other data than the published, see below; not to be compared with them."
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
    """The same of a constant prediction."""
    score: FiniteFloat | None
    """Headline metric."""
    majority: FiniteFloat | None
    differences: list[str]
    """Why the data are not the published ones."""
    device: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class PublishedScores:
    """Figures of one model, in percent, by title of a column."""

    name: str
    mixer: str
    pooler: str
    """Label of the pooler that it is compared with."""
    figures: dict[str, float]
    spreads: dict[str, float] = field(default_factory=dict)
    """Standard deviation over seeds, where it is known."""
    average: float | None = None
    """Of the nine columns."""
    batch_size: int | None = None
    """In a study of batch sizes, where several rows have one name."""


def published_scores() -> list[PublishedScores]:
    """All published rows, in the order of reports."""
    rows = read_published(Path(__file__).with_name("published.yaml"))
    return [
        PublishedScores(
            **row
            | {
                "pooler": pooler_label(PoolerConfig(**row["pooler"])),
                # two figures are accuracy and F1
                "figures": {title: float(np.mean(x)) for title, x in row["figures"].items()},
            }
        )
        for row in rows
    ]


def _encoder_title(run: FineTuningResult) -> str:
    named = run.mixer in run.checkpoint
    title = run.checkpoint if named else f"{run.checkpoint} ({run.mixer})"
    title += ", from scratch" if run.from_scratch else ""
    published = TASKS[run.task].segments if run.task in TASKS else "texts"
    return title + ("" if run.segments == published else f", segments {run.segments}")


def read_scores(folder: Path) -> _Table:
    """The scores of all finished runs below a folder, in the order of a report's rows.

    Returns:
        One row per run and column that it was scored on: the fields of `FineTuningResult`; model,
        encoder and pooler in print; `complete`, whether the data are the published ones; the title
        of the column with `value` and `majority` in percent, not a number where undefined.

    Raises:
        ResultError: none is finished, a result is damaged, or two are of the same run.
    """
    runs = read_results(folder, FineTuningResult, _IDENTITY, "glue/run.py")
    poolers = {name: number for number, name in enumerate(POOLERS)}
    rows = []
    for row in runs.to_dict("records"):
        path = row.pop("path")
        run = FineTuningResult(**row)
        encoder, pooler = _encoder_title(run), pooler_label(run.pooler)
        number = poolers.get(run.pooler.name, len(poolers))
        shared = vars(run) | {
            "path": path,
            "model": f"{encoder}, {pooler}",
            "encoder": encoder,
            "pooler": pooler,
            "complete": not run.differences,
            "order": (run.from_scratch, encoder, number, pooler, run.seed),
        }
        for title, value, majority in _columns_of(run):
            scores = {"value": _percent(value), "majority": _percent(majority)}
            rows.append(shared | {"column": title} | scores)
    return pd.DataFrame(rows).sort_values("order", kind="stable")


def _columns_of(run: FineTuningResult) -> list[tuple[str, float | None, float | None]]:
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


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def _titles(scores: _Table) -> list[str]:
    """Columns with a score: the nine of the published average, other tasks, own ones."""
    known = dict.fromkeys([*NINE_COLUMNS, *(task.title for task in TASKS.values())])
    found = set(scores["column"])
    return [title for title in [*known, *sorted(found - known.keys())] if title in found]


def best_points(scores: _Table, *further: str) -> _Table:
    """The scores at the best point of each model's grid per task, by the mean over seeds.

    Only runs on the best data count: the published, the most examples. Points with fewer seeds than
    another are not in the running: the luck of one run would beat the mean of several.

    Args:
        scores: as from `read_scores`.
        further: fields whose values have a best point each.
    """
    best_first = scores.sort_values(_DATA, ascending=False, kind="stable")
    scores = scores.merge(best_first.drop_duplicates(["model", "task"])[["model", "task", *_DATA]])
    headline = scores.assign(score=pd.to_numeric(scores["score"])).drop_duplicates("path")
    points = headline.groupby(["model", "task", *_POINT], sort=False)["score"].agg(
        seeds="size", mean=lambda x: x.mean(skipna=False)
    )
    # a point with an undefined score comes last among those of as many seeds
    points = points.reset_index().sort_values(["seeds", "mean"], ascending=False, kind="stable")
    best = points.drop_duplicates(["model", "task", *further])
    return scores.merge(best[["model", "task", *_POINT]])


def _cell_text(values: _Table, complete: bool) -> str:
    missing = int(values.isna().sum())
    text = f"undefined in {missing} of {len(values)}" if missing else scores_text(list(values))
    return text + ("" if complete else _DAGGER)


def _cells(scores: _Table, *by: str) -> dict[Any, str]:
    """Text of the scores of each group of runs."""
    return {
        key: _cell_text(runs["value"], runs["complete"].all())
        for key, runs in scores.groupby(list(by), sort=False)
    }


def _means(scores: _Table) -> dict[str, float | None]:
    """Mean by column of one model; None where the score of a seed is undefined."""
    means = scores.groupby("column", sort=False)["value"].agg(lambda x: x.mean(skipna=False))
    return {title: None if pd.isna(mean) else mean for title, mean in means.items()}


def _average(means: dict[str, float | None]) -> float | None:
    """Of the nine columns; None if one is undefined or missing."""
    nine = [mean for title in NINE_COLUMNS if (mean := means.get(title)) is not None]
    return float(np.mean(nine)) if len(nine) == len(NINE_COLUMNS) else None


def _percent_text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f} %"


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Scores of the runs that a checkpoint has had, this command's and earlier ones; logged, too.

    Args:
        folder: of the checkpoint's runs.

    Returns:
        For each pooler the columns in percent, at the best point of each grid, and the average of
        the nine published ones, None while one is undefined or missing.

    Raises:
        ResultError: a result is damaged.
    """
    summary = []
    for _, scores in best_points(read_scores(folder)).groupby("model", sort=False):
        model = scores.iloc[0]
        means = _means(scores)
        for title, seeds in scores.groupby("column", sort=False):
            point = seeds.iloc[0]
            logger.info(
                "%s, %s: %s (seeds: %d, batch size %d, learning rate %g)",
                title,
                model.pooler,
                _percent_text(means[title]),
                len(seeds),
                point.batch_size,
                point.learning_rate,
            )
        average = _average(means)
        if means.keys() >= NINE_COLUMNS.keys():
            found = _percent_text(average)
            logger.info("average of the nine columns, %s: %s", model.pooler, found)
        names = {"encoder": model.encoder, "pooler": model.pooler}
        summary.append(names | {"columns": means, "average": average})
    return summary


def _published_beside(scores: _Table) -> list[PublishedScores]:
    """The published rows that measured ones stand beside: same pooler, or same mixer."""
    # BERT is what poolers were studied on; whatever the encoder here, its figures are the only ones
    mixers = {*scores["mixer"], "attention"}
    poolers = set(scores["pooler"])
    return [row for row in published_scores() if row.pooler in poolers and row.mixer in mixers]


def _italic(texts: list[str]) -> list[str]:
    return [f"*{text}*" if text else "" for text in texts]


def _main_table(scores: _Table) -> str:
    titles, best = _titles(scores), best_points(scores)
    cells = _cells(best, "model", "column")
    # on the best data that there are runs on
    best_first = scores.sort_values(_DATA, ascending=False, kind="stable")
    majority = dict(best_first.drop_duplicates("column")[["column", "majority"]].to_numpy())
    constant = ["undefined" if pd.isna(majority[t]) else figure_text(majority[t]) for t in titles]
    rows = [["majority baseline", *constant, ""]]
    for model, of_model in best.groupby("model", sort=False):
        average = figure_text(_average(_means(of_model)))
        nine = of_model[of_model["column"].isin(list(NINE_COLUMNS))]
        mark = _DAGGER if average and not nine["complete"].all() else ""
        rows.append([model, *(cells.get((model, t), "") for t in titles), average + mark])
    for row in _published_beside(scores):
        spreads = {t: f" {PLUS_MINUS} {spread:.2f}" for t, spread in row.spreads.items()}
        texts = [figure_text(row.figures.get(t)) + spreads.get(t, "") for t in titles]
        if row.batch_size is None and any(texts):
            rows.append(_italic([row.name, *texts, figure_text(row.average)]))
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
        figure_text(row.figures[title])
        for row in published_scores()
        if row.mixer == "attention"
        and row.pooler == pooler
        and title in row.figures
        and batch_size == (row.batch_size or _MAXPOOL_BATCH_SIZE)
    )


def draw(scores: _Table) -> Figure:
    """A panel per column: models by batch size, hollow on other data, and published rows."""
    titles, best = _titles(scores), best_points(scores, "batch_size")
    published = [row for row in _published_beside(scores) if row.figures.keys() & set(titles)]
    names = list(dict.fromkeys([*best["model"], *(row.name for row in published)]))
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
            if title in row.figures:
                height = names.index(row.name)
                axes.plot(row.figures[title], height, label="published", **_PUBLISHED_STYLE)
        axes.axvline(
            of_column["majority"].iloc[0], color="black", linestyle=":", label="majority baseline"
        )
        axes.set_title(title)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels.flat[len(titles) :]:
        axes.axis("off")
    handles = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.suptitle(f"%, {PLUS_MINUS} standard deviation over seeds; hollow: on other data")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _differences(scores: _Table) -> str:
    """Why figures of some runs cannot stand beside published ones."""
    runs = scores.drop_duplicates("path")
    others = runs[~runs["complete"]]
    reasons = Counter(others["task"] + ": " + others["differences"].map("; ".join))
    return "\n".join(f"- {reason} (runs: {count})" for reason, count in sorted(reasons.items()))


def _unfinished(folder: Path) -> str:
    # model folders have a configuration, but no records of TensorBoard
    runs = (path.parent for path in sorted(folder.rglob("tensorboard")))
    return "\n".join(f"- {run.relative_to(folder)}" for run in runs if not (run / RESULT).exists())


def report(folder: Path) -> str:
    """Report on the runs below a folder: write `report.md` and `report.png` into it.

    Returns:
        The report as Markdown.

    Raises:
        ResultError: there are no results, or one cannot be used.
        OSError: a file cannot be written.
    """
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
