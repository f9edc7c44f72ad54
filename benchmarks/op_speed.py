"""Speed and memory of the PoNet operators beside what the published code does.

    python benchmarks/op_speed.py                                    # sizes that fit the device
    python benchmarks/op_speed.py --seq-len 512 --parts mixer --no-compile
    python benchmarks/op_speed.py --seq-len 4096 --segments text ones documents

Candidates, interleaved in one process:

    ours       the operators of `ponet_kernels`, on the backend that the device gets
    again      ours a second time: differences smaller than between the two are noise
    public     what the published code does, in eager PyTorch (`public_block`)
    compiled   torch.compile of public
    sdpa ...   softmax attention in place of the mixing, for the sub-layer alone

The parts are single operators, `mixer` (everything between the projections; ours starts from
hidden states where public starts from queries and keys of every token) and `sub-layer`
(projections, mixing, output projection). Outputs and gradients of ours are compared with the
published form in float64, and two runs of ours bit by bit, before anything is timed; what is wrong
or fails is named instead of timed, the rest is measured, and the exit status is 1. "% copy" is the
rate at which ours moves the bytes it must move (see `parts`), as a share of what a copy of as many
bytes reaches in the same turns; both directions of a copy count. "others" is the number of
processors that other programs kept busy meanwhile: near 0, or the row is not to be trusted.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from cases import (
    FAILURES,
    SUB_LAYER,
    Case,
    CheckError,
    add_compiled,
    build_case,
    check,
    first_line,
)
from goals import standings
from layouts import SHAPES, Batch, dtype_name, make_batch, make_layout
from parts import PARTS, Candidate
from peak_memory import peaks
from records import add_output_flags
from report import Table, describe, print_card, print_memory, save
from standing import print_goals
from stopwatch import OtherLoad, Stopwatch, Timing, copy_candidate, copy_rate

from ponet.run.device import matmul_rate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "fwd+bwd")
GPU_TOKENS = 65536
Row = dict[str, Any]


def parse_options() -> argparse.Namespace:
    """Flags, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description="speed of the PoNet operators, checked first")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--seq-len", nargs="+", default=[512, 4096], **number)
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--tokens", **number, help="in a batch (GPU: 65536, and 512 for latency)")
    batch.add_argument("--batch-size", **number, help="sequences (CPU: 1)")
    parser.add_argument("--width", default=768, **number)
    parser.add_argument("--heads", default=12, **number)
    parser.add_argument("--segments", nargs="+", choices=SHAPES, help="CPU: text; GPU: three")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="CPU: float32; GPU: bfloat16 too"
    )
    names = (*PARTS, SUB_LAYER)
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--repeats", default=5, **number, help="turns of each candidate")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile-limit", default=120, **number, help="seconds a part and size")
    add_output_flags(parser)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and the time it works: for a CPU that other programs use meanwhile",
    )
    parser.add_argument("--seed", default=0, **number)
    options = parser.parse_args()
    _check_options(parser, options)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or (["bfloat16", "float32"] if on_gpu else ["float32"])
    options.segments = options.segments or (["text", "ones", "documents"] if on_gpu else ["text"])
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if options.device == "cuda" and options.cpu_time:
        parser.error("--cpu-time is for a CPU, found --device cuda")
    for name in ("tokens", "batch_size", "width", "heads", "repeats", "compile_limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if min(options.seq_len) < 8:
        parser.error(f"--seq-len must be at least 8, found {min(options.seq_len)}")
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if options.tokens is not None and options.tokens < max(options.seq_len):
        parser.error(f"--tokens {options.tokens} is less than --seq-len {max(options.seq_len)}")


def sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(sequences, tokens of each) to be measured."""
    if options.batch_size is not None:
        return [(options.batch_size, length) for length in options.seq_len]
    if options.tokens is not None:
        return [(options.tokens // length, length) for length in options.seq_len]
    if options.device == "cpu":
        return [(1, length) for length in options.seq_len]
    # one short sequence shows what a call costs however little it does
    return [(1, 512), *((max(GPU_TOKENS // length, 1), length) for length in options.seq_len)]


def _batch(options: argparse.Namespace, size: tuple[int, int], dtype: str, shape: str) -> Batch:
    return make_batch(
        shape,
        *size,
        width=options.width,
        num_heads=options.heads,
        dtype=DTYPES[dtype],
        device=torch.device(options.device),
        seed=options.seed,
    )


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def _stopwatch(batch: Batch, options: argparse.Namespace) -> tuple[Stopwatch, int]:
    """How to time a batch, and how many input sets to take in turn.

    On a GPU the sets together exceed its cache four times, as they would in a model; a batch that
    fits in half the cache is timed for latency. On a CPU one set is used over and over.
    """
    if batch.device.type == "cpu":
        return Stopwatch(batch.device, options.repeats, False, _clock(options)), 1
    cache = torch.cuda.get_device_properties(batch.device).L2_cache_size
    unit = batch.num_tokens * batch.width * batch.dtype.itemsize
    if 5 * unit < cache / 2:
        return Stopwatch(batch.device, options.repeats, latency=True), 1
    return Stopwatch(batch.device, options.repeats, latency=False), -(-4 * cache // unit)


def measure_case(case: Case, stopwatch: Stopwatch, num_sets: int, errors: Row) -> list[Row]:
    """Rows of the table, one a mode."""
    again = replace(case.ours, name="again")
    rows = []
    for mode in MODES:
        backward = mode == "fwd+bwd"
        num_bytes = case.forward_bytes + backward * case.backward_bytes
        copies: list[Candidate] = []
        if num_bytes and not stopwatch.latency:
            copies = [copy_candidate(num_bytes, stopwatch.device, min(num_sets, 2))]
        candidates = [*case.candidates, again, *copies]
        load = OtherLoad()
        timings = stopwatch.measure(candidates, backward, case.drop)
        row = _row(case, mode, num_bytes, timings, errors)
        rows.append({**row, "latency": stopwatch.latency, "other_cores": load.cores()})
    return rows


def _row(
    case: Case,
    mode: str,
    num_bytes: int,
    timings: dict[str, Timing],
    errors: Row,
) -> Row:
    ours = timings["ours"]
    row: Row = {
        "part": case.part,
        **_facts(case.batch),
        "mode": mode,
        "ms": {name: timing.ms for name, timing in timings.items()},
        "p20_ms": {name: timing.p20 for name, timing in timings.items()},
        "p80_ms": {name: timing.p80 for name, timing in timings.items()},
        "over_ours": {n: t.ms / ours.ms for n, t in timings.items() if n not in ("ours", "copy")},
        "bytes": num_bytes,
        "copy_share": None,
        "backward_copy_share": None,
        "errors": errors,
        "notes": dict(case.notes),
    }
    if "copy" in timings:
        copy_ms = timings["copy"].ms
        row["copy_share"] = copy_ms / ours.ms
        if ours.backward_ms is not None:
            share = case.backward_bytes / num_bytes
            row["backward_copy_share"] = copy_ms * share / ours.backward_ms
    return row


def measure_part(part: str, batch: Batch, options: argparse.Namespace) -> list[Row]:
    """Check and time one part of one batch."""
    stopwatch, num_sets = _stopwatch(batch, options)
    case = build_case(part, batch, num_sets, options.seed)
    errors = asdict(check(case))
    if options.compile:
        add_compiled(case, options.compile_limit)
    return measure_case(case, stopwatch, num_sets, errors)


class Measured:
    """What a run has so far."""

    def __init__(self, table: Table) -> None:
        self.rows: list[Row] = []
        self.memory: list[Row] = []
        self.padding: list[Row] = []
        self.failures: list[Row] = []
        self._table = table

    def add_rows(self, rows: list[Row]) -> None:
        """Keep and print the timings of a part."""
        self.rows += rows
        self._table.print_rows(rows)

    @contextmanager
    def attempt(self, what: str, batch: Batch) -> Iterator[None]:
        """Note a failure and go on: others may be right."""
        try:
            yield
        except FAILURES as error:
            if not isinstance(error, CheckError):
                traceback.print_exc()
            self.failures.append({"part": what, **_facts(batch), "reason": first_line(error)})
            self._table.print_failure(self.failures[-1])


def _facts(batch: Batch) -> Row:
    return {
        "seq_len": batch.seq_len,
        "batch_size": batch.batch_size,
        "dtype": dtype_name(batch.dtype),
        "segments": batch.segments,
    }


def measure_all(options: argparse.Namespace, dtype: str, found: Measured) -> None:
    """Every part at every size; a part that segments do not matter to, with the first shape."""
    for size in sizes(options):
        for shape in options.segments:
            batch = _batch(options, size, dtype, shape)
            for part in options.parts:
                first = shape == options.segments[0]
                if first or (part in PARTS and PARTS[part].per_segment):
                    with found.attempt(part, batch):
                        found.add_rows(measure_part(part, batch, options))


def measure_more(options: argparse.Namespace, dtype: str, found: Measured) -> None:
    """Peak memory of the sub-layer in training; the mixer on full rows and on half as many tokens.

    The second are the same rows with half of the tokens taken out as padding.
    """
    for size in sizes(options):
        batch = _batch(options, size, dtype, options.segments[0])
        if SUB_LAYER in options.parts:
            with found.attempt("peak memory", batch):
                found.memory.append({**_facts(batch), "mib": peaks(batch, options.seed)})
        if "mixer" in options.parts and size[0] % 2 == 0:
            with found.attempt("padding", batch):
                found.padding.append(_padding_row(options, size, dtype))


def _padding_row(options: argparse.Namespace, size: tuple[int, int], dtype: str) -> Row:
    padded = _batch(options, size, dtype, options.segments[0])
    batch_size, length = size
    generator = torch.Generator().manual_seed(options.seed)
    short = torch.randint(3, length - 2, (batch_size // 2,), generator=generator).tolist()
    lengths = [n for first in short for n in (first, length - first)]
    layout = make_layout(padded.segments, lengths, padded.device, generator)
    # only ours reads it, and ours reads the layout alone
    packed = replace(padded, batch_size=batch_size // 2, layout=layout)
    stopwatch, num_sets = _stopwatch(packed, options)
    candidates = []
    for name, batch in (("padded", padded), ("packed", packed)):
        ours = build_case("mixer", batch, num_sets, options.seed).ours
        candidates.append(replace(ours, name=name))
    timings = stopwatch.measure(candidates, backward=True)
    return {
        "seq_len": length,
        "batch_size": batch_size,
        "dtype": dtype,
        "padded_ms": timings["padded"].ms,
        "packed_ms": timings["packed"].ms,
    }


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    if options.cpu_time:
        torch.set_num_threads(1)
    card = describe(options)
    card["copy_gb_per_s"] = copy_rate(device, _clock(options)) / 1e9
    rates = {dtype: matmul_rate(device, DTYPES[dtype]) / 1e12 for dtype in options.dtype}
    card["matmul_tflop_per_s"] = rates
    print_card(card)
    measured = Measured(Table(list(options.parts)))
    for dtype in options.dtype:
        measure_all(options, dtype, measured)
    for dtype in options.dtype:
        measure_more(options, dtype, measured)
    rows, memory, padding = measured.rows, measured.memory, measured.padding
    wrong = {row["dtype"] for row in measured.failures}
    found = standings(rows, memory, padding, on_gpu=device.type == "cuda", wrong=wrong)
    print_memory(memory)
    print_goals(found)
    record = {
        "benchmark": "op_speed",
        "card": card,
        "rows": rows,
        "memory": memory,
        "padding": padding,
        "failures": measured.failures,
        "goals": [standing.as_row() for standing in found],
    }
    save(record, options.output)
    print(json.dumps(record))
    if measured.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
