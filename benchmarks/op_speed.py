"""Speed of the PoNet operators beside the published form and a copy of their bytes.

    python benchmarks/op_speed.py                                    # sizes that fit the device
    python benchmarks/op_speed.py --seq-len 512 --operators mixer
    python benchmarks/op_speed.py --seq-len 4096 --segments text ones documents
    python benchmarks/op_speed.py --until check --dtype float32 float64 bfloat16 float16

Implementations take turns in one process: `ours`; `again`, ours a second time, because differences
smaller than between the two are noise; `published`, in eager PyTorch. Outputs and gradients of ours
are checked before anything is timed, and two runs of it bit by bit; what is wrong or fails is named
instead of timed, the rest is measured, and the exit status is 1. "% copy" is the rate at which ours
moves the bytes it must move, as a share of what a copy of as many bytes reaches in the same turns;
both directions of a copy count.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, cast

import torch

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

FAILURES = (CheckError, LookupError, RuntimeError, TypeError, ValueError, common.TritonError)
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
    add("--threads", **NUMBER, help="of the CPU; 1 where other programs use it, too")
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
    shared: Row = {"width": options.width, "num_heads": options.heads, "seed": options.seed}
    shared["device"] = torch.device(options.device)
    for name, length, shape in product(options.dtype, options.seq_len, options.segments):
        size = options.tokens // length if options.tokens else options.batch_size or 1
        dtype = getattr(torch, name)
        yield Batch(segments=shape, batch_size=size, seq_len=length, dtype=dtype, **shared)


def time_in_turns(
    implementations: list[Implementation], device: torch.device, repeats: int, backward: bool
) -> dict[str, tuple[float, float, float]]:
    """Median, 20th and 80th percentile of the milliseconds of a call, by name.

    Args:
        implementations: to be timed.
        device: where they run.
        repeats: turns of each; a GPU has the time of its own and needs none.
        backward: forward and backward pass, or forward alone.
    """
    calls: dict[str, Callable[[], Any]] = {
        one.name: one.run if backward and one.name != COPY else one.forward
        for one in implementations
    }
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
    return [facts | _time(comparison, mode, options.repeats) for mode in ("forward", "fwd+bwd")]


def _time(comparison: Comparison, mode: str, repeats: int) -> Row:
    batch, backward = comparison.batch, mode == "fwd+bwd"
    units = sum(comparison.units) if backward else comparison.units[0]
    num_bytes = units * batch.num_tokens * batch.width * batch.dtype.itemsize
    again = replace(comparison.ours, name="again")
    forms = [comparison.ours, comparison.published, again, copy_of(num_bytes, batch.device)]
    times = time_in_turns(forms, batch.device, repeats, backward)
    ms = {name: median for name, (median, _, _) in times.items()}
    return {
        "mode": mode,
        "ms": ms,
        "p20_ms": {name: low for name, (_, low, _) in times.items()},
        "p80_ms": {name: high for name, (_, _, high) in times.items()},
        "over_ours": {name: ms[name] / ms["ours"] for name in ("published", "again")},
        "bytes": num_bytes,
        "copy_share": ms[COPY] / ms["ours"],
    }


_HEAD = (
    f"\n{'operator':18} {'dtype':8} {'segments':9} {'batch x tokens':>14} {'mode':8} "
    f"{'ours ms':>9} {'p20':>9} {'p80':>9} {'again':>6} {'published':>9} {'x':>6} {'GB/s':>6} "
    f"{'% copy':>6}"
)


def line_of(row: Row) -> str:
    """A row of the table: times, or only errors, or why there are neither."""
    batch = f"{row['batch_size']} x {row['seq_len']}"
    what = f"{row['operator']:18} {row['dtype']:8} {row['segments']:9} {batch:>14}"
    if "reason" in row:
        return f"{what} failed: {row['reason']}"
    if "ms" not in row:
        errors = [f"{name} {error:.1e}" for name, error in row["errors"].items()]
        return f"{what} {'  '.join(errors)}"
    ms, over = row["ms"], row["over_ours"]
    return (
        f"{what} {row['mode']:8} {ms['ours']:9.3f} {row['p20_ms']['ours']:9.3f} "
        f"{row['p80_ms']['ours']:9.3f} {over['again']:6.2f} {ms['published']:9.3f} "
        f"{over['published']:6.2f} {row['bytes'] / ms['ours'] / 1e6:6.1f} "
        f"{100 * row['copy_share']:6.1f}"
    )


def summary(record: Row) -> str:
    """The result in a line: what failed, how fast the mixer is, or what the device reaches."""
    card, rows = record["card"], record["rows"]
    if record["failures"]:
        return "failed: " + ", ".join(f"{r['operator']} {r['dtype']}" for r in record["failures"])
    mixers = [
        f"mixer {row['batch_size']} x {row['seq_len']} {row['segments']}: "
        f"{row['ms']['ours']:.2f} ms, {row['over_ours']['published']:.1f} x published"
        for row in rows
        if (row["operator"], row.get("mode")) == ("mixer", "fwd+bwd")
    ]
    if mixers or rows:
        return "; ".join(mixers) or f"{len(rows)} comparisons, all right"
    rates = [f"{name} {rate:.3g}" for name, rate in card["matmul_tflop_per_s"].items()]
    return f"copy {card['copy_gb_per_s']:,.0f} GB/s; TFLOP/s: {', '.join(rates)}"


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
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
    rows: list[Row] = []
    failures: list[Row] = []
    print(_HEAD)
    for batch in batches(options) if options.until != "card" else ():
        for name in options.operators:
            # one that segments do not matter to, with the first shape alone
            if batch.segments != options.segments[0] and name not in PER_SEGMENT:
                continue
            try:
                found = measure_operator(name, batch, options)
                rows += found
            # others may be right
            except FAILURES as error:
                if not isinstance(error, CheckError):
                    traceback.print_exc()
                found = [{"operator": name, **batch.facts, "reason": first_line(error)}]
                failures += found
            print("\n".join(map(line_of, found)), flush=True)
    record = {"benchmark": "op_speed", "card": card, "rows": rows, "failures": failures}
    common.save_record(record, options.output)
    print(f"\n{summary(record)}\n{json.dumps(record)}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
