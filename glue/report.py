"""Tables and figures of finished runs: `python glue/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes `report.md` and `report.png`
into it, and where several numbers of layers or sizes of training sets were run, `layers.png` and
`learning.png`.
"""

import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from glue.scores import (
    AVERAGES,
    DAGGER,
    Table,
    average,
    best_points,
    cells_of,
    italic,
    means_of,
    on_best_data,
    published_beside,
    read_scores,
    titles_of,
)
from glue.studies import (
    PUBLISHED_STYLE,
    STYLES,
    batch_size_tables,
    by_layers,
    by_size,
    draw_layers,
    draw_sizes,
    layers_tables,
    size_tables,
    spread_table,
)
from glue.tasks import TASKS
from ponet.run.report import (
    PLUS_MINUS,
    figure_text,
    markdown_table,
    report_program,
    write_figure,
    write_report,
)
from ponet.run.runs import RESULT

_NOTES = (
    f"In percent: mean {PLUS_MINUS} standard deviation over (n) seeds, at the point of the grid "
    "(batch size, learning rate, epochs) with the best mean, among those with the most seeds, "
    "chosen on the development set that is reported, as published. QQP, MRPC: mean of accuracy "
    "and F1; CoLA: Matthews correlation; STS-B: Spearman correlation; HND, IMDb: F1 of class 1; "
    "others: accuracy. Means: of the nine columns MNLI-m to RTE as in PoNet's paper; of twelve as "
    "in MaxPoolBERT's, with WNLI, and accuracy and F1 a column each. The majority baseline says "
    "the same of all examples. Rows in italics are published figures, for BERT with the pooler "
    "named or for the model named, and means of them where the source prints none; where it does "
    f"not say which reading of a pooler it has, they stand beside both. {DAGGER}: on other data "
    "than the published, see below; not to be compared with them."
)
_LONG_NOTE = (
    'Long texts: the columns without "test" are development sets, but that of IMDb is its test '
    "set, as published. Which of the two PoNet's paper prints could not be read; its figures stand "
    "with the development sets."
)
_SPREADS_NOTE = (
    "Standard deviation over (n) seeds, in points. MaxPoolBERT prints one for each task; those of "
    "MNLI, QQP and MRPC are of a metric that is not said."
)
_LAYERS_NOTE = "Poolers that read the last layers, by how many. ![](layers.png)"
_SIZES_NOTE = (
    "Scores by the number of training examples; gains in points over `first`, or `cls` where that "
    f"was not run: mean {PLUS_MINUS} standard deviation of the differences between (n) runs of the "
    "same seed, which saw the same examples. ![](learning.png)"
)
# tokens beyond which a task is one of long texts
_LONG = 512

logger = logging.getLogger(__name__)


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Scores of the runs that a checkpoint has had, this command's and earlier ones; logged, too.

    Returns:
        For each model the columns in percent, at the best point of each grid, and the averages of
        nine and twelve columns, None while one is undefined or missing.
    """
    summary = []
    for model, scores in best_points(read_scores(folder)).groupby("model", sort=False):
        means = means_of(scores)
        for title, seeds in scores[scores["scored"]].groupby("column", sort=False):
            mean, first = _percent_text(means[title]), seeds.iloc[0]
            point = f"batch size {first.batch_size}, learning rate {first.learning_rate:g}"
            logger.info("%s | %s: %s (seeds: %d, %s)", model, title, mean, len(seeds), point)
        averages = {count: average(means, count) for count in AVERAGES}
        for count, value in averages.items():
            if means.keys() >= AVERAGES[count].keys():
                logger.info("%s | mean of %d columns: %s", model, count, _percent_text(value))
        summary.append({"model": model, "columns": means, "averages": averages})
    return summary


def _percent_text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f} %"


def _main_table(scores: Table) -> str:
    titles, best = titles_of(scores), best_points(scores)
    averages = {n: set(weights) for n, weights in AVERAGES.items() if set(weights) <= set(titles)}
    cells = cells_of(best, "model", "column")
    majority = on_best_data(scores[scores["scored"]], ["column"]).set_index("column")["majority"]
    constant = [_majority_text(majority.get(title)) for title in titles]
    rows = [["majority baseline", *constant, *("" for _ in averages)]]
    for model, of_model in best.groupby("model", sort=False):
        row = [model, *(cells.get((model, title), "") for title in titles)]
        for count, columns in averages.items():
            text = figure_text(average(means_of(of_model), count))
            complete = of_model["complete"][of_model["column"].isin(columns)].all()
            row.append(text + (DAGGER if text and not complete else ""))
        rows.append(row)
    for published in _published(scores):
        texts = [figure_text(published["figures"].get(title)) for title in titles]
        if any(texts):
            texts += [figure_text(_published_average(published, count)) for count in averages]
            rows.append(italic([published["name"], *texts]))
    return markdown_table(["model", *titles, *(f"mean of {n}" for n in averages)], rows)


def _majority_text(value: float | None) -> str:
    if value is None:
        return ""
    return "undefined" if pd.isna(value) else figure_text(value)


def _published(scores: Table) -> list[dict[str, Any]]:
    """Rows of the main table: those by batch size or number of layers have tables of their own."""
    rows = published_beside(scores)
    return [row for row in rows if "batch_size" not in row and "num_layers" not in row]


def _published_average(row: dict[str, Any], count: int) -> float | None:
    """As printed, else that of the printed columns."""
    printed = row.get("averages", {}).get(count)
    return average(row["figures"], count) if printed is None else printed


def draw(scores: Table) -> Figure:
    """A panel per column: models by batch size, hollow on other data, and published rows."""
    titles, best = titles_of(scores), best_points(scores, "batch_size")
    published = [row for row in _published(scores) if row["figures"].keys() & set(titles)]
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
            colour, marker = STYLES[number % len(STYLES)]
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
                axes.plot(
                    row["figures"][title], height, label="published", ls="", **PUBLISHED_STYLE
                )
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


def _differences(scores: Table) -> str:
    """Why figures of some runs cannot stand beside published ones."""
    runs = scores[~scores["complete"]].drop_duplicates("path").sort_values("num_train")
    reasons = [
        # sets of several sizes differ in a number alone
        "; ".join(re.sub(r"^trained on .* of", "trained on some of", x) for x in differences)
        for differences in runs["differences"]
    ]
    lines = []
    for (task, reason), group in runs.groupby(["task", pd.Series(reasons, index=runs.index)]):
        sizes = ", ".join(f"{size:,}" for size in dict.fromkeys(group["num_train"]))
        text = reason.replace("trained on some of", f"trained on {sizes} of")
        lines.append(f"- {task}: {text} (runs: {len(group)})")
    return "\n".join(lines)


def _unfinished(folder: Path) -> str:
    # model folders have a configuration, but no records of TensorBoard
    runs = (path.parent for path in sorted(folder.rglob("tensorboard")))
    return "\n".join(f"- {run.relative_to(folder)}" for run in runs if not (run / RESULT).exists())


def report(folder: Path) -> str:
    """Write `report.md` and the figures on the runs below a folder; returns the Markdown."""
    scores = read_scores(folder)
    scored = scores[scores["scored"]]
    swept, sized = by_layers(scored), by_size(scored)
    sections = {
        "Scores": _main_table(scores),
        "Poolers by batch size": batch_size_tables(scores),
        "Poolers by number of layers": _noted(_LAYERS_NOTE, layers_tables(swept)),
        "Learning curves": _noted(_SIZES_NOTE, size_tables(sized)),
        "Spread over seeds": _noted(_SPREADS_NOTE, spread_table(scores)),
        "Runs on other data than the published": _differences(scores),
        "Unfinished runs, in no figure": _unfinished(folder),
    }
    has_long = any(TASKS[t].max_length > _LONG for t in TASKS.keys() & set(scores["task"]))
    parts = ["# Fine-tuning", _NOTES, *([_LONG_NOTE] if has_long else [])]
    for title, text in sections.items():
        parts += [f"## {title}", text] if text else []
    devices, commits = sorted(set(scores["device"])), sorted(set(scores["commit"]))
    parts.append(
        f"Runs: {scores['path'].nunique()}. Device: {'; '.join(devices)}. "
        f"Commit: {', '.join(commits)}."
    )
    text = "\n\n".join(parts) + "\n"
    write_report(folder, text, draw(scored))
    for name, runs, draw_runs in (
        ("layers", swept, draw_layers),
        ("learning", sized, draw_sizes),
    ):
        if not runs.empty:
            write_figure(folder / f"{name}.png", draw_runs(runs))
    return text


def _noted(note: str, tables: str) -> str:
    return f"{note}\n\n{tables}" if tables else ""


if __name__ == "__main__":
    report_program("glue/report.py", "tables and a figure of fine-tuning", "runs/glue", report)
