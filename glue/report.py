"""Tables and a figure of finished runs: `python glue/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes `report.md`, `report.json`
and `report.png` into it.
"""

import statistics
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glue.published import PUBLISHED, RATIOS, PublishedRow
from glue.report_figure import draw
from glue.summary import Cell, Column, Model, Summary, read_summary
from glue.tasks import NINE_COLUMNS
from ponet.run.report import figure_text, markdown_table, report_program, write_report_files

_PLUS_MINUS, _DAGGER = "\N{PLUS-MINUS SIGN}", "\N{DAGGER}"

_NOTES = (
    f"In percent: mean {_PLUS_MINUS} standard deviation over (n) seeds, at the point of the grid "
    "(batch size, learning rate, epochs) with the best mean, among those with the most seeds, "
    "chosen on the development set that is reported, as published. MNLI, QNLI, SST-2, RTE, WNLI: "
    "accuracy; QQP, MRPC: mean of accuracy and F1; CoLA: Matthews correlation; STS-B: Spearman "
    "correlation; HND, IMDb: F1 of class 1; Yelp-5, Arxiv-11: accuracy. The average is over the "
    "nine columns MNLI-m to RTE. Rows in italics are published figures, for BERT with the pooler "
    "named or for the model named. "
    f"{_DAGGER}: on other data than the published, see below; not to be compared with them."
)
_BATCH_SIZE_NOTE = (
    "Each at the best learning rate. Published for BERT: MaxPoolBERT at batch size 32, mean of "
    "three seeds; CS475, one run each; both, in this order, where there are two figures."
)
_COST_NOTE = (
    "Seconds of a run / training steps a second / peak memory in MiB: medians and maximum over the "
    "seeds of the scores above. On a CPU the memory is that of the process so far."
)
_UNDEFINED = "undefined"
# the batch size of MaxPoolBERT
_MAXPOOL_BATCH_SIZE = 32


def published_beside(models: list[Model]) -> list[PublishedRow]:
    """The published rows that measured ones stand beside: same pooler, or same mixer."""
    poolers = {model.pooler for model in models}
    mixers = {model.mixer for model in models}
    # BERT is what poolers were studied on; whatever the encoder here, its figures are the only ones
    return [
        row
        for row in PUBLISHED
        if row.pooler in poolers and (row.mixer in mixers or row.mixer == "attention")
    ]


def markdown(summary: Summary) -> str:
    """The whole report as Markdown."""
    results = summary.results
    sections = [
        ("Scores", _score_table(summary)),
        ("What pre-training is worth", _gain_table(summary)),
        ("Against other token mixers", _ratio_table(summary)),
        ("Poolers by batch size", _batch_size_tables(summary)),
        ("Time and memory", _cost_table(summary)),
        ("Runs on other data than the published", _departures(summary)),
        ("Unfinished runs, in no figure", _list(summary.unfinished)),
    ]
    parts = ["# Fine-tuning", _NOTES]
    for title, text in sections:
        if text:
            parts += [f"## {title}", text]
    devices = "; ".join(sorted({result.device for result in results}))
    commits = ", ".join(sorted({result.commit for result in results}))
    parts.append(f"Runs: {len(results)}. Device: {devices}. Commit: {commits}.")
    return "\n\n".join(parts) + "\n"


def _list(items: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _italic(texts: list[str]) -> list[str]:
    return [f"*{text}*" if text else "" for text in texts]


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mark = "" if cell.complete else _DAGGER
    if cell.mean is None:
        count = sum(value is None for value in cell.values)
        return f"{_UNDEFINED} in {count} of {len(cell.values)}{mark}"
    spread = "" if cell.spread is None else f" {_PLUS_MINUS} {cell.spread:.2f}"
    return f"{cell.mean:.2f}{spread} ({len(cell.values)}){mark}"


def _majority_text(summary: Summary, column: Column) -> str:
    value = summary.majority(column)
    return _UNDEFINED if value is None else figure_text(value)


def _published_cells(row: PublishedRow, columns: list[Column]) -> list[str]:
    cells = []
    for column in columns:
        figure, spread = row.figures.get(column.title), row.spreads.get(column.title)
        beside = "" if spread is None else f" {_PLUS_MINUS} {spread:.2f}"
        cells.append(figure_text(figure) + beside)
    return cells


def _score_table(summary: Summary) -> str:
    columns, models = summary.columns, summary.models
    rows = [["constant prediction", *(_majority_text(summary, c) for c in columns), ""]]
    for model in models:
        cells = [_cell_text(summary.cell(model, column)) for column in columns]
        rows.append([model.title, *cells, _average_text(summary, model)])
    for row in published_beside(models):
        cells = _published_cells(row, columns)
        if row.batch_size is None and any(cells):
            rows.append(_italic([row.name, *cells, figure_text(row.average)]))
    return markdown_table(["model", *(column.title for column in columns), "average"], rows)


def _average_text(summary: Summary, model: Model) -> str:
    average = summary.average(model)
    if average is None:
        return ""
    columns = [column for column in summary.columns if column.title in NINE_COLUMNS]
    cells = [summary.cell(model, column) for column in columns]
    departs = any(cell is not None and not cell.complete for cell in cells)
    return figure_text(average) + (_DAGGER if departs else "")


def _gains(summary: Summary) -> list[dict[str, Any]]:
    """Pre-trained encoders beside random ones, pooler by pooler and column by column."""
    models = summary.models
    gains = []
    for random in [model for model in models if model.from_scratch]:
        for model in models:
            if model != replace(random, from_scratch=False):
                continue
            for column in summary.columns:
                ours, theirs = summary.cell(model, column), summary.cell(random, column)
                if ours and theirs and ours.runs[0].data == theirs.runs[0].data:
                    above, below = ours.mean, theirs.mean
                    gains.append(
                        {
                            "column": column,
                            "model": model,
                            "random": random,
                            "pre-trained": ours,
                            "from scratch": theirs,
                            "gain": None if above is None or below is None else above - below,
                        }
                    )
    return gains


def _gain_table(summary: Summary) -> str:
    head = ["task", "model", "constant prediction", "from scratch", "pre-trained", "gain"]
    rows = [
        [
            gain["column"].title,
            gain["model"].title,
            _majority_text(summary, gain["column"]),
            _cell_text(gain["from scratch"]),
            _cell_text(gain["pre-trained"]),
            _UNDEFINED if gain["gain"] is None else f"{gain['gain']:+.2f}",
        ]
        for gain in _gains(summary)
    ]
    return markdown_table(head, rows) if rows else ""


def _ratios(summary: Summary) -> list[dict[str, Any]]:
    """PoNet over other mixers with the same pooler, both pre-trained."""
    models = [model for model in summary.models if not model.from_scratch]
    ratios = []
    for ours in models:
        for other in models:
            same = (ours.pooler, ours.segments) == (other.pooler, other.segments)
            if ours.mixer != "ponet" or other.mixer == "ponet" or not same:
                continue
            found = summary.ratio(ours, other)
            if found is not None:
                ratios.append(
                    {"model": ours, "other": other, "columns": found[0], "ratio": found[1]}
                )
    return ratios


def _ratio_table(summary: Summary) -> str:
    head = ["model", "over", "columns", "ratio of averages, %", "published, nine columns"]
    rows = [
        [
            ratio["model"].title,
            ratio["other"].title,
            ", ".join(ratio["columns"]),
            f"{ratio['ratio']:.1f}",
            f"*{RATIOS[mixer]}*" if (mixer := ratio["other"].mixer) in RATIOS else "",
        ]
        for ratio in _ratios(summary)
    ]
    return markdown_table(head, rows) if rows else ""


def _batch_sizes(summary: Summary, models: list[Model], column: Column) -> list[int]:
    runs = [run for model in models for run in summary.runs_of(model, column.task)]
    return sorted({run.batch_size for run in runs})


def _published_at(models: list[Model], column: Column, batch_size: int) -> list[str]:
    """Published figures of poolers at a batch size."""
    cells = []
    for model in models:
        found = [
            row.figures[column.title]
            for row in PUBLISHED
            if row.pooler == model.pooler
            and column.title in row.figures
            and row.mixer == "attention"
            and batch_size == (row.batch_size or _MAXPOOL_BATCH_SIZE)
        ]
        cells.append(" / ".join(map(figure_text, found)))
    return cells


def _batch_size_tables(summary: Summary) -> str:
    """A table for each encoder that several poolers or batch sizes were tried on."""
    tables = []
    for encoder in dict.fromkeys(model.encoder for model in summary.models):
        models = [model for model in summary.models if model.encoder == encoder]
        sizes = {c.title: _batch_sizes(summary, models, c) for c in summary.columns}
        if len(models) == 1 and max(map(len, sizes.values())) < 2:
            continue
        rows = []
        for column in summary.columns:
            for size in sizes[column.title]:
                cells = [_cell_text(summary.cell(model, column, size)) for model in models]
                if not any(cells):
                    continue
                rows.append([column.title, str(size), *cells])
                published = _published_at(models, column, size)
                if any(published):
                    rows.append(_italic([f"{column.title}, BERT", str(size), *published]))
        head = ["task", "batch size", *(model.pooler_title for model in models)]
        tables += [f"{encoder.encoder_title}:", markdown_table(head, rows)]
    return "\n\n".join([_BATCH_SIZE_NOTE, *tables]) if tables else ""


def _cost_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    seconds = statistics.median(run.seconds for run in cell.runs)
    speed = statistics.median(run.steps_per_s for run in cell.runs)
    return f"{seconds:,.0f} / {speed:.3g} / {max(run.peak_memory_mib for run in cell.runs):,.0f}"


def _cost_table(summary: Summary) -> str:
    """Of the runs that the first table shows."""
    columns = list({column.task: column for column in summary.columns}.values())
    rows = [
        [model.title, *(_cost_text(summary.cell(model, column)) for column in columns)]
        for model in summary.models
    ]
    return f"{_COST_NOTE}\n\n" + markdown_table(
        ["model", *(column.task for column in columns)], rows
    )


def _departures(summary: Summary) -> str:
    counts = Counter(
        (result.task, "; ".join(result.departures))
        for result in summary.results
        if not result.complete
    )
    return _list(
        [f"{task}: {reason} (runs: {count})" for (task, reason), count in sorted(counts.items())]
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    run = cell.runs[0]
    return {
        "mean": cell.mean,
        "spread": cell.spread,
        "values": cell.values,
        "seeds": [each.seed for each in cell.runs],
        "batch_size": run.batch_size,
        "learning_rate": run.learning_rate,
        "epochs": run.epochs,
        "points_of_the_grid": cell.num_points,
        "num_train": run.num_train,
        "num_eval": run.num_eval,
        "complete": cell.complete,
        "departures": run.departures,
        "seconds": [each.seconds for each in cell.runs],
        "peak_memory_mib": [each.peak_memory_mib for each in cell.runs],
    }


def _cells_json(summary: Summary, model: Model) -> dict[str, Any]:
    """By column: the best cell, and the best of each batch size."""
    cells = {}
    for column in summary.columns:
        cell = summary.cell(model, column)
        if cell is None:
            continue
        by_size = {
            str(size): _cell_json(found)
            for size in _batch_sizes(summary, [model], column)
            if (found := summary.cell(model, column, size)) is not None
        }
        cells[column.title] = {**_cell_json(cell), "by_batch_size": by_size}
    return cells


def as_json(summary: Summary) -> dict[str, Any]:
    """The figures of the tables, in percent; null where they are undefined."""
    return {
        "majority": {column.title: summary.majority(column) for column in summary.columns},
        "models": [
            {
                **asdict(model),
                "title": model.title,
                "average": summary.average(model),
                "columns": _cells_json(summary, model),
            }
            for model in summary.models
        ],
        "published": [asdict(row) for row in published_beside(summary.models)],
        "gains": [
            {"column": g["column"].title, "model": g["model"].title, "gain": g["gain"]}
            for g in _gains(summary)
        ],
        "ratios": [
            {**ratio, "model": ratio["model"].title, "other": ratio["other"].title}
            for ratio in _ratios(summary)
        ],
        "unfinished": summary.unfinished,
    }


def write_report(folder: Path) -> str:
    """Read the runs below a folder and write the three files into it.

    Returns:
        The report as Markdown.

    Raises:
        ResultError: there are no results, or one cannot be used.
        OSError: a file cannot be written.
    """
    summary = read_summary(folder)
    text = markdown(summary)
    figure = draw(summary, published_beside(summary.models))
    write_report_files(folder, text, as_json(summary), figure)
    return text


def main() -> None:
    """Report on the runs that the command line names."""
    report_program(
        "glue/report.py", "tables and a figure of fine-tuning runs", "runs/glue", write_report
    )


if __name__ == "__main__":
    main()
