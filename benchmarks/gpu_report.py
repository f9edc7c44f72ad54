"""Measure a GPU in eight minutes, what matters most first.

    python benchmarks/gpu_report.py                              # all parts, within 480 s
    python benchmarks/gpu_report.py --only listops pretrain --budget 300
    python benchmarks/gpu_report.py --tiny                       # does it all run? a CPU will do

Each of `PARTS` is a process group of its own with a time limit; one that fails or takes too long
does not stop the next. The folder gets results.jsonl (a line per part, as they end), log.txt (what
they printed) and profile.txt. The exit status is 1 when a part failed, 0 when all ran, were left
out for a reason that is given, or were cut short by the budget.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import ROOT
from benchmarks.common import RUNS, Row, first_line
from benchmarks.harness import Case, Workload
from benchmarks.op_speed import FAILURES, Batch
from ponet.config import PoNetConfig
from ponet.model import Encoder
from ponet.run.device import return_free_memory, synchronise
from ponet_kernels.testing import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
# the first that is found in a kernel's name; Triton's kernels, ours, are named by a word alone
_KINDS = {
    "attention": "(?i)flash|fmha|sdpa",
    "matrix products": "(?i)gemm|cutlass|nvjet|xmma|cublas|splitk",
    "pooling": r"^\w+_kernel$",
    "the rest": "",
}


@dataclass(frozen=True)
class Part:
    """Something to measure, by a program that prints a summary last."""

    name: str
    seconds: float
    """The longest it may take."""
    command: str
    """Names in braces are filled in by `command_of`."""
    tiny: str | None
    """Flags that make it small enough for a CPU; None: it needs a GPU in any case."""
    needs: str | None = None
    """A package or program that must be installed."""
    least: float | None = None
    """Seconds without which it is not begun; None: a third of the longest."""


_OPS = "{python} benchmarks/op_speed.py --output {scratch} --tokens 65536 "
_CHECK = _OPS + "--until check --dtype bfloat16 float16 float32 float64 "
_SMALL = "--tokens 80 --seq-len 40 --width 24 --heads 3 --repeats 1 "
_TIMED = _SMALL + "--operators pooling mixer "
_MODELS = "{python} benchmarks/speed_memory.py --budget {minutes} --output {scratch} --rounds 2 "
_HERE = "{python} benchmarks/gpu_report.py --output {output} --measure "
# blocks of PyTorch's own allocator would hide a step beyond the end of a tensor
_MEMCHECK = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 "
_LISTOPS = "{python} lra/run.py --task listops --data-dir {data_dir} --output-dir {scratch}/lra "
_LISTOPS += "--model ponet --precision bf16 "
_FEW_TREES = "--config debug --data-dir {scratch}/data --num-examples 50 --steps 2 --eval-every 2 "
_FEW_TREES += "--eval-batches 1 --test-examples 8"
_PRETRAIN = "{python} pretrain/run.py --cache-dir {scratch}/cache --output-dir {scratch}/pretrain "
_PRETRAIN += "--data {text} --config small --precision bf16 --steps 800 --eval-every 400 "
_FEW_WORDS = "--config debug --max-characters 300000 --steps 4 --eval-every 4"
_MIXERS = "--mixers ponet attention_naive attention fnet --seq-len 512 4096 16384"
_STEPS = "--model pretraining --mixers ponet attention:flash attention:cudnn fnet"
_FEW_STEPS = "--layers 1 --seq-len 64 --tokens 128 --rounds 1 --budget 0.5"
_SHAPES = "--dtype bfloat16 --seq-len 4096 --operators pooling mixer"
_ALL_SHAPES = "--segments text ones documents"

PARTS = [
    Part("card", 60, _OPS + "--until card", _SMALL),
    Part("operators", 90, _CHECK + _ALL_SHAPES, _SMALL),
    Part("tests", 110, "{python} -m pytest -q --tb=short {tests}", "", needs="pytest"),
    Part("memcheck", 60, _MEMCHECK + _CHECK + _SMALL, None, needs="compute-sanitizer"),
    Part("speed-bf16", 80, _OPS + "--segments text --dtype bfloat16", _TIMED),
    Part("speed-shapes", 40, _OPS + _SHAPES, _TIMED + _ALL_SHAPES),
    Part("speed-fp32", 50, _OPS + "--segments text --dtype float32", _TIMED),
    Part("profile", 50, _HERE + "profile", "--tiny"),
    Part("steps", 90, _MODELS + _STEPS, _FEW_STEPS),
    Part("mixers", 90, _MODELS + _MIXERS, "--seq-len 64 --batch-size 2 --rounds 1 --budget 0.5"),
    Part("latency", 50, _HERE + "latency", "--tiny"),
    Part("listops", 240, _LISTOPS, _FEW_TREES, least=100),
    Part("pretrain", 150, _PRETRAIN, _FEW_WORDS, needs="sentencex", least=60),
]
"""All parts, in order of value."""


def reason_against(part: Part, tiny: bool, left: float) -> str | None:
    """Why a part cannot run here and now."""
    if not torch.cuda.is_available() and (part.tiny is None or not tiny):
        return "no GPU" if tiny else "no GPU; --tiny is for a CPU, too"
    if part.needs and not (importlib.util.find_spec(part.needs) or shutil.which(part.needs)):
        return f"not installed: {part.needs}"
    least = 1.0 if tiny else part.least or part.seconds / 3
    return f"needs {least:.0f} s, {max(left, 0):.0f} s are left" if left < least else None


def command_of(part: Part, options: argparse.Namespace, scratch: str, seconds: float) -> list[str]:
    command = f"{part.command} {part.tiny or ''}" if options.tiny else part.command
    filled = command.format(
        python=shlex.quote(sys.executable),
        scratch=shlex.quote(scratch),
        output=shlex.quote(str(options.output)),
        data_dir=shlex.quote(str(options.data_dir.resolve())),
        # the rest goes into starting and drawing
        minutes=f"{0.75 * seconds / 60:.2f}",
        text=shlex.join(options.text),
        tests=shlex.join(_tests(options.tiny)),
    )
    return shlex.split(filled)


def _tests(tiny: bool) -> list[str]:
    """Files and flags for pytest: the tests marked `gpu`, which run on the device."""
    if tiny:
        return ["tests/test_kernels.py", "-k", "tied or exact or choice or refused"]
    # none of the other files is imported, because some need packages that may be missing
    paths = [path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text()]
    workers = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    return [*sorted(str(path.relative_to(ROOT)) for path in paths), "-m", "gpu", *workers]


def run_command(
    command: list[str],
    seconds: float | None,
    output: Path,
    *,
    tiny: bool = False,
    folder: Path = ROOT,
) -> str:
    """Run a command in a group of its own, which is gone afterwards: ok, or how it ended."""
    threads = {"OMP_NUM_THREADS": "1"} if tiny else {}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | threads,
            start_new_session=True,
        )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        # what it started may outlive it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "ok" if code == 0 else f"signal {-code}" if code < 0 else f"status {code}"


def measure_part(part: Part, options: argparse.Namespace, left: float) -> Row:
    """Run a part, or say why not: its state, a summary, and its record."""
    reason = reason_against(part, options.tiny, left)
    if reason:
        return {"state": "left out", "summary": reason, "record": {}}
    # a CPU that others use meanwhile may be slow even at what is tiny
    longest = part.seconds * (3 if options.tiny else 1)
    seconds = min(longest, left)
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch:
        command = command_of(part, options, scratch, seconds)
        output = Path(scratch, "output.txt")
        state = run_command(command, seconds, output, tiny=options.tiny)
        state = "cut short" if state == "timeout" and seconds < longest else state
        printed = output.read_text(errors="replace").splitlines()
        # a record is the line of a file, or one that is printed, which the log can spare
        lines = [line for line in printed if not line.startswith('{"')]
        records = [line for line in printed if line.startswith('{"')]
        for file in Path(scratch).glob("*.jsonl"):
            records = file.read_text().splitlines()
    with (options.output / "log.txt").open("a", encoding="utf-8") as log:
        text = "\n".join(lines)[-40_000:]
        print(f"##### {part.name}: {shlex.join(command)}\n{text}\n", file=log)
    summary = next((line.strip("= ") for line in reversed(lines) if line.strip()), "")
    record: Row = {}
    # what was killed may have printed half of it
    with contextlib.suppress(ValueError, IndexError):
        record = json.loads(records[-1])
    return {"state": state, "summary": summary[:200], "record": record}


def line_of_part(facts: Row) -> str:
    return f"{facts['part']:12} {facts['state']:9} {facts['seconds']:4.0f}  {facts['summary']}"


def profile_step(row: Row, tiny: bool, folder: Path) -> None:
    """Milliseconds of a step, of its host and of its kernels; the last are missing on a CPU."""
    return_free_memory(DEVICE)
    length, size, layers = (64, 2, 1) if tiny else (512, 128, None)
    facts: Row = {"seq_len": length, "batch_size": size, "layers": layers, "dtype": _DTYPE}
    case = Case(model="pretraining", mixer=row["mixer"], device=DEVICE.type, **facts)
    train = Workload(case).train
    for number in range(3):
        train(number)
    wall, host = sorted(_timed(lambda: train(0)) for _ in range(3))[1]
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
        train(1)
        synchronise(DEVICE)
    averages = found.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with (folder / "profile.txt").open("a", encoding="utf-8") as file:
        table = averages.table(sort_by=key, row_limit=40, max_name_column_width=90)
        print(f"{row['mixer']}, {size} x {length} tokens\n{table}", file=file)
    # ranges that PyTorch marks, such as the optimizer's step, cover kernels that are there, too
    kernels = [e for e in averages if e.device_type.name == "CUDA" and not e.is_user_annotation]
    row |= {"ms": wall, "host_ms": host}
    if kernels:
        kinds = dict.fromkeys(_KINDS, 0.0)
        for kernel in kernels:
            kind = next(kind for kind, name in _KINDS.items() if re.search(name, kernel.key))
            kinds[kind] += kernel.self_device_time_total / 1e3
        row |= {f"{kind} ms": ms for kind, ms in kinds.items()}
        row["launches"] = sum(kernel.count for kernel in kernels)
        row["idle"] = 1 - sum(kinds.values()) / wall


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds until the result of a call is there, and until the host is done with it."""
    synchronise(DEVICE)
    start = time.perf_counter()
    call()
    host = time.perf_counter()
    synchronise(DEVICE)
    return (time.perf_counter() - start) * 1e3, (host - start) * 1e3


def measure_latency(row: Row, tiny: bool, folder: Path) -> None:
    """Milliseconds of one sequence through the encoder, eager and captured."""
    length, calls, layers = (64, 3, 2) if tiny else (512, 50, 12)
    changes: Row = {"num_hidden_layers": layers, "max_position_embeddings": length}
    config = PoNetConfig(mixer=row["mixer"], **changes)
    torch.manual_seed(0)
    dtype = getattr(torch, _DTYPE)
    encoder = Encoder(config).to(DEVICE, dtype).eval()
    sizes: Row = {"batch_size": 1, "seq_len": length, "width": 768, "num_heads": 12, "seed": 0}
    layout = Batch(segments="text", dtype=dtype, device=DEVICE, **sizes).layout
    hidden = torch.randn(length, config.hidden_size, device=DEVICE, dtype=dtype)

    def eager(hidden: Tensor) -> Tensor:
        return encoder(hidden, layout)[-1]

    def median_ms(call: Callable[[Tensor], Any]) -> float:
        return statistics.median(_timed(lambda: call(hidden))[0] for _ in range(calls))

    with torch.no_grad():
        expected = eager(hidden)
        row["eager_ms"] = median_ms(eager)
        if DEVICE.type != "cuda":
            return
        graph: Any = torch.cuda.make_graphed_callables(eager, (hidden,))
        row["graph_ms"], output = median_ms(graph), graph(hidden)
    row["equal"], error = torch.equal(output, expected), relative_error(output, expected)
    # relative; more than rounding in half precision
    if not error <= 1e-2:
        raise ValueError(f"graph and eager output differ by {error:.1e}")


_MEASURES = {
    "profile": (profile_step, ("ponet", "attention")),
    "latency": (measure_latency, ("ponet", "attention", "fnet")),
}


def measure_here(options: argparse.Namespace) -> None:
    """Do one of `_MEASURES` for each of its mixers; one that fails does not stop the next."""
    measure, mixers = _MEASURES[options.measure]
    rows: list[Row] = [{"mixer": mixer} for mixer in mixers]
    for row in rows:
        try:
            measure(row, options.tiny, options.output)
        except FAILURES as error:
            row["failed"] = first_line(error)
    print(json.dumps({"rows": rows}))
    facts = [{k: f"{x:.3g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows]
    print("; ".join(", ".join(f"{name} {x}" for name, x in row.items()) for row in facts))
    if any("failed" in row for row in rows):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="measure a GPU in eight minutes")
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="for all parts [480]")
    add("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    add("--tiny", action="store_true", help="every part as small as can be, on a CPU too")
    add("--output", type=Path, metavar="DIR", help=f"[{RUNS}/gpu-TIME]")
    add("--data-dir", type=Path, default=Path("data/lra"), metavar="DIR", help="prepared ListOps")
    add("--text", nargs="+", default=["builtin"], metavar="DATA", help="as pretrain/run.py --data")
    add("--measure", choices=_MEASURES, help="one thing in this process, without the rest")
    options = parser.parse_args()
    folder = options.output or RUNS / f"gpu-{datetime.now():%Y%m%d-%H%M%S}"
    options.output = folder.resolve()
    return options


def main() -> None:
    """Measure part after part."""
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.measure:
        measure_here(options)
        return
    # the part that runs is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_report: ended"))
    deadline, found = time.monotonic() + options.budget, []
    try:
        for part in (part for part in PARTS if part.name in options.only):
            start = time.monotonic()
            facts = measure_part(part, options, deadline - start)
            found.append({"part": part.name, "seconds": time.monotonic() - start, **facts})
            print(line_of_part(found[-1]), flush=True)
            with (options.output / "results.jsonl").open("a", encoding="utf-8") as file:
                print(json.dumps(found[-1]), file=file)
    finally:
        print(f"\n{'part':12} {'state':9} {'s':>4}  summary")
        print("\n".join(map(line_of_part, found)), f"written: {options.output}", sep="\n\n")
    if any(facts["state"] not in ("ok", "left out", "cut short") for facts in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
