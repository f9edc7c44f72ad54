"""The figure of a report: a panel for each protocol and task, a line for each model."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from lra.published import PUBLISHED
from lra.summary import Group

# Okabe and Ito's palette, told apart by colour-blind readers too; the marks differ as well
_MEASURED = {"color": "#0072B2", "marker": "o", "markersize": 7}
_PUBLISHED = {
    "color": "#D55E00",
    "marker": "D",
    "markersize": 8,
    "markerfacecolor": "none",
    "markeredgewidth": 1.6,
}
_INCOMPLETE = {"color": "#7F7F7F", "marker": "x", "markersize": 6, "markeredgewidth": 1.6}


def draw(
    groups: list[Group], task_titles: dict[str, str], model_title: Callable[[str], str]
) -> Figure:
    """Draw all groups.

    Args:
        groups: at least one.
        task_titles: tasks in print.
        model_title: a model in print.
    """
    columns = max(len(group.tasks) for group in groups)
    lines = [_models(group) for group in groups]
    heights = [1.3 + 0.34 * len(models) for models in lines]
    figure = Figure(figsize=(2.6 + 2.4 * columns, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(groups), columns, squeeze=False, height_ratios=heights)
    handles: dict[str, Any] = {}
    for group, models, row in zip(groups, lines, panels, strict=True):
        for number, axes in enumerate(row):
            if number >= len(group.tasks):
                axes.axis("off")
                continue
            task = group.tasks[number]
            handles |= _draw_task(axes, group, task, models)
            axes.set_title(task_titles[task], fontsize=10)
            axes.set_xlabel("test accuracy, %", fontsize=9)
            names = [model_title(model) for model in models] if number == 0 else []
            axes.set_yticks(range(len(models)), names or [""] * len(models), fontsize=9)
        row[0].set_ylabel(f"protocol:\n{group.name}", fontsize=10)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )
    return figure


def _models(group: Group) -> list[str]:
    """Models with any run, those with complete ones first."""
    return list(dict.fromkeys([*group.models, *(run.model for run in group.incomplete)]))


def _draw_task(axes: Any, group: Group, task: str, models: list[str]) -> dict[str, Any]:
    """Draw one panel; returns handles by their meaning."""
    handles: dict[str, Any] = {}
    handles["commonest class"] = axes.axvline(
        group.majority[task], color="black", linestyle=":", linewidth=1.2
    )
    for place, model in enumerate(models):
        published = PUBLISHED[model].accuracy(task) if model in PUBLISHED else None
        if published is not None:
            (handles["published"],) = axes.plot(published, place, linestyle="none", **_PUBLISHED)
        cell = group.cells.get((model, task))
        if cell is not None:
            handles["measured, \N{PLUS-MINUS SIGN} standard deviation over seeds"] = axes.errorbar(
                cell.mean, place, xerr=cell.spread, capsize=3, linestyle="none", **_MEASURED
            )
    for run in group.incomplete:
        if run.task == task:
            (handles["incomplete run"],) = axes.plot(
                100 * run.test_accuracy, models.index(run.model), linestyle="none", **_INCOMPLETE
            )
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    return handles
