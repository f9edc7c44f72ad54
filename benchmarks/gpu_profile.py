"""Where a pre-training step spends its time, and how fast one sequence passes the encoder.

    python benchmarks/gpu_profile.py steps --text profile.txt     # the tables of the profiler
    python benchmarks/gpu_profile.py latency                      # --tiny: small

`steps` profiles a step of the base encoder with PoNet and with softmax attention. `latency` is one
sequence of 512 tokens, eager and captured in a CUDA graph, whose outputs are compared. On a CPU
there are neither kernels nor graphs; the rest is measured.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import FAILURES, first_line
from layouts import make_layout
from standing import Standing, print_goals
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from workloads import Case, build_workload

from ponet.config import PoNetConfig
from ponet.encoder import Encoder
from ponet.run.device import return_free_memory, synchronise
from ponet_kernels.testing import relative_error

Row = dict[str, Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
# the first that is found in a kernel's name; Triton's kernels, ours, are named by a word alone
_KINDS = {
    "attention": "(?i)flash|fmha|sdpa",
    "matrix products": "(?i)gemm|cutlass|nvjet|xmma|cublas|splitk",
    "pooling": r"^\w+_kernel$",
    "the rest": "",
}
_LARGEST_DIFFERENCE = 1e-2
"""Relative, of a graph's output from the eager one; more is a failure."""


def steps(tiny: bool, text: Path | None) -> Row:
    """A row a model; a goal is the share of PoNet's step outside matrix products."""
    rows = [_print_row(profile_step(mixer, tiny, text)) for mixer in ("ponet", "attention")]
    goals = []
    kinds = rows[0]["kinds"]
    if kinds:
        busy = rows[0]["busy_ms"]
        outside = {"pooling": kinds["pooling"], "everything": busy - kinds["matrix products"]}
        for what, floor, target in (("pooling", 0.15, 0.08), ("everything", 0.40, 0.25)):
            quantity = f"share of kernel time outside matrix products, {what}"
            share = outside[what] / busy
            goals.append(Standing("T3", quantity, share, floor, target, lower_is_better=True))
    return {"rows": rows, "goals": goals}


def profile_step(mixer: str, tiny: bool, text: Path | None) -> Row:
    """Milliseconds of a step, of its host and of its kernels; the last are None on a CPU."""
    return_free_memory(DEVICE)
    case = Case(
        model="pretraining",
        mixer=mixer,
        seq_len=64 if tiny else 512,
        batch_size=2 if tiny else 128,
        device=DEVICE.type,
        dtype=_DTYPE,
        layers=1 if tiny else None,
        inference=False,
    )
    train = build_workload(case).train
    for number in range(3):
        train(number)
    wall, host = sorted(_timed(lambda: train(0)) for _ in range(3))[1]
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
        train(1)
        synchronise(DEVICE)
    averages = found.key_averages()
    if text:
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = averages.table(sort_by=key, row_limit=40, max_name_column_width=90)
        with text.open("a", encoding="utf-8") as file:
            print(f"{mixer}, {case.batch_size} x {case.seq_len} tokens\n{table}", file=file)
    # ranges that PyTorch marks, such as the optimizer's step, cover kernels that are there, too
    kernels = [e for e in averages if e.device_type.name == "CUDA" and not e.is_user_annotation]
    row = {"mixer": mixer, "tokens": case.tokens, "ms": wall, "host_ms": host}
    return row | _kernel_times(kernels, wall)


def _kernel_times(kernels: list[Any], wall_ms: float) -> Row:
    if not kernels:
        return {"launches": None, "busy_ms": None, "idle": None, "kinds": None}
    kinds = dict.fromkeys(_KINDS, 0.0)
    for kernel in kernels:
        kind = next(kind for kind, name in _KINDS.items() if re.search(name, kernel.key))
        kinds[kind] += kernel.self_device_time_total / 1e3
    busy, launches = sum(kinds.values()), sum(kernel.count for kernel in kernels)
    return {"launches": launches, "busy_ms": busy, "idle": 1 - busy / wall_ms, "kinds": kinds}


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds until the result of a call is there, and until the host is done with it."""
    synchronise(DEVICE)
    start = time.perf_counter()
    call()
    host = time.perf_counter()
    synchronise(DEVICE)
    return (time.perf_counter() - start) * 1e3, (host - start) * 1e3


def latency(tiny: bool, text: Path | None) -> Row:
    """A row a mixer; one that fails, in being captured for example, does not stop the next."""
    rows: list[Row] = []
    for mixer in ("ponet", "attention", "fnet"):
        row: Row = {"mixer": mixer, "eager_ms": None, "graph_ms": None, "reason": None}
        try:
            _measure_latency(row, tiny)
        except FAILURES as error:
            row["reason"] = first_line(error)
        rows.append(_print_row(row))
    found = rows[0]["graph_ms"]
    what = "one sequence of 512 through the encoder, CUDA graph, ms"
    goals = [Standing("T4", what, found, 1.0, 0.5, lower_is_better=True)] if found else []
    return {"rows": rows, "goals": goals, "failed": [r["mixer"] for r in rows if r["reason"]]}


def _measure_latency(row: Row, tiny: bool) -> None:
    length, calls, layers = (64, 3, 2) if tiny else (512, 50, 12)
    config = PoNetConfig(
        mixer=row["mixer"],
        num_hidden_layers=layers,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, _DTYPE)
    encoder = Encoder(config).to(DEVICE, dtype).eval()
    layout = make_layout("text", [length], DEVICE, torch.Generator().manual_seed(0))
    hidden = torch.randn(length, config.hidden_size, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        expected = encoder(hidden, layout)[-1]
        row["eager_ms"] = _median_ms(lambda: encoder(hidden, layout), calls)
        if DEVICE.type != "cuda":
            return
        replay, output = captured(lambda: encoder(hidden, layout)[-1])
        row["graph_ms"] = _median_ms(replay, calls)
    row["equal"], error = torch.equal(output, expected), relative_error(output, expected.double())
    if not error <= _LARGEST_DIFFERENCE:
        row["reason"] = f"graph and eager output differ by {error:.1e}"


def _median_ms(call: Callable[[], Any], calls: int) -> float:
    return statistics.median(_timed(call)[0] for _ in range(calls))


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of a call: what runs it again, and the output that each run overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


def _print_row(row: Row) -> Row:
    def figure(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{name} {figure(x)};" for name, x in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    print("  ".join(f"{name} {figure(x)}" for name, x in row.items() if x is not None), flush=True)
    return row


def main() -> None:
    """Do one part; the last line of stdout is its record."""
    parser = argparse.ArgumentParser(description="profile of a step, latency of one sequence")
    parts = {"steps": steps, "latency": latency}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--tiny", action="store_true", help="as small as can be")
    parser.add_argument("--text", type=Path, metavar="FILE", help="append the profiler's tables")
    options = parser.parse_args()
    record = parts[options.part](options.tiny, options.text)
    if record["goals"]:
        print_goals(record["goals"])
    print(json.dumps(record | {"goals": [goal.as_row() for goal in record["goals"]]}))
    if record.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
