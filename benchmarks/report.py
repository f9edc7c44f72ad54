"""What a benchmark of operators says: its card, its tables, and the files it leaves."""

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from layouts import SHAPES
from plot import draw_record
from records import append_record, cpu_name, gpu_driver, triton_version

from ponet.run.device import source_commit
from ponet_kernels import active_backend

Row = dict[str, Any]

_TIMED = ("ours", "public", "compiled")


def describe(options: argparse.Namespace) -> Row:
    """The card: what the figures depend on."""
    cores = len(os.sched_getaffinity(0))
    if options.device == "cuda":
        machine = {
            "device": torch.cuda.get_device_name(),
            "driver": gpu_driver(),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    else:
        machine = {"device": f"cpu-{cores}core", "cpu": cpu_name()}
        machine["threads"] = str(torch.get_num_threads())
        machine["clock"] = "time that the process works" if options.cpu_time else "wall"
    return {
        **machine,
        "cores": cores,
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": source_commit(),
        "date": datetime.date.today().isoformat(),
        "backend": active_backend(options.device),
        "dtype": " ".join(options.dtype),
        "width": options.width,
        "heads": options.heads,
        "segments": "; ".join(f"{name}: {SHAPES[name]}" for name in options.segments),
        "ties": "ours first maximum, public even split; inputs of single operators have none",
        "seed": options.seed,
        "command": shlex.join(["python", *sys.argv]),
    }


def print_card(card: Row) -> None:
    """A fact a line."""
    for name, value in card.items():
        if name == "copy_gb_per_s":
            value = f"{value:.1f}, read and written"
        elif name == "matmul_tflop_per_s":
            value = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in value.items())
        print(f"{name:>18}: {value}")


class Table:
    """Timings, printed while they come in."""

    def __init__(self, parts: list[str]) -> None:
        self._width = max(len(part) for part in parts)
        self._started = False

    def _start(self) -> None:
        if not self._started:
            self._started = True
            print(
                f"\n{'part':{self._width}} {'dtype':8} {'segments':9} {'batch x tokens':>14} "
                f"{'mode':8} {'ours ms':>9} {'p20':>9} {'p80':>9} {'again':>6} {'others':>6} "
                f"{'public ms':>9} {'x':>6} {'compiled':>9} {'x':>6} {'GB/s':>6} {'% copy':>6}"
            )

    def print_failure(self, row: Row) -> None:
        """A line that says why there is no figure."""
        self._start()
        print(f"{self._what(row)} failed: {row['reason']}", flush=True)

    def print_rows(self, rows: list[Row]) -> None:
        """A line a row, and below what the row has besides the usual columns."""
        self._start()
        for row in rows:
            print(self._line(row))
            for name, ratio in row["over_ours"].items():
                if name not in ("again", *_TIMED):
                    print(f"    {name}: {row['ms'][name]:.3f} ms, {ratio:.2f} times ours")
        for name, reason in rows[-1]["notes"].items():
            print(f"    {name}: not timed, {reason}")
        sys.stdout.flush()

    def _what(self, row: Row) -> str:
        batch = f"{row['batch_size']} x {row['seq_len']}"
        return f"{row['part']:{self._width}} {row['dtype']:8} {row['segments']:9} {batch:>14}"

    def _line(self, row: Row) -> str:
        ms, over = row["ms"], row["over_ours"]
        cells = [
            self._what(row),
            f"{row['mode']:8} {ms['ours']:9.3f} {row['p20_ms']['ours']:9.3f}",
            f"{row['p80_ms']['ours']:9.3f} {over['again']:6.2f} {row['other_cores']:6.1f}",
        ]
        for name in ("public", "compiled"):
            cells.append(
                f"{ms[name]:9.3f} {over[name]:6.2f}" if name in ms else f"{'-':>9} {'-':>6}"
            )
        if row["copy_share"] is not None:
            rate = row["bytes"] / ms["ours"] / 1e6
            cells.append(f"{rate:6.1f} {100 * row['copy_share']:6.1f}")
        return " ".join(cells)


def print_memory(memory: list[Row]) -> None:
    """Peak memory of the forms side by side."""
    if memory:
        print("\npeak memory of the sub-layer, forward + backward, above the start, MiB")
    for row in memory:
        figures = "  ".join(f"{form} {mib:,.0f}" for form, mib in row["mib"].items())
        print(f"  {row['batch_size']} x {row['seq_len']} {row['dtype']}: {figures}")


def save(record: Row, folder: Path) -> None:
    """Append the record to the file of the device and day, and draw it beside."""
    path = append_record(record, folder)
    print(f"\nwritten: {path}")
    if not record["rows"]:
        return
    image = draw_record(record, path.with_name(f"{path.stem}_{record['benchmark']}.png"))
    if image:
        print(f"written: {image}")
    else:
        print("no plot: install matplotlib (pip install matplotlib), then run benchmarks/plot.py")
    print()
