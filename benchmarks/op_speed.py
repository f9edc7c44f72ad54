"""Speed of the PoNet operators beside the published form and a copy of their bytes.

    python benchmarks/op_speed.py                                    # sizes that fit the device
    python benchmarks/op_speed.py --seq-len 4096 --segments text ones documents
    python benchmarks/op_speed.py --until check --dtype float32 float64 bfloat16 float16

Implementations take turns in one process: `ours`; `again`, ours a second time, because differences
smaller than between the two are noise; `published`, in eager PyTorch. Outputs and gradients of ours
are checked before anything is timed: against plain PyTorch operations in float64, which the tests
hold against the formulas, against the published form, and two runs of it bit by bit. What is wrong
or fails is named instead of timed, the rest is measured, and the exit status is 1. `mixer` is
everything between the projections.

"% copy" is the rate at which ours moves the bytes that must cross the memory bus once, as a share
of what a copy of as many bytes reaches in the same turns; both directions of a copy count. These
bytes are those of the following `[T, C]` tensors; one row per segment or sequence is left out.

    operator             forward                      backward
    segment-max          s; out                       dout; ds
    pooling              s, o, l; out                 dout, o, l; ds, do, dl
    global-aggregation   h                            h; dh
    mixer                h, s, o, l; out              dout, o, l, h; ds, do, dl, dh
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from benchmarks import common
from benchmarks.common import NUMBER, Row, first_line, percentiles
from benchmarks.harness import text_segment_ids
from ponet.mixers.published import published_global, published_local_max, published_segment_max
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet.run.device import matmul_rate
from ponet_kernels import fused_pooling, global_aggregation, segment_max, use_backend
from ponet_kernels.layout import SPECIAL
from ponet_kernels.testing import relative_error

SHAPES = {
    "text": "10 to 40 tokens, uniform",
    "ones": "1 token",
    "chunks2": "2 tokens",
    "documents": "one per sequence",
}
"""Segment shapes by name; special tokens are segments of their own in each."""
# inputs of ours and of the published form, and units that must be moved forward and backward
OPERATORS = {
    "segment-max": ("s", "s", 2, 2),
    "pooling": ("g osl", "g_low s o l", 4, 6),
    "global-aggregation": ("h wq bq wk bk", "q k", 1, 2),
    "mixer": ("h wq bq wk bk osl", "q k s o l", 5, 8),
}
# largest errors against float64, relative to the largest value, several times what rounding makes:
# of outputs; of gradients, whose sums cancel; of the published form, which rounds more often
_LIMITS = {
    "float64": (3e-12, 3e-11, 1e-10),
    "float32": (3e-6, 3e-5, 1e-4),
    "bfloat16": (1.2e-2, 0.12, 5e-2),
    "float16": (3e-3, 3e-2, 1e-2),
}

Inputs = dict[str, Tensor]
Call = Callable[[], Any]


class CheckError(AssertionError):
    """Ours does not compute what the published form computes, or not twice the same."""


FAILURES = (CheckError, LookupError, RuntimeError, TypeError, ValueError, common.TritonError)
"""What one operator can fail with while others may still run: figures, PyTorch, a compiler."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one length without padding, and how their tokens are represented."""

    segments: str
    """A key of `SHAPES`."""
    batch_size: int
    seq_len: int
    width: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    @property
    def facts(self) -> Row:
        """What a row says of its batch."""
        sizes = {"seq_len": self.seq_len, "batch_size": self.batch_size}
        return {**sizes, "segments": self.segments, "dtype": torch.finfo(self.dtype).dtype}

    @cached_property
    def layout(self) -> BatchLayout:
        """Where segments lie; [CLS] and [SEP] are at the ends, in text one in the middle, too."""
        length, generator = self.seq_len, torch.Generator().manual_seed(self.seed)
        special = torch.zeros(length, dtype=torch.bool)
        special[[0, length - 1]] = True
        if self.segments == "text":
            special[length // 2] = True
            rows = [text_segment_ids(length, generator) for _ in range(self.batch_size)]
        else:
            size = {"ones": 1, "chunks2": 2, "documents": length}[self.segments]
            rows = [torch.arange(length) // size] * self.batch_size
        ids, offsets = torch.cat(rows), torch.arange(self.batch_size + 1).int() * length
        found = layout_of(stream_of_packed(ids, offsets), special.repeat(self.batch_size), ids)
        return found.with_tensors({k: x.to(self.device) for k, x in found.tensors().items()})


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator with its inputs."""

    call: Callable[[Inputs], Tensor]
    inputs: Inputs

    def forward(self) -> Tensor:
        """The output, without recording a graph."""
        with torch.no_grad():
            return self.call(self.inputs)

    def run(self, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """Output and gradients; None: of the sum of the output."""
        out = self.call(self.inputs)
        upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, list(self.inputs.values()), upstream)


def draw_inputs(batch: Batch) -> Inputs:
    """Random inputs of all operators.

    h hidden states with a common mean, so that the mean query is not zero; q k o s l projections,
    osl three of them side by side; g global vectors (`g_low` `[B, 1, C]` in the dtype of the
    batch); wq bq wk bk parameters.
    """
    generator = torch.Generator(batch.device).manual_seed(batch.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=batch.device, generator=generator).to(batch.dtype)

    tokens, width = batch.layout.num_tokens, batch.width
    values = {"h": normal(tokens, width).add_(normal(1, width))}
    for name in "qk":
        weight, bias = normal(width, width) / (3 * width) ** 0.5, normal(width) / 10
        values |= {f"w{name}": weight, f"b{name}": bias}
        values[name] = F.linear(values["h"], weight, bias)
    values |= {name: normal(tokens, width) for name in "osl"}
    values["osl"] = torch.cat([values[name] for name in "osl"], dim=1)
    values["g_low"] = normal(batch.batch_size, 1, width)
    half = batch.dtype in (torch.float16, torch.bfloat16)
    values["g"] = values["g_low"].squeeze(1).to(torch.float32 if half else batch.dtype)
    return values


class _Forms:
    """Ours and the published form of the `OPERATORS` on the layout of a batch."""

    def __init__(self, batch: Batch) -> None:
        self._layout, self._heads = batch.layout, batch.num_heads
        self._rows = batch.layout.rows.from_stream

    def maxima(self, v: Inputs) -> Tensor:
        return segment_max(v["s"], self._layout)

    def segment_max(self, v: Inputs) -> Tensor:
        # in the mixer the fusion reads a row per segment; here per token, as the published form
        return self.maxima(v).index_select(0, self._layout.token_segments)

    def pooling(self, v: Inputs) -> Tensor:
        return fused_pooling(v["g"], v["osl"], self._layout)

    def global_aggregation(self, v: Inputs) -> Tensor:
        weights = (v["wq"], v["bq"], v["wk"], v["bk"])
        return global_aggregation(v["h"], *weights, self._heads, self._layout)

    def mixer(self, v: Inputs) -> Tensor:
        return self.pooling({**v, "g": self.global_aggregation(v)})

    def published_segment_max(self, v: Inputs) -> Tensor:
        # as ours, of special tokens' segments, too
        layout = replace(self._layout, token_marks=self._layout.token_marks & ~SPECIAL)
        return published_segment_max(self._rows(v["s"]), layout)

    def published_pooling(self, v: Inputs) -> Tensor:
        s, o, local = (self._rows(v[name]) for name in "sol")
        maxima = published_segment_max(s, self._layout)
        return (v["g_low"] + maxima) * o + published_local_max(local, self._layout)

    def published_global_aggregation(self, v: Inputs) -> Tensor:
        return published_global(self._rows(v["q"]), self._rows(v["k"]), self._heads, self._layout)

    def published_mixer(self, v: Inputs) -> Tensor:
        return self.published_pooling({**v, "g_low": self.published_global_aggregation(v)})


def compare(name: str, batch: Batch) -> tuple[Implementation, Implementation, Implementation]:
    """Draw the inputs of an operator: ours, the published form, and what gives equal bits twice."""
    drawn, forms = draw_inputs(batch), _Forms(batch)

    def implementation(form: str, names: str) -> Implementation:
        leaves = {name: drawn[name].detach().requires_grad_() for name in names.split()}
        return Implementation(getattr(forms, form.replace("-", "_")), leaves)

    takes, published_takes, *_ = OPERATORS[name]
    ours = implementation(name, takes)
    published = implementation(f"published-{name}", published_takes)
    # the gradient of spreading rows over tokens is PyTorch's, and on a GPU not repeatable
    repeatable = replace(ours, call=forms.maxima) if name == "segment-max" else ours
    return ours, published, repeatable


def check(ours: Implementation, published: Implementation, repeatable: Implementation) -> Row:
    """Compare ours with float64, with the published form and with itself: the largest errors.

    Raises:
        CheckError: one is beyond rounding, or two runs of ours differ.
    """
    theirs, upstream = published.forward(), torch.randn_like(ours.forward())
    doubled = {name: x.detach().double().requires_grad_() for name, x in ours.inputs.items()}
    with use_backend("torch"):
        expected, *gradients = replace(ours, inputs=doubled).run(upstream)
    actual, *actual_gradients = ours.run(upstream)
    found = {
        "output": relative_error(actual, expected),
        "gradient": max(map(relative_error, actual_gradients, gradients)),
        "published_output": relative_error(theirs.view_as(expected), expected),
    }
    limits = _LIMITS[torch.finfo(theirs.dtype).dtype]
    for (name, error), limit in zip(found.items(), limits, strict=True):
        # a NaN compares false, so it fails too
        if not error <= limit:
            raise CheckError(f"{name}: relative error {error:.3g} exceeds {limit:.3g}")
    if not all(map(torch.equal, repeatable.run(), repeatable.run())):
        raise CheckError("two runs of ours differ in bits")
    return found


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
    add("--dtype", nargs="+", choices=_LIMITS, help="[CPU: float32; GPU: bfloat16 float32]")
    add("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    add("--repeats", default=5, **NUMBER, help="turns of each implementation [5]")
    options = common.parse_flags(parser)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or (["bfloat16", "float32"] if on_gpu else ["float32"])
    options.segments = options.segments or (["text", "ones", "documents"] if on_gpu else ["text"])
    if options.tokens is None and options.batch_size is None and on_gpu:
        options.tokens = 65536
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    return options


def batches(options: argparse.Namespace) -> Iterator[Batch]:
    shared: Row = {"width": options.width, "num_heads": options.heads, "seed": options.seed}
    shared["device"] = torch.device(options.device)
    for name, length, shape in product(options.dtype, options.seq_len, options.segments):
        size = options.batch_size or max(1, (options.tokens or 0) // length)
        dtype = getattr(torch, name)
        yield Batch(segments=shape, batch_size=size, seq_len=length, dtype=dtype, **shared)


def time_in_turns(
    calls: dict[str, Call], device: torch.device, repeats: int
) -> dict[str, tuple[float, ...]]:
    """Median, 20th and 80th percentile of the milliseconds of each call, by name."""
    if device.type == "cuda":
        from triton.testing import do_bench

        # by events, with the cache cleared before each call, as it would be in a model; it repeats
        # for a time of its own
        shares = (0.5, 0.2, 0.8)
        return {name: cast(Any, do_bench(c, quantiles=shares)) for name, c in calls.items()}
    threads = torch.get_num_threads()
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads)
        for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, timer in timers.items():
            # short calls are measured many times; seconds
            samples[name] += timer.blocked_autorange(min_run_time=0.02).times
    return {name: tuple(1e3 * x for x in percentiles(samples[name])) for name in calls}


def copy_of(num_bytes: int, device: torch.device) -> Call:
    """A copy that moves so many bytes, half of them read and half written."""
    half = max(num_bytes // 2 // 4, 1)
    source, target = torch.randn(half, device=device), torch.zeros(half, device=device)
    return lambda: target.copy_(source)


def ceilings(options: argparse.Namespace) -> Row:
    """What the device reaches at best: rates of a large copy and of matrix products."""
    device = torch.device(options.device)
    num_bytes = 2**28 if device.type == "cpu" else 2**32
    copy_ms, _, _ = time_in_turns({"copy": copy_of(num_bytes, device)}, device, 5)["copy"]
    # some types are slow on a CPU
    size = 256 if device.type == "cpu" and options.dtype != ["float32"] else None
    rates = {n: matmul_rate(device, getattr(torch, n), size) / 1e12 for n in options.dtype}
    return {"copy_gb_per_s": num_bytes / copy_ms / 1e6, "matmul_tflop_per_s": rates}


def measure_operator(name: str, batch: Batch, options: argparse.Namespace) -> list[Row]:
    """Check and time one operator on one batch: forward, then forward and backward."""
    ours, published, repeatable = compare(name, batch)
    errors = check(ours, published, repeatable)
    facts = {"operator": name, **batch.facts, "errors": errors}
    if options.until == "check":
        return [facts]
    *_, forward, backward = OPERATORS[name]
    one = _time(ours.forward, published.forward, forward, batch, options.repeats)
    both = _time(ours.run, published.run, forward + backward, batch, options.repeats)
    return [facts | {"mode": "forward"} | one, facts | {"mode": "fwd+bwd"} | both]


def _time(ours: Call, published: Call, units: int, batch: Batch, repeats: int) -> Row:
    num_bytes = units * batch.layout.num_tokens * batch.width * batch.dtype.itemsize
    calls = {"ours": ours, "published": published, "again": ours}
    calls["copy"] = copy_of(num_bytes, batch.device)
    times = time_in_turns(calls, batch.device, repeats)
    ms, low, high = ({name: found[n] for name, found in times.items()} for n in range(3))
    return {
        "ms": ms,
        "p20_ms": low,
        "p80_ms": high,
        "over_ours": {name: ms[name] / ms["ours"] for name in ("published", "again")},
        "bytes": num_bytes,
        "copy_share": ms["copy"] / ms["ours"],
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
    if rows:
        mixers = [
            f"mixer {row['batch_size']} x {row['seq_len']} {row['segments']}: "
            f"{row['ms']['ours']:.2f} ms, {row['over_ours']['published']:.1f} x published"
            for row in rows
            if (row["operator"], row.get("mode")) == ("mixer", "fwd+bwd")
        ]
        return "; ".join(mixers) or f"{len(rows)} comparisons, all right"
    rates = [f"{name} {rate:.3g}" for name, rate in card["matmul_tflop_per_s"].items()]
    return f"copy {card['copy_gb_per_s']:,.0f} GB/s; TFLOP/s: {', '.join(rates)}"


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
    rows: list[Row] = []
    failures: list[Row] = []
    print(_HEAD)
    for batch in batches(options) if options.until != "card" else ():
        for name in options.operators:
            # segments do not matter to it
            if name == "global-aggregation" and batch.segments != options.segments[0]:
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
    print(f"\n{summary(record)}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
