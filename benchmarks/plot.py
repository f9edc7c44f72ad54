"""Figures made from the results files alone.

    python benchmarks/plot.py benchmarks/results/cpu-2core_20261121.jsonl

draws the last record of each benchmark that has a figure, `FILE_BENCHMARK.png` beside the file.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ponet.checkpoint import write_atomically

Row = dict[str, Any]

# Okabe and Ito's palette, told apart by colour-blind readers too
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def _grouped_bars(axes: Any, groups: list[str], series: dict[str, list[float | None]]) -> None:
    """Bars of each series side by side in groups, the figure at the end of each bar."""
    height = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        places = [group + number * height for group in range(len(groups))]
        found = [(place, value) for place, value in zip(places, values, strict=True) if value]
        bars = axes.barh(
            [place for place, _ in found],
            [value for _, value in found],
            height=height,
            align="edge",
            color=PALETTE[number % len(PALETTE)],
            label=name,
        )
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9, bbox=box)
    axes.set_yticks([group + 0.4 for group in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _series(rows: list[Row], parts: list[str], figure: Callable[[Row], float | None]) -> Any:
    """A series a batch size: the figure of each part, None where there is none."""
    series: dict[str, list[float | None]] = {}
    for row in rows:
        name = f"{row['batch_size']} x {row['seq_len']} tokens"
        values = series.setdefault(name, [None] * len(parts))
        if row["part"] in parts:
            values[parts.index(row["part"])] = figure(row)
    return series


def _draw_op_speed(figure: Any, record: Row) -> None:
    """A row of panels a dtype: speed-up over the published form, and share of the copy rate."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    shape = record["rows"][0]["segments"]
    panels = figure.subplots(len(dtypes), 2, squeeze=False)
    for (left, right), dtype in zip(panels, dtypes, strict=True):
        rows = [
            row
            for row in record["rows"]
            if (row["dtype"], row["segments"], row["mode"]) == (dtype, shape, "fwd+bwd")
        ]
        parts = list(dict.fromkeys(row["part"] for row in rows))
        _grouped_bars(left, parts, _series(rows, parts, lambda row: row["over_ours"]["public"]))
        left.axvline(1, color="black", linewidth=0.8)
        left.set_xlabel("time of public / time of ours, forward + backward")
        left.set_title(f"Speed-up over the published form, {dtype}")
        left.legend(title="batch", fontsize=9)
        moved = [row for row in rows if row["copy_share"]]
        parts = list(dict.fromkeys(row["part"] for row in moved))
        share = _series(moved, parts, lambda row: 100 * row["copy_share"])
        _grouped_bars(right, parts, share)
        right.axvline(100, color="black", linewidth=0.8)
        right.set_xlabel("rate of ours / rate of a copy of as many bytes, %")
        right.set_title(f"Bytes that must be moved, {dtype}")
    card = record["card"]
    figure.suptitle(
        f"PoNet operators on {card['device']}, segments {shape}, commit {card['commit']}, "
        f"{card['date']}"
    )


FIGURES: dict[str, Callable[[Any, Row], None]] = {"op_speed": _draw_op_speed}
"""How a record is drawn, by its `benchmark`."""


def draw_record(record: Row, path: Path) -> Path | None:
    """Draw one record.

    Args:
        record: as in a results file.
        path: the PNG to write.

    Returns:
        `path`, or None when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    num_dtypes = len({row["dtype"] for row in record["rows"]})
    figure = Figure(figsize=(13, 1 + 4.5 * num_dtypes), layout="constrained")
    FIGURES[record["benchmark"]](figure, record)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path


def main() -> None:
    """Draw the figures of a results file."""
    parser = argparse.ArgumentParser(description="figures of a results file")
    parser.add_argument("file", type=Path, help="a JSONL file that a benchmark wrote")
    path = parser.parse_args().file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {record["benchmark"]: record for record in records if record["benchmark"] in FIGURES}
    if not last:
        parser.error(f"{path}: holds no record of {', '.join(FIGURES)}")
    for name, record in last.items():
        image = draw_record(record, path.with_name(f"{path.stem}_{name}.png"))
        if image is None:
            sys.exit("plot: matplotlib is missing, pip install matplotlib")
        print(image)


if __name__ == "__main__":
    main()
