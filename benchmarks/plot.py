"""Figures of `speed_memory` records, made from a file of results alone.

    python benchmarks/plot.py benchmarks/results/cpu-2core_20261121.jsonl

draws the last record of each model, a PNG beside the file.
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
# title, unit, figure and scale of the panels of `speed_memory`
_PANELS = (
    ("Training speed", "thousand tokens / s", "tokens_per_s", 1e-3),
    ("Peak memory of a training step", "MiB", "peak_mib", 1.0),
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
        timed = [row for row in ours if row["train"]]
        lengths = [row["seq_len"] for row in timed]
        values = [row["train"][key] * scale for row in timed]
        single = [n for n, row in enumerate(timed) if row["train"]["warm_up_only"]]
        look = {"color": colour, "marker": marker, "ls": line}
        look |= {"lw": 2.8 if mixer == "ponet" else 1.4, "label": name + "".join(missing[:1])}
        axes.plot(lengths, values, **look)
        hollow = {"color": colour, "marker": marker, "mfc": "white", "ls": ""}
        axes.plot([lengths[n] for n in single], [values[n] for n in single], **hollow)
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


def _draw(figure: Any, record: Row) -> None:
    """Training speed and peak memory, over the length or as bars when there is one length."""
    rows, card = record["rows"], record["card"]
    over_length = len({row["seq_len"] for row in rows}) > 1
    figure.set_size_inches(14, 6.0 if over_length else 2.0 + 0.36 * len(rows))
    panels = figure.subplots(1, 2)
    for axes, (title, unit, key, scale) in zip(panels, _PANELS, strict=True):
        (_lines if over_length else _bars)(axes, rows, key, scale)
        axes.set_title(f"{title}, {unit}", loc="left")
    if over_length:
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside right center", frameon=False, fontsize=9)
    length = "" if over_length else f"{rows[0]['seq_len']:,} tokens per sequence, "
    threads = f", {card['threads']} threads" if "threads" in card else ""
    single = any(row["train"] and row["train"]["warm_up_only"] for row in rows)
    figure.suptitle(
        f"{_MODELS[card['model']]}, {length}batch of {card['batch']}, {card['dtype']}\n"
        f"{card.get('cpu', card['device'])}{threads}, torch {card['torch']}, "
        f"commit {card['commit']}, {card['date']}"
        + ("\nhollow or pale: time was short, a single step" if single else ""),
        fontsize=10,
    )


def draw_record(record: Row, path: Path) -> None:
    """Draw one record of `speed_memory` to a PNG."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure without matplotlib; benchmarks/plot.py draws it elsewhere from the file")
        return
    figure = Figure(layout="constrained")
    _draw(figure, record)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    print(f"written: {path}")


def main() -> None:
    """Draw the figures of a file of results."""
    parser = argparse.ArgumentParser(description="figures of a file of results")
    parser.add_argument("file", type=Path, help="a JSONL file that a benchmark wrote")
    parser.add_argument(
        "--output", type=Path, default=RUNS, metavar="DIR", help=f"folder of the figures [{RUNS}]"
    )
    options = parser.parse_args()
    path = options.file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    # not every record is of this benchmark
    found = [record for record in records if record.get("benchmark") == "speed_memory"]
    if not found:
        parser.error(f"{path}: holds no record of speed_memory")
    for model, record in {record["card"]["model"]: record for record in found}.items():
        image = options.output / f"{path.stem}_speed_memory_{model}.png"
        draw_record(record, image)


if __name__ == "__main__":
    main()
