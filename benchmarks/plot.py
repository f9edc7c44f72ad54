"""Figures of `speed_memory` records, made from a file of results alone.

    python benchmarks/plot.py benchmarks/results/cpu-2core_20261121.jsonl

draws each of them to a PNG, whose name has the line of the record in the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RUNS, Row
from ponet.files import write_atomically

# Okabe and Ito's palette, told apart by colour-blind readers too
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_PINK, _SKY, _RED = "#CC79A7", "#56B4E9", "#D55E00"
_GREY, _BLACK = "#7F7F7F", "#000000"
# (name in print, colour, marker, line); a colour is a family, markers and lines tell its members
_STYLES: dict[str, tuple[str, str, str, str]] = {
    "ponet": ("PoNet", _BLUE, "o", "-"),
    "ponet_published": ("PoNet, published form", _SKY, "o", "--"),
    # its name in older records
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
_MODELS = {
    "lra": "Long Range Arena text classifier",
    "base": "base encoder with masked-LM head",
    "pretraining": "pre-training step of the base encoder",
}
# title, figure and scale of the panels
_PANELS = (
    ("Training speed, thousand tokens / s", "tokens_per_s", 1e-3),
    ("Peak memory of a training step, MiB", "peak_mib", 1.0),
)


def _style(mixer: str) -> tuple[str, str, str, str]:
    """A mixer without an entry of its own has a style, too."""
    return _STYLES.get(mixer, (mixer, _GREY, ".", "-."))


def _lines(axes: Any, rows: list[Row], key: str, scale: float) -> None:
    """Curves over the length; a hollow mark is a figure of a single step."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        name, colour, marker, line = _style(mixer)
        ours = [row for row in rows if row["mixer"] == mixer]
        missing = [f" ({row['status']})" for row in ours if not row["train"]]
        timed = [(row["seq_len"], row["train"]) for row in ours if row["train"]]
        values = [train[key] * scale for _, train in timed]
        look = {"color": colour, "marker": marker, "lw": 2.8 if mixer == "ponet" else 1.4}
        label = name + "".join(missing[:1])
        axes.plot([length for length, _ in timed], values, ls=line, label=label, **look)
        for (length, train), value in zip(timed, values, strict=True):
            if train["warm_up_only"]:
                axes.plot(length, value, mfc="white", **look)
    lengths = sorted({row["seq_len"] for row in rows})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    # a tick per decade would be too few for panels that span one
    axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("tokens of a sequence")
    axes.grid(alpha=0.25)


def _bars(axes: Any, rows: list[Row], key: str, scale: float) -> None:
    """A bar per mixer; a pale one is a figure of a single step."""
    for place, row in enumerate(rows):
        value, text = 0.0, row["status"]
        if row["train"]:
            value, single = row["train"][key] * scale, row["train"]["warm_up_only"]
            text = f"{value:,.4g}" + (" (a single step)" if single else "")
            alpha = 0.5 if single else 1.0
            axes.barh(place, value, color=_style(row["mixer"])[1], height=0.7, alpha=alpha)
        axes.text(value, place, f" {text}", fontsize=9, verticalalignment="center")
    axes.set_yticks(range(len(rows)), [_style(row["mixer"])[0] for row in rows])
    axes.margins(x=0.2)
    axes.invert_yaxis()


def draw_record(record: Row, file: Path, line: int, folder: Path) -> None:
    """Draw one record of `speed_memory`, from that line of a file, to a PNG in a folder.

    Training speed and peak memory, over the length or as bars when there is one length.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure without matplotlib; benchmarks/plot.py draws it elsewhere from the file")
        return
    rows, card = record["rows"], record["card"]
    over_length = len({row["seq_len"] for row in rows}) > 1
    height = 6.0 if over_length else 2.0 + 0.36 * len(rows)
    figure = Figure(layout="constrained", figsize=(14, height))
    panels = figure.subplots(1, 2)
    for axes, (title, key, scale) in zip(panels, _PANELS, strict=True):
        (_lines if over_length else _bars)(axes, rows, key, scale)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    if over_length:
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside right center", frameon=False, fontsize=9)
    length = "" if over_length else f"{rows[0]['seq_len']:,} tokens per sequence, "
    single = any(row["train"] and row["train"]["warm_up_only"] for row in rows)
    figure.suptitle(
        f"{_MODELS[card['model']]}, {length}batch of {card['batch']}, {card['dtype']}\n"
        f"{card.get('cpu', card['device'])}, torch {card['torch']}, commit {card['commit']}, "
        f"{card['date']}" + ("\nhollow or pale: time was short, a single step" if single else ""),
        fontsize=10,
    )
    path = folder / f"{file.stem}_{line}_speed_memory_{card['model']}.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    print(f"written: {path}")


def main() -> None:
    """Draw the figures of a file of results."""
    parser = argparse.ArgumentParser(description="figures of a file of results")
    parser.add_argument("file", type=Path, help="a JSONL file that a benchmark wrote")
    folder: Row = {"type": Path, "default": RUNS, "metavar": "DIR"}
    parser.add_argument("--output", **folder, help=f"folder of the figures [{RUNS}]")
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"{options.file}: no such file")
    records = map(json.loads, options.file.read_text(encoding="utf-8").splitlines())
    # not every record is of this benchmark
    found = [(n, r) for n, r in enumerate(records, 1) if r.get("benchmark") == "speed_memory"]
    if not found:
        parser.error(f"{options.file}: holds no record of speed_memory")
    for line, record in found:
        draw_record(record, options.file, line, options.output)


if __name__ == "__main__":
    main()
