"""Tables and figures of the studies of poolers: batch sizes, layers, training sets, spreads.

CS475 compares poolers by batch size. MaxPoolBERT (arXiv 2505.15696) compares numbers of layers, the
gain over its baseline by the size of the training set (figure 1) and standard deviations over
seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from glue.scores import (
    PUBLISHED,
    Table,
    best_points,
    cells_of,
    italic,
    published_beside,
    titles_of,
)
from glue.settings import pooler_label
from ponet import PoolerConfig
from ponet.run.report import PLUS_MINUS, figure_text, markdown_table, scores_text

_BATCH_SIZE_NOTE = (
    "Each at the best learning rate. Published for BERT: CS475, one run each; MaxPoolBERT at batch "
    "size 32, mean of three seeds."
)
_MAXPOOL_BATCH_SIZE = 32
# of these the first that there is: linear layers on the first token without and with a projection
_BASELINES = ("first", "cls")
# Okabe and Ito's palette, told apart by colour-blind readers too; the marks differ as well
STYLES = (
    ("#0072B2", "o"),
    ("#009E73", "s"),
    ("#CC79A7", "^"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
PUBLISHED_STYLE: dict[str, Any] = {"color": "#D55E00", "marker": "D"}


def batch_size_tables(scores: Table) -> str:
    """A table for each encoder that several batch sizes were tried on."""
    titles, tables = titles_of(scores), []
    for encoder, best in best_points(scores, "batch_size").groupby("encoder", sort=False):
        if best["batch_size"].nunique() == 1:
            continue
        poolers = list(dict.fromkeys(best["pooler"]))
        cells = cells_of(best, "column", "batch_size", "pooler")
        rows = []
        for title in titles:
            for size in sorted(set(best["batch_size"][best["column"] == title])):
                rows.append([title, str(size), *(cells.get((title, size, p), "") for p in poolers)])
                published = [_published_at(title, size, pooler) for pooler in poolers]
                if any(published):
                    rows.append(italic([f"{title}, BERT", str(size), *published]))
        tables += [f"{encoder}:", markdown_table(["task", "batch size", *poolers], rows)]
    return "\n\n".join([_BATCH_SIZE_NOTE, *tables]) if tables else ""


def _published_at(title: str, batch_size: int, pooler: str) -> str:
    """Published figures of a pooler for BERT at a batch size."""
    return " / ".join(
        figure_text(row["figures"][title])
        for row in PUBLISHED
        if row["mixer"] == "attention"
        and pooler in row["poolers"]
        and title in row["figures"]
        and batch_size == row.get("batch_size", _MAXPOOL_BATCH_SIZE)
    )


def spread_table(scores: Table) -> str:
    """Standard deviations over seeds at the best points, beside published ones."""
    best = best_points(scores)
    groups = best.groupby(["model", "column"], sort=False)["value"]
    spreads = {key: values for key, values in groups if values.notna().sum() > 1}
    if not spreads:
        return ""
    titles = [title for title in titles_of(best) if any(title == t for _, t in spreads)]
    rows = []
    for model in dict.fromkeys(model for model, _ in spreads):
        found = [spreads.get((model, title)) for title in titles]
        rows.append([model, *("" if x is None else f"{x.std():.2f} ({x.count()})" for x in found)])
    for row in published_beside(best):
        if texts := row.get("spreads"):
            rows.append(italic([row["name"], *(figure_text(texts.get(t)) for t in titles)]))
    return markdown_table(["model", *titles], rows)


def by_layers(scores: Table) -> Table:
    """Best points of the poolers with several numbers of layers, `k`, as one `family` each."""
    default = PoolerConfig.num_layers
    configs = scores["pooler_config"]
    scores = scores.assign(
        k=[config.num_layers for config in configs],
        family=[pooler_label(replace(config, num_layers=default)) for config in configs],
    )
    several = scores.groupby(["encoder", "family"], sort=False)["k"].transform("nunique") > 1
    return best_points(scores[several])


def layers_tables(swept: Table) -> str:
    """A table for each encoder: a row per pooler and number of layers, published ones below."""
    tables = []
    for encoder, runs in swept.groupby("encoder", sort=False):
        titles, cells = titles_of(runs), cells_of(runs, "pooler", "column")
        rows = []
        for (family, k, pooler), _ in runs.groupby(["family", "k", "pooler"], sort=False):
            rows.append([family, str(k), *(cells.get((pooler, title), "") for title in titles)])
            published = [figure_text(_published_layers(pooler).get(title)) for title in titles]
            if any(published):
                rows.append(italic([f"{family}, BERT", str(k), *published]))
        tables += [f"{encoder}:", markdown_table(["pooler", "layers", *titles], rows)]
    return "\n\n".join(tables)


def _published_layers(pooler: str) -> dict[str, float]:
    """Published figures of a pooler, by title of a column, that are not of a batch size."""
    rows = [row for row in PUBLISHED if pooler in row["poolers"] and "batch_size" not in row]
    return next((row["figures"] for row in rows), {})


def draw_layers(swept: Table) -> Figure:
    """A panel per column: points over the fewest layers by their number, published ones, too."""
    titles = titles_of(swept)
    figure, (panels,) = _panels(1, titles)
    depths = sorted(set(swept["k"]))
    for axes, title in zip(panels, titles, strict=True):
        of_column = swept[swept["column"] == title]
        for name, style, runs in _lines(of_column, swept, "family"):
            least = runs["k"].min()
            gains = {k: _gains(x, runs[runs["k"] == least]) for k, x in runs.groupby("k")}
            _curve(axes, gains, name, *style)
            poolers = runs.drop_duplicates("k").set_index("k")["pooler"]
            figures: dict[int, Any] = {
                k: _published_layers(pooler).get(title) for k, pooler in poolers.items()
            }
            found = {k: x - figures[least] for k, x in figures.items() if x and figures[least]}
            if len(found) > 1:
                label = f"{runs['family'].iloc[0]}, BERT, published"
                axes.plot(*zip(*found.items(), strict=True), "--", label=label, **PUBLISHED_STYLE)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("last layers read")
        _finish(axes, depths)
    panels[0].set_ylabel(f"points over {depths[0]} {'layer' if depths[0] == 1 else 'layers'}")
    return _with_legend(figure)


def by_size(scores: Table) -> Table:
    """Best points of the models that learned a task from training sets of several sizes."""
    best = best_points(scores, "num_train")
    several = best.groupby(["model", "task"], sort=False)["num_train"].transform("nunique") > 1
    return best[several]


def _baseline(runs: Table) -> str | None:
    """The pooler that others are compared with."""
    return next((name for name in _BASELINES if name in set(runs["pooler"])), None)


def size_tables(sized: Table) -> str:
    """A table for each encoder: scores by size of the training set, and gains over the baseline."""
    tables = []
    for encoder, runs in sized.groupby("encoder", sort=False):
        poolers = list(dict.fromkeys(runs["pooler"]))
        baseline = _baseline(runs)
        others = [pooler for pooler in poolers if baseline and pooler != baseline]
        # the sizes are stated, so nothing is marked
        cells = cells_of(runs.assign(complete=True), "column", "num_train", "pooler")
        rows = []
        for title in titles_of(runs):
            of_column = runs[runs["column"] == title]
            for size, at in of_column.groupby("num_train"):
                by_pooler = dict(iter(at.groupby("pooler")))
                base = by_pooler.get(baseline)
                row = [title, f"{size:,}", *(cells.get((title, size, p), "") for p in poolers)]
                for other in others:
                    both = base is not None and other in by_pooler
                    row.append(_gain_text(_gains(by_pooler[other], base)) if both else "")
                rows.append(row)
        heads = [f"gain of {pooler}" for pooler in others]
        tables += [f"{encoder}:", markdown_table(["task", "examples", *poolers, *heads], rows)]
    return "\n\n".join(tables)


def draw_sizes(sized: Table) -> Figure:
    """A column of panels per task: scores above, gains over the baseline below, by examples."""
    titles = titles_of(sized)
    figure, (upper, lower) = _panels(2, titles)
    for above, below, title in zip(upper, lower, titles, strict=True):
        of_column = sized[sized["column"] == title]
        for name, style, runs in _lines(of_column, sized, "pooler"):
            of_size = dict(iter(runs.groupby("num_train")))
            _curve(above, {size: x["value"] for size, x in of_size.items()}, name, *style)
            rivals = of_column[of_column["encoder"] == runs["encoder"].iloc[0]]
            base = rivals[rivals["pooler"] == _baseline(rivals)]
            gains = {n: _gains(x, base[base["num_train"] == n]) for n, x in of_size.items()}
            # the baseline's are the line of no gain
            if not base.index.equals(runs.index):
                _curve(below, gains, name, *style)
        # without a baseline there are no gains
        below.set_visible(below.has_data())
        above.tick_params(labelbottom=not below.has_data())
        below.axhline(0, color="black", linewidth=0.8)
        for axes in (above, below):
            axes.set_xscale("log")
            _finish(axes, sorted(set(of_column["num_train"])))
        below.set_xlabel("training examples")
    upper[0].set_ylabel("%")
    lower[0].set_ylabel("points over the baseline")
    return _with_legend(figure)


def _gains(runs: Table, base: Table) -> pd.Series:
    """Differences to other runs with the same seeds, which saw the same examples."""
    return (runs.set_index("seed")["value"] - base.set_index("seed")["value"]).dropna()


def _gain_text(gains: pd.Series) -> str:
    if gains.empty:
        return ""
    return ("+" if gains.mean() >= 0 else "") + scores_text(list(gains))


def _lines(
    of_column: Table, all_runs: Table, field: str
) -> Iterator[tuple[str, tuple[str, str], Table]]:
    """Runs by encoder and `field`, with a name for a legend, a colour and a mark."""
    names = list(dict.fromkeys(zip(all_runs["encoder"], all_runs[field], strict=True)))
    has_one_encoder = all_runs["encoder"].nunique() == 1
    for (encoder, name), runs in of_column.groupby(["encoder", field], sort=False):
        style = STYLES[names.index((encoder, name)) % len(STYLES)]
        yield (name if has_one_encoder else f"{encoder}, {name}"), style, runs


def _panels(rows: int, titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    figure = Figure((1 + 3.2 * len(titles), 0.9 + 2.7 * rows))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, len(titles), squeeze=False, sharex="col")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title)
    return figure, panels


def _curve(axes: Any, values: dict[int, pd.Series], name: str, colour: str, marker: str) -> None:
    """Means by a number, with the standard deviation where there are several."""
    points = {number: x for number, x in values.items() if len(x) and x.notna().all()}
    if not points:
        return
    axes.errorbar(
        list(points),
        [x.mean() for x in points.values()],
        yerr=[x.std() if len(x) > 1 else 0.0 for x in points.values()],
        color=colour,
        marker=marker,
        capsize=3,
        label=name,
    )


def _finish(axes: Any, ticks: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:,}" for tick in ticks])
    axes.grid(alpha=0.3)


def _with_legend(figure: Figure) -> Figure:
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    legend = {label: handle for both in found for handle, label in zip(*both, strict=True)}
    figure.suptitle(f"mean {PLUS_MINUS} standard deviation over seeds")
    widest = max(map(len, legend), default=0)
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.08 * widest)))  # inches
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(legend) // columns))
    labels = (list(legend.values()), list(legend))
    figure.legend(*labels, loc="outside lower center", ncols=columns)
    return figure
