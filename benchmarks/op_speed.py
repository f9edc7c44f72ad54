"""Speed of the PoNet operators beside the published form and a copy of their bytes.

    python benchmarks/op_speed.py                                    # sizes that fit the device
    python benchmarks/op_speed.py --seq-len 512 --operators mixer
    python benchmarks/op_speed.py --seq-len 4096 --segments text ones documents
    python benchmarks/op_speed.py --until check --dtype float32 float64 bfloat16 float16

Implementations take turns in one process: `ours`; `again`, ours a second time, because differences
smaller than between the two are noise; `published`, in eager PyTorch; for the sub-layer softmax
attention in its place. Outputs and gradients of ours are checked
before anything is timed, and two runs of it bit by bit; what is wrong or fails is named instead of
timed, the rest is measured, and the exit status is 1. "% copy" is the rate at which ours moves the
bytes it must move, as a share of what a copy of as many bytes reaches in the same turns; both
directions of a copy count.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

if not __package__:
    # run as a program: this checkout in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from benchmarks.common import NUMBER, Row, first_line, percentiles
from benchmarks.operators import (
    OPERATORS,
    PER_SEGMENT,
    SHAPES,
    Batch,
    CheckError,
    Comparison,
    Implementation,
    check,
    compare,
)
from ponet.run.device import matmul_rate

try:
    from triton.errors import TritonError
except ModuleNotFoundError:
    _COMPILER: tuple[type[Exception], ...] = ()
else:
    _COMPILER = (TritonError,)

FAILURES = (CheckError, LookupError, RuntimeError, TypeError, ValueError, *_COMPILER)
"""What one operator can fail with while others may still run: figures, PyTorch, a compiler."""
COPY = "copy"

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_GPU_TOKENS = 65536
# a turn of an implementation lasts about this long, so that short calls are measured many times
_TURN_MS, _MOST_CALLS = 20.0, 50


def parse_options() -> argparse.Namespace:
    """Flags, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description="speed of the PoNet operators, checked first")
    add = parser.add_argument
    add("--until", choices=("card", "check", "time"), default="time", help="how far to go [time]")
    add("--seq-len", nargs="+", default=[512, 4096], **NUMBER, help="tokens [512 4096]")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tokens", **NUMBER, help="of a batch [GPU: 65536]")
    size.add_argument("--batch-size", **NUMBER, help="sequences [CPU: 1]")
    add("--width", default=768, **NUMBER)
    add("--heads", default=12, **NUMBER)
    add("--segments", nargs="+", choices=SHAPES, help="[CPU: text; GPU: text ones documents]")
    add("--dtype", nargs="+", choices=_DTYPES, help="[CPU: float32; GPU: bfloat16 float32]")
    add("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    add("--repeats", default=5, **NUMBER, help="turns of each implementation [5]")
    options = common.parse_flags(parser)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or (["bfloat16", "float32"] if on_gpu else ["float32"])
    options.segments = options.segments or (["text", "ones", "documents"] if on_gpu else ["text"])
    if options.tokens is None and options.batch_size is None and on_gpu:
        options.tokens = max(_GPU_TOKENS, *options.seq_len)
    if min(options.seq_len) < 8:
        parser.error(f"--seq-len must be at least 8, found {min(options.seq_len)}")
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if options.tokens is not None and options.tokens < max(options.seq_len):
        parser.error(f"--tokens {options.tokens} is less than --seq-len {max(options.seq_len)}")
    return options


def batches(options: argparse.Namespace) -> Iterator[Batch]:
    """All batches, one at a time."""
    for dtype in options.dtype:
        for length in options.seq_len:
            for shape in options.segments:
                size = options.tokens // length if options.tokens else options.batch_size or 1
                yield Batch(
                    segments=shape,
                    batch_size=size,
                    seq_len=length,
                    width=options.width,
                    num_heads=options.heads,
                    dtype=getattr(torch, dtype),
                    device=torch.device(options.device),
                    seed=options.seed,
                )


def time_in_turns(
    implementations: list[Implementation],
    device: torch.device,
    repeats: int,
    backward: bool,
    drop: Callable[[str, str], None] | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Median, 20th and 80th percentile of the milliseconds of a call, by name.

    Args:
        implementations: to be timed; the first of them must run.
        device: where they run.
        repeats: turns of each; a GPU has the time of its own and needs none.
        backward: forward and backward pass, or forward alone.
        drop: called with the name of a later one that cannot run, and the reason; it is then left
            out. None: nothing may fail.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for one in implementations:
        call = one.run if backward and one.name != COPY else one.forward
        try:
            call()
        # out of memory, or no such attention kernel
        except RuntimeError as error:
            if drop is None or one is implementations[0]:
                raise
            drop(one.name, first_line(error))
            continue
        calls[one.name] = call
    if device.type == "cuda":
        from triton.testing import do_bench

        # by events, with the cache cleared before each call, as it would be in a model
        shares = (0.5, 0.2, 0.8)
        return {name: cast(Any, do_bench(c, quantiles=shares)) for name, c in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name] += _turn(call)
    return {name: percentiles(found) for name, found in samples.items()}


def _turn(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of each of some calls, without the first, which finds another's caches."""
    found: list[float] = []
    calls = 1
    while len(found) <= calls:
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
        calls = int(min(max(_TURN_MS / found[0], 1), _MOST_CALLS))
    return found[1:]


def copy_of(num_bytes: int, device: torch.device) -> Implementation:
    """A copy that moves so many bytes, half of them read and half written."""
    half = max(num_bytes // 2 // 4, 1)
    source, target = torch.randn(half, device=device), torch.zeros(half, device=device)
    return Implementation(COPY, lambda _: target.copy_(source), {})


def ceilings(options: argparse.Namespace) -> Row:
    """What the device reaches at best: rates of a large copy and of matrix products."""
    device = torch.device(options.device)
    num_bytes = 2**28 if device.type == "cpu" else 2**32
    copy_ms, _, _ = time_in_turns([copy_of(num_bytes, device)], device, 5, False)[COPY]
    # some types are slow on a CPU
    size = 256 if device.type == "cpu" and options.dtype != ["float32"] else None
    rates = {n: matmul_rate(device, getattr(torch, n), size) / 1e12 for n in options.dtype}
    return {"copy_gb_per_s": num_bytes / copy_ms / 1e6, "matmul_tflop_per_s": rates}


def measure_operator(name: str, batch: Batch, options: argparse.Namespace) -> list[Row]:
    """Check and time one operator on one batch: forward, then forward and backward."""
    comparison = compare(name, batch)
    facts = {"operator": name, **batch.facts, "errors": check(comparison)}
    if options.until == "check":
        return [facts]
    return [_time(comparison, backward, options.repeats, facts) for backward in (False, True)]


def _time(comparison: Comparison, backward: bool, repeats: int, facts: Row) -> Row:
    batch = comparison.batch
    units = comparison.units[0] + backward * comparison.units[1]
    num_bytes = units * batch.num_tokens * batch.width * batch.dtype.itemsize
    everything = list(comparison.implementations)
    everything.append(replace(everything[0], name="again"))
    if num_bytes:
        everything.append(copy_of(num_bytes, batch.device))
    times = time_in_turns(everything, batch.device, repeats, backward, comparison.drop)
    ms = {name: median for name, (median, _, _) in times.items()}
    return {
        **facts,
        "mode": "fwd+bwd" if backward else "forward",
        "ms": ms,
        "p20_ms": {name: low for name, (_, low, _) in times.items()},
        "p80_ms": {name: high for name, (_, _, high) in times.items()},
        "over_ours": {n: t / ms["ours"] for n, t in ms.items() if n not in ("ours", COPY)},
        "bytes": num_bytes,
        "copy_share": ms[COPY] / ms["ours"] if COPY in ms else None,
        "notes": dict(comparison.notes),
    }


class Results:
    """Rows and failures, kept and printed while they come in."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        print(
            f"\n{'operator':18} {'dtype':8} {'segments':9} {'batch x tokens':>14} {'mode':8} "
            f"{'ours ms':>9} {'p20':>9} {'p80':>9} {'again':>6} {'published':>9} {'x':>6} "
            f"{'GB/s':>6} {'% copy':>6}"
        )

    @contextmanager
    def attempt(self, name: str, batch: Batch) -> Iterator[None]:
        """Note a failure and go on: others may be right."""
        try:
            yield
        except FAILURES as error:
            if not isinstance(error, CheckError):
                traceback.print_exc()
            self.failures.append({"operator": name, **batch.facts, "reason": first_line(error)})
            print(f"{_what(self.failures[-1])} failed: {first_line(error)}", flush=True)

    def add(self, rows: list[Row]) -> None:
        """Keep and print the rows of an operator."""
        self.rows += rows
        for row in rows:
            print(f"{_what(row)} {_times(row) if 'ms' in row else _errors(row)}")
            for name, ratio in row.get("over_ours", {}).items():
                if name not in ("again", "published"):
                    print(f"    {name}: {row['ms'][name]:.3f} ms, {ratio:.2f} times ours")
        for name, reason in rows[-1].get("notes", {}).items():
            print(f"    {name}: not timed, {reason}")
        sys.stdout.flush()

    def summary(self, card: Row) -> str:
        """The result in a line: what failed, how fast the mixer is, or what the device reaches."""
        if self.failures:
            return "failed: " + ", ".join(f"{r['operator']} {r['dtype']}" for r in self.failures)
        mixers = [
            f"mixer {row['batch_size']} x {row['seq_len']} {row['segments']}: "
            f"{row['ms']['ours']:.2f} ms, {row['over_ours']['published']:.1f} x published"
            for row in self.rows
            if (row["operator"], row.get("mode")) == ("mixer", "fwd+bwd")
        ]
        right = [f"{len(self.rows)} comparisons, all right"] if self.rows else []
        rates = [f"{name} {rate:.3g}" for name, rate in card["matmul_tflop_per_s"].items()]
        ceiling = f"copy {card['copy_gb_per_s']:,.0f} GB/s; TFLOP/s: {', '.join(rates)}"
        return "; ".join(mixers or right or [ceiling])


def _what(row: Row) -> str:
    batch = f"{row['batch_size']} x {row['seq_len']}"
    return f"{row['operator']:18} {row['dtype']:8} {row['segments']:9} {batch:>14}"


def _times(row: Row) -> str:
    ms, over = row["ms"], row["over_ours"]
    cells = [
        f"{row['mode']:8} {ms['ours']:9.3f} {row['p20_ms']['ours']:9.3f}",
        f"{row['p80_ms']['ours']:9.3f} {over['again']:6.2f}",
    ]
    cells.append(f"{ms['published']:9.3f} {over['published']:6.2f}")
    if row["copy_share"] is not None:
        cells.append(f"{row['bytes'] / ms['ours'] / 1e6:6.1f} {100 * row['copy_share']:6.1f}")
    return " ".join(cells)


def _errors(row: Row) -> str:
    return "  ".join(f"{name} {x:.1e}" for name, x in row["errors"].items() if x is not None)


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    torch.manual_seed(options.seed)
    card = {
        **common.machine_card(options.device),
        "dtype": " ".join(options.dtype),
        "width": options.width,
        "heads": options.heads,
        "segments": "; ".join(f"{name}: {SHAPES[name]}" for name in options.segments),
        "seed": options.seed,
        **ceilings(options),
    }
    common.print_card(card)
    results = Results()
    for batch in batches(options) if options.until != "card" else ():
        for name in options.operators:
            # one that segments do not matter to, with the first shape alone
            if batch.segments == options.segments[0] or name in PER_SEGMENT:
                with results.attempt(name, batch):
                    results.add(measure_operator(name, batch, options))
    record = {"benchmark": "op_speed", "card": card}
    record |= {"rows": results.rows, "failures": results.failures}
    common.save_record(record, options.output)
    print(f"\n{results.summary(card)}\n{json.dumps(record)}")
    if results.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
