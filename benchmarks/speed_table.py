"""Ratios between token mixers, the exponents of their times, and the table that shows both."""

import sys
from collections.abc import Sequence
from typing import Any

from case_client import OK
from published import published_memory_ratio, published_speed_up
from rounds import exponent
from workloads import FORCED, SDPA

Row = dict[str, Any]

TRANSFORMER = "attention_checkpointed"
"""The Transformer as the published comparison ran it."""
EXPONENT_RANGE = (1024, 4096)
"""Lengths between which the growth of time is fitted, in tokens."""


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _steps_per_s(row: Row | None, kind: str) -> float | None:
    return row[kind]["steps_per_s"] if row and row[kind] else None


def _activation_mib(row: Row | None) -> float | None:
    """Memory of a training step beyond weights, gradients and moments, in MiB."""
    if row is None or row["train"] is None:
        return None
    return max(row["train"]["peak_mib"] - row["state_mib"], 0.0)


def against(row: Row, baseline: Row | None) -> Row:
    """Speed and memory of a row over those of a baseline of the same length; None where unknown."""
    return {
        "speed": _ratio(_steps_per_s(row, "train"), _steps_per_s(baseline, "train")),
        "infer_speed": _ratio(_steps_per_s(row, "infer"), _steps_per_s(baseline, "infer")),
        "memory": _ratio(_activation_mib(row), _activation_mib(baseline)),
    }


def fastest_sdpa(rows: Sequence[Row], kind: str) -> Row | None:
    """The Transformer on whichever fused kernel is fastest, of rows of one length.

    Args:
        rows: of any mixers.
        kind: train or infer.
    """
    forms = [row for row in rows if row["mixer"] in (SDPA, *FORCED)]
    return max(forms, key=lambda row: _steps_per_s(row, kind) or 0.0, default=None)


def add_ratios(rows: list[Row]) -> None:
    """Give the rows of one length their ratios to both Transformers, and the published ones."""
    by_mixer = {row["mixer"]: row for row in rows}
    for row in rows:
        row["over_transformer"] = against(row, by_mixer.get(TRANSFORMER))
        row["over_sdpa"] = against(row, fastest_sdpa(rows, "train"))
        row["over_sdpa"]["infer_speed"] = against(row, fastest_sdpa(rows, "infer"))["infer_speed"]
        published = row["model"] == "lra"
        mixer, length = row["mixer"], row["seq_len"]
        row["published"] = {
            "speed": published_speed_up(mixer, length) if published else None,
            "memory": published_memory_ratio(mixer, length) if published else None,
        }


def exponents(rows: Sequence[Row], mixers: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Growth of time over length between 1024 and 4096 tokens, at one batch size.

    Args:
        rows: of all lengths.
        mixers: names wanted.

    Returns:
        For each mixer the exponents of training and inference; None with fewer than two lengths.
    """
    low, high = EXPONENT_RANGE
    found: dict[str, dict[str, float | None]] = {}
    for mixer in mixers:
        fitting = [r for r in rows if r["mixer"] == mixer and low <= r["seq_len"] <= high]
        found[mixer] = {
            # at constant tokens a batch, time a sequence grows as time does at a constant batch
            kind: exponent(
                [(r["seq_len"], r[kind]["ms"] / r["batch_size"]) for r in fitting if r[kind]]
            )
            for kind in ("train", "infer")
        }
    return found


def _cell(value: float | None, width: int, pattern: str) -> str:
    return f"{value:{width}{pattern}}" if value is not None else f"{'-':>{width}}"


def _times(value: float | None) -> str:
    return f"{value:6.2f}" if value is not None else f"{'-':>6}"


class Table:
    """A line a mixer and length, printed when a length is done."""

    def __init__(self, mixers: Sequence[str], published: bool) -> None:
        self._width = max([5, *(len(mixer) for mixer in mixers)])
        self._published = published

    def print_head(self) -> None:
        """Names and units of the columns."""
        w = self._width
        extra = "  publ." if self._published else ""
        wide = 25 if self._published else 13
        print(
            f"\n{'':{7 + w}} {'training step':^57} {'inference':^17}"
            f"  {'over Transformer':^{wide + (1 if self._published else 0)}}  {'over SDPA':^20}"
        )
        print(
            f"{'tokens':>6} {'mixer':{w}} {'n':>3} {'ms':>9} {'p20':>9} {'p80':>9} {'steps/s':>8} "
            f"{'k tok/s':>8} {'MiB':>7} {'k tok/s':>9} {'MiB':>7}"
            f"  {'speed':>6}{extra} {'memory':>6}{extra}  {'speed':>6} {'infer':>6} {'memory':>6}"
        )

    def print_rows(self, rows: Sequence[Row]) -> None:
        """The rows of one length."""
        for row in rows:
            print(self._line(row))
        sys.stdout.flush()

    def _line(self, row: Row) -> str:
        name = f"{row['seq_len']:6} {row['mixer']:{self._width}}"
        infer = row["infer"] or {}
        rate = infer.get("tokens_per_s")
        inference = (
            f"{_cell(rate and rate / 1e3, 9, ',.1f')} {_cell(infer.get('peak_mib'), 7, ',.0f')}"
        )
        if row["train"] is None:
            what = row["status"] + (" in training" if row["infer"] else "")
            return f"{name} {what:>57} {inference}" + self._why(row)
        t = row["train"]
        sign = "~" if t["warm_up_only"] else " "
        return (
            f"{name} {t['steps']:3} {t['ms']:9,.1f}{sign}{t['p20_ms']:8,.1f} {t['p80_ms']:9,.1f} "
            f"{t['steps_per_s']:8.3g} {t['tokens_per_s'] / 1e3:8,.1f} {t['peak_mib']:7,.0f} "
            f"{inference}{self._ratios(row)}"
        ) + (f"  stopped: {row['status']}" if row["status"] != OK else "")

    def _ratios(self, row: Row) -> str:
        first, second, published = row["over_transformer"], row["over_sdpa"], row["published"]
        speed, memory = _times(first["speed"]), _times(first["memory"])
        if self._published:
            speed += f" {_times(published['speed'])}"
            memory += f" {_times(published['memory'])}"
        others = " ".join(_times(second[key]) for key in ("speed", "infer_speed", "memory"))
        return f"  {speed} {memory}  {others}"

    def _why(self, row: Row) -> str:
        reason = row["reason"] or ""
        return f"  {reason[:90]}" if reason else ""


def print_notes(rows: Sequence[Row]) -> None:
    """What the columns mean."""
    print(
        "\nn: timed steps; MiB: peak of a step, with weights, gradients, moments and inputs.\n"
        f"over Transformer: against {TRANSFORMER}, float32 and activation checkpointing as "
        "published;\nmemory there is that beyond weights, gradients and moments."
    )
    if any(row["train"] and row["train"]["warm_up_only"] for row in rows):
        print("~ the first step, for which there was time only.")


def print_exponents(found: dict[str, dict[str, float | None]], lengths: Sequence[int]) -> None:
    """The growth of time over those of the lengths that it was fitted to."""
    if not any(value is not None for kinds in found.values() for value in kinds.values()):
        return
    low, high = EXPONENT_RANGE
    fitted = " ".join(str(length) for length in lengths if low <= length <= high)
    print(f"\nexponent of the time of a sequence over its length, fitted at {fitted} tokens")
    print(f"{'':{max(len(mixer) for mixer in found)}} {'training':>9} {'inference':>9}")
    for mixer, kinds in found.items():
        cells = " ".join(_cell(kinds[kind], 9, ".2f") for kind in ("train", "infer"))
        print(f"{mixer:{max(len(name) for name in found)}} {cells}")
