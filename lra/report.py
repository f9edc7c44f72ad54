"""Tables and a figure of finished runs: `python lra/report.py [RUNS_DIR]`.

Reads every `result.json` below the folder, prints Markdown and writes `report.md`, `report.json`
and `report.png` into it. Protocols, and runs with and without self-pretraining, are reported apart.
"""

from pathlib import Path
from typing import Any

from lra.published import PUBLISHED
from lra.report_figure import draw
from lra.summary import Cell, Group, make_groups, read_results
from lra.tasks import COMPARED
from ponet.run.report import figure_text, markdown_table, report_program, write_report_files

TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder": "Pathfinder",
    "pathx": "Path-X",
}
"""Tasks in print."""

_NOTES = (
    "Test accuracy in percent: mean \N{PLUS-MINUS SIGN} standard deviation over (n) seeds. "
    "Published figures: PoNet, arXiv 2110.02442, Table 1, number of seeds not stated. The average "
    "is over the five tasks, where all have complete runs."
)


def model_title(model: str) -> str:
    """A model in print: `ponet_eager` is `PoNet (ponet_eager)`."""
    if model not in PUBLISHED:
        return model
    title = PUBLISHED[model].model
    return title if title.lower() == model else f"{title} ({model})"


def markdown(groups: list[Group]) -> str:
    """The whole report as Markdown."""
    parts = ["# Long Range Arena", _NOTES]
    for group in groups:
        parts.append(f"## Protocol: {group.name}")
        if group.models:
            parts += [_accuracy_table(group), "Training steps a second:", _speed_table(group)]
        else:
            parts.append("No complete runs.")
        if group.incomplete:
            parts += ["### Incomplete runs, in no mean", _incomplete_table(group)]
        parts.append(f"Device: {'; '.join(group.devices)}. Commit: {', '.join(group.commits)}.")
    return "\n\n".join(parts) + "\n"


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    spread = "" if cell.spread is None else f" \N{PLUS-MINUS SIGN} {cell.spread:.2f}"
    return f"{cell.mean:.2f}{spread} ({len(cell.accuracies)})"


def _accuracy_table(group: Group) -> str:
    rows = [["commonest class", *(figure_text(group.majority[task]) for task in group.tasks), ""]]
    for model in group.models:
        cells = [_cell_text(group.cells.get((model, task))) for task in group.tasks]
        rows.append([model_title(model), *cells, figure_text(group.average(model))])
        if model in PUBLISHED:
            published = PUBLISHED[model]
            row = [f"{published.model}, {published.source}"]
            for task in group.tasks:
                accuracy = published.accuracy(task)
                fails = task in COMPARED and accuracy is None
                row.append("fails" if fails else figure_text(accuracy))
            row.append(figure_text(published.average))
            rows.append([f"*{text}*" if text else "" for text in row])
    return markdown_table(["model", *(TITLES[task] for task in group.tasks), "average"], rows)


def _speed_table(group: Group) -> str:
    rows = []
    for model in group.models:
        cells = (group.cells.get((model, task)) for task in group.tasks)
        rows.append([model_title(model), *(f"{c.steps_per_s:.3g}" if c else "" for c in cells)])
    return markdown_table(["model", *(TITLES[task] for task in group.tasks)], rows)


def _incomplete_table(group: Group) -> str:
    head = ["task", "model", "seed", "steps", "of", "accuracy", "commonest class", "steps/s"]
    head.append("not as published")
    rows = [
        [
            TITLES[run.task],
            model_title(run.model),
            str(run.seed),
            str(run.steps),
            str(run.published_steps),
            figure_text(100 * run.test_accuracy),
            figure_text(100 * run.majority_rate),
            f"{run.steps_per_s:.3g}",
            ", ".join(map(str, run.departures)) or "data",
        ]
        for run in group.incomplete
    ]
    return markdown_table(head, rows)


def as_json(groups: list[Group]) -> list[dict[str, Any]]:
    """The figures of the tables."""
    return [
        {
            "protocol": group.name,
            "majority": group.majority,
            "models": {
                model: {
                    "tasks": {
                        task: {
                            "mean": cell.mean,
                            "spread": cell.spread,
                            "accuracies": cell.accuracies,
                            "steps_per_s": cell.steps_per_s,
                        }
                        for task in group.tasks
                        if (cell := group.cells.get((model, task)))
                    },
                    "average": group.average(model),
                    "published": (
                        dict(zip(COMPARED, PUBLISHED[model].accuracies, strict=True))
                        if model in PUBLISHED
                        else None
                    ),
                }
                for model in group.models
            },
            "incomplete": [
                {
                    "task": run.task,
                    "model": run.model,
                    "seed": run.seed,
                    "steps": run.steps,
                    "published_steps": run.published_steps,
                    "accuracy": 100 * run.test_accuracy,
                    "steps_per_s": run.steps_per_s,
                }
                for run in group.incomplete
            ],
            "devices": group.devices,
            "commits": group.commits,
        }
        for group in groups
    ]


def write_report(folder: Path) -> str:
    """Read the runs below a folder and write the three files into it.

    Returns:
        The report as Markdown.

    Raises:
        ResultError: there are no results, or one cannot be used.
        OSError: a file cannot be written.
    """
    groups = make_groups(read_results(folder))
    text = markdown(groups)
    figure = draw(groups, TITLES, model_title)
    write_report_files(folder, text, as_json(groups), figure)
    return text


def main() -> None:
    """Report on the runs that the command line names."""
    report_program(
        "lra/report.py", "tables and a figure of Long Range Arena runs", "runs/lra", write_report
    )


if __name__ == "__main__":
    main()
