"""The figure of a report: a panel for each column, a line for each model and published row."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from glue.published import PublishedRow
from glue.summary import Column, Model, Summary

_PANELS_A_ROW = 4
# Okabe and Ito's palette, told apart by colour-blind readers too; the marks differ as well
_SIZE_STYLES = (("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "^"), ("#E69F00", "v"))
_PUBLISHED: dict[str, Any] = {"color": "#D55E00", "marker": "D", "markersize": 5}
_MAJORITY: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}
_CAPS = {"capsize": 3, "linestyle": "none"}


def draw(summary: Summary, published: list[PublishedRow]) -> Figure:
    """Draw all columns.

    Args:
        summary: of the runs.
        published: rows to show where they have a figure.
    """
    columns, models = summary.columns, summary.models
    titles = {column.title for column in columns}
    shown = [row for row in published if titles & row.figures.keys()]
    names = [*(model.title for model in models), *dict.fromkeys(row.name for row in shown)]
    across = min(len(columns), _PANELS_A_ROW)
    down = -(-len(columns) // across)
    figure = Figure(
        figsize=(3.4 + 2.5 * across, down * (1.2 + 0.32 * len(names)) + 0.8), layout="constrained"
    )
    for number, axes in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if number >= len(columns):
            axes.axis("off")
            continue
        column = columns[number]
        majority = summary.majority(column)
        if majority is not None:
            axes.axvline(majority, **_MAJORITY)
        _draw_measured(axes, summary, column, models)
        _draw_published(axes, column, shown, names)
        _finish(axes, column.title, names, has_names=number % across == 0)
    handles = _legend(summary, shown)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize=9,
    )
    return figure


def _sizes(summary: Summary) -> list[int]:
    return sorted({result.batch_size for result in summary.results})


def _size_style(summary: Summary, size: int) -> dict[str, Any]:
    colour, marker = _SIZE_STYLES[_sizes(summary).index(size) % len(_SIZE_STYLES)]
    return {"color": colour, "marker": marker, "markersize": 5}


def _places(count: int, line: int) -> list[float]:
    """Heights of points side by side within a line."""
    return [line + 0.6 * ((number + 0.5) / count - 0.5) for number in range(count)]


def _draw_measured(axes: Any, summary: Summary, column: Column, models: list[Model]) -> None:
    """A point for each batch size of each model."""
    for line, model in enumerate(models):
        found = [(size, summary.cell(model, column, size)) for size in _sizes(summary)]
        cells = [(size, cell) for size, cell in found if cell is not None]
        for (size, cell), place in zip(cells, _places(len(cells), line), strict=True):
            if cell.mean is None:
                continue
            style = _size_style(summary, size)
            face = style["color"] if cell.complete else "none"
            axes.errorbar(
                cell.mean, place, xerr=cell.spread, markerfacecolor=face, **style, **_CAPS
            )


def _draw_published(axes: Any, column: Column, rows: list[PublishedRow], names: list[str]) -> None:
    """A point for each row with a figure, those of a study of batch sizes in one line."""
    found = [row for row in rows if column.title in row.figures]
    for line, name in enumerate(names):
        here = [row for row in found if row.name == name]
        for row, place in zip(here, _places(len(here), line), strict=True):
            spread = row.spreads.get(column.title)
            axes.errorbar(row.figures[column.title], place, xerr=spread, **_PUBLISHED, **_CAPS)


def _legend(summary: Summary, published: list[PublishedRow]) -> dict[str, Line2D]:
    """Handles by what they mean."""
    handles = {"constant prediction": Line2D([], [], **_MAJORITY)}
    for size in _sizes(summary):
        style = _size_style(summary, size)
        handles[f"batch size {size}"] = Line2D([], [], linestyle="none", **style)
    if not all(result.complete for result in summary.results):
        handles["hollow: on other data than the published"] = Line2D(
            [], [], linestyle="none", marker="o", color="grey", markerfacecolor="none"
        )
    if published:
        sizes = sorted({row.batch_size for row in published if row.batch_size is not None})
        studied = f" (CS475: batch sizes {', '.join(map(str, sizes))} from above)" if sizes else ""
        handles[f"published{studied}"] = Line2D([], [], linestyle="none", **_PUBLISHED)
    return handles


def _finish(axes: Any, title: str, names: list[str], *, has_names: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("%, bars: standard deviation over seeds", fontsize=8)
    axes.set_yticks(range(len(names)), names if has_names else [""] * len(names), fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
