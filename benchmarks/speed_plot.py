"""Figures of a `speed_memory` record: training speed and peak memory, over length or as bars.

    python benchmarks/speed_plot.py benchmarks/results/cpu-2core_20261121.jsonl

draws the last record of each model in the file.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case_client import OUT_OF_MEMORY
from plot import PALETTE

from ponet.checkpoint import write_atomically

Row = dict[str, Any]

_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED = PALETTE
_GREY, _BLACK = "#7F7F7F", "#000000"

# (name in print, colour, marker, line); a colour is a family, markers and lines tell its members
_STYLES: dict[str, tuple[str, str, str, str]] = {
    "ponet": ("PoNet", _BLUE, "o", "-"),
    "ponet_eager": ("PoNet, published form", _SKY, "o", "--"),
    "fnet": ("FNet", _GREEN, "s", "-"),
    "attention": ("Transformer, SDPA", _RED, "^", "-"),
    "attention:flash": ("Transformer, SDPA flash", _RED, ">", "-."),
    "attention:cudnn": ("Transformer, SDPA cuDNN", _RED, "8", "-."),
    "attention_checkpointed": ("Transformer, published form", _RED, "v", "--"),
    "attention_naive": ("Transformer, naive", _RED, "<", ":"),
    "linear": ("Linear Transformer", _ORANGE, "D", "-"),
    "performer": ("Performer", _ORANGE, "P", "--"),
    "linformer": ("Linformer", _PINK, "X", "-"),
    "nystromformer": ("Nystromformer", _PINK, "d", "--"),
    "reformer": ("Reformer", _BLACK, "p", ":"),
    "longformer": ("Longformer", _GREY, "h", "-"),
    "bigbird": ("BigBird", _GREY, "*", "--"),
}
# a label takes this share of the height of a panel
_LABEL_HEIGHT = 0.041
_OUT_OF_MEMORY = ("x", "out of memory")
_NOT_RUN = ("o", "over the time budget, or failed")


def _style(mixer: str) -> tuple[str, str, str, str]:
    return _STYLES.get(mixer, (mixer, _GREY, ".", "-."))


def speed_of(row: Row) -> float | None:
    """Thousand tokens of training a second."""
    return row["train"]["tokens_per_s"] / 1e3 if row["train"] else None


def memory_of(row: Row) -> float | None:
    """Peak memory of a training step in MiB."""
    return row["train"]["peak_mib"] if row["train"] else None


_PANELS = (
    ("Training speed", "thousand tokens / s", speed_of),
    ("Peak memory of a training step", "MiB", memory_of),
)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move labels apart, as little as it takes.

    Args:
        places: where they would stand, in shares of the height.
        gap: smallest distance of two.

    Returns:
        Places in the order given.
    """
    order = sorted(range(len(places)), key=lambda number: places[number])
    groups: list[tuple[float, list[int]]] = []
    for number in order:
        centre, members = places[number], [number]
        # groups that would overlap become one, centred on the mean of its members
        while groups and _bottom(centre, members, gap) < _top(*groups[-1], gap):
            members = groups.pop()[1] + members
            centre = sum(places[member] for member in members) / len(members)
        groups.append((centre, members))
    moved = [0.0] * len(places)
    for centre, members in groups:
        for rank, member in enumerate(members):
            moved[member] = centre + (rank - (len(members) - 1) / 2) * gap
    return moved


def _bottom(centre: float, members: list[int], gap: float) -> float:
    return centre - len(members) * gap / 2


def _top(centre: float, members: list[int], gap: float) -> float:
    return centre + len(members) * gap / 2


def _length_name(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 1024 == 0 else f"{length:g}"


def _draw_lines(axes: Any, rows: list[Row], figure_of: Any, at_top: bool) -> dict[str, Any]:
    """Curves over the length; returns handles of the marks for what is missing."""
    from matplotlib.ticker import LogLocator

    lengths = sorted({row["seq_len"] for row in rows})
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: list[tuple[str, float, float]] = []
    for mixer in mixers:
        _, colour, marker, line = _style(mixer)
        found = [(r["seq_len"], figure_of(r)) for r in rows if r["mixer"] == mixer]
        points = [(x, y) for x, y in found if y]
        if not points:
            continue
        ours = mixer == "ponet"
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=2.8 if ours else 1.4,
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
        )
        ends.append((mixer, *points[-1]))
    axes.set_xticks(lengths, [_length_name(length) for length in lengths])
    axes.minorticks_off()
    # a tick a decade would be too few for panels that span one
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("tokens of a sequence")
    axes.grid(alpha=0.25)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    missing = [row for row in rows if not figure_of(row)]
    if missing and ends:
        _make_room(axes, at_top)
    _label_ends(axes, ends)
    return _mark_missing(axes, missing, at_top)


def _label_ends(axes: Any, ends: list[tuple[str, float, float]]) -> None:
    """Names beside the last points, to the right of the panel for curves that reach it."""
    from matplotlib.patheffects import withStroke

    # a name may lie over other curves
    halo = [withStroke(linewidth=3, foreground="white")]
    left, right = (math.log(value) for value in axes.get_xlim())
    low, high = (math.log(value) for value in axes.get_ylim())
    last = max((x for _, x, _ in ends), default=0)
    for length in {x for _, x, _ in ends}:
        group = [end for end in ends if end[1] == length]
        heights = [(math.log(y) - low) / (high - low) for _, _, y in group]
        places = spread(heights, _LABEL_HEIGHT)
        # names must not leave the panel at its foot or head
        lift = max(0.0, 0.02 - min(places)) - max(0.0, max(places) - 0.98)
        side = 1.03 if length == last else (math.log(length) - left) / (right - left) + 0.03
        for (mixer, x, y), place in zip(group, places, strict=True):
            name, colour, _, _ = _style(mixer)
            axes.annotate(
                name,
                xy=(x, y),
                xytext=(side, place + lift),
                textcoords="axes fraction",
                color=colour,
                fontsize=9,
                fontweight="bold" if mixer == "ponet" else "normal",
                verticalalignment="center",
                path_effects=halo,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5},
            )


def _make_room(axes: Any, at_top: bool) -> None:
    """A strip at the edge of the panel for marks of what is missing."""
    low, high = axes.get_ylim()
    strip = (high / low) ** 0.15
    axes.set_ylim((low, high * strip) if at_top else (low / strip, high))


def _mark_missing(axes: Any, rows: list[Row], at_top: bool) -> dict[str, Any]:
    """A mark at the edge of the panel for each case without a figure; handles by meaning."""
    seen: dict[int, int] = {}
    handles: dict[str, Any] = {}
    for row in rows:
        marker, meaning = _OUT_OF_MEMORY if row["status"] == OUT_OF_MEMORY else _NOT_RUN
        number = seen.get(row["seq_len"], 0)
        seen[row["seq_len"]] = number + 1
        (handles[meaning],) = axes.plot(
            row["seq_len"],
            (0.975 - 0.035 * number) if at_top else (0.025 + 0.035 * number),
            transform=axes.get_xaxis_transform(),
            color=_style(row["mixer"])[1],
            marker=marker,
            markerfacecolor="none",
            markersize=6,
            markeredgewidth=1.6,
            linestyle="none",
        )
    return handles


def _draw_bars(axes: Any, rows: list[Row], figure_of: Any) -> None:
    largest = max((figure_of(row) or 0.0 for row in rows), default=0.0) or 1.0
    for place, row in enumerate(rows):
        value = figure_of(row)
        colour = _style(row["mixer"])[1]
        if value:
            axes.barh(place, value, color=colour, height=0.7)
            text = f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
        else:
            text = row["status"]
        axes.text(
            (value or 0.0) + 0.015 * largest,
            place,
            text,
            fontsize=9,
            fontweight="bold" if row["mixer"] == "ponet" else "normal",
            color=_BLACK if value else colour,
            verticalalignment="center",
        )
    axes.set_yticks(range(len(rows)), [_style(row["mixer"])[0] for row in rows])
    axes.set_xlim(0, 1.18 * largest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    # from the top down, with room for the last one where it has no bar
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _title(record: Row) -> str:
    card, row = record["card"], record["rows"][0]
    model = {"lra": "Long Range Arena text classifier", "base": "base encoder with masked-LM head"}
    where = card.get("cpu", card["device"])
    if "threads" in card:
        where += f", {card['threads']} threads"
    return (
        f"{model[row['model']]}, batch of {card['batch']}, {card['dtype']}\n"
        f"{where}, torch {card['torch']}, commit {card['commit']}, {card['date']}"
    )


def draw(record: Row, path: Path) -> Path | None:
    """Draw one record: lines over the length, or bars when it holds one length.

    Args:
        record: as `speed_memory.py` prints it.
        path: the PNG to write.

    Returns:
        `path`, or None when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    rows = record["rows"]
    over_length = len({row["seq_len"] for row in rows}) > 1
    height = 6.0 if over_length else 2.0 + 0.36 * len(rows)
    figure = Figure(figsize=(14, height), layout="constrained")
    marks: dict[str, Any] = {}
    for number, (axes, (title, unit, figure_of)) in enumerate(
        zip(figure.subplots(1, 2), _PANELS, strict=True)
    ):
        axes.spines[["top", "right"]].set_visible(False)
        if over_length:
            marks |= _draw_lines(axes, rows, figure_of, at_top=number == 1)
            axes.set_ylabel(unit)
        else:
            _draw_bars(axes, rows, figure_of)
            axes.set_xlabel(unit)
            title += f", {rows[0]['seq_len']:,} tokens a sequence"
        axes.set_title(title, loc="left")
    figure.suptitle(_title(record), fontsize=10)
    if marks:
        legend = {"loc": "outside lower center", "ncols": len(marks), "fontsize": 9}
        figure.legend(list(marks.values()), list(marks), frameon=False, **legend)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return path


def main() -> None:
    """Draw the figures of a results file."""
    parser = argparse.ArgumentParser(description="figures of speed_memory records")
    parser.add_argument("file", type=Path, help="a JSONL file that speed_memory.py wrote")
    path = parser.parse_args().file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {r["card"]["model"]: r for r in records if r.get("benchmark") == "speed_memory"}
    if not last:
        parser.error(f"{path}: holds no record of speed_memory")
    for model, record in last.items():
        image = draw(record, path.with_name(f"{path.stem}_speed_memory_{model}.png"))
        if image is None:
            sys.exit("speed_plot: matplotlib is missing, pip install matplotlib")
        print(image)


if __name__ == "__main__":
    main()
