"""Measure a GPU in eight minutes, what matters most first, and say how it stands to the goals.

    python benchmarks/gpu_report.py                              # all parts, within 480 s
    python benchmarks/gpu_report.py --only listops pretrain --budget 300
    python benchmarks/gpu_report.py --tiny                       # does it all run? a CPU will do

Each of `PARTS` is a process group of its own with a time limit; one that fails or takes too long
does not stop the next. The folder gets parts.tsv (a line a part, as they end), results.jsonl (their
records), log.txt (what they printed) and profile.txt. The exit status is 1 when a part failed, 0
when all ran, were left out for a reason that is given, or were cut short by the budget.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
_LOG_CHARACTERS = 40_000
"""Of a part; what is in the middle of more is cut out."""
_MOST_READ = 2**24
_VERDICTS = ("met", "below target", "below floor")


def _checks(record: Record) -> str:
    bad = record["failed"]
    first = f", first failure: {bad[0]}" if bad else ""
    return f"{len(record['rows']) - len(bad)} of {len(record['rows'])} right{first}"


def _ceilings(record: Record) -> str:
    rates = ", ".join(f"{name} {x:.3g}" for name, x in record["matmul_tflop_per_s"].items())
    return f"copy {record['copy_gb_per_s']:,.0f} GB/s, products in TFLOP/s: {rates}"


def _speed(record: Record) -> str:
    failed = [f"{row['part']} {row['dtype']} failed" for row in record["failures"]]
    return ", ".join(dict.fromkeys(failed)) or "; ".join(
        f"mixer {row['batch_size']}x{row['seq_len']} {row['segments']} {row['ms']['ours']:.2f} ms, "
        f"{row['over_ours']['public']:.1f}x public"
        for row in record["rows"]
        if (row["part"], row["mode"]) == ("mixer", "fwd+bwd")
    )


def _mixers(record: Record) -> str:
    """PoNet's steps a second over those of the others, at each length."""

    def at_length(ponet: Record) -> str:
        if not ponet["train"]:
            return f"ponet {ponet['status']}"
        return ", ".join(
            f"{row['train']['ms'] / ponet['train']['ms']:.2f}x {row['mixer']}"
            for row in record["rows"]
            if row["seq_len"] == ponet["seq_len"] and row["train"] and row is not ponet
        )

    ours = [row for row in record["rows"] if row["mixer"] == "ponet"]
    return "; ".join(f"{row['seq_len']} tokens: {at_length(row)}" for row in ours)


def _profile(record: Record) -> str:
    return "; ".join(
        f"{row['mixer']} {row['ms']:.1f} ms, host {row['host_ms']:.1f}"
        + (f", {row['launches']} launches, idle {row['idle']:.0%}" if row["launches"] else "")
        for row in record["rows"]
    )


def _steps(record: Record) -> str:
    def figure(row: Record) -> str:
        return f"{row['train']['tokens_per_s'] / 1e3:,.1f}k" if row["train"] else row["status"]

    return "tokens/s: " + ", ".join(f"{row['mixer']} {figure(row)}" for row in record["rows"])


def _latency(record: Record) -> str:
    def figure(row: Record) -> str:
        if row["reason"] or row["graph_ms"] is None:
            return row["reason"] or f"eager {row['eager_ms']:.2f} ms"
        bits = "equal" if row["equal"] else "rounded otherwise"
        return f"eager {row['eager_ms']:.2f} ms, graph {row['graph_ms']:.2f} ms ({bits})"

    return "; ".join(f"{row['mixer']} {figure(row)}" for row in record["rows"])


def _listops(record: Record) -> str:
    (run,) = record["runs"]
    accuracies = f"{run['test_accuracy']:.1%} right, commonest class {run['majority_rate']:.1%}"
    return f"{accuracies}, {run['steps']} steps, {run['steps_per_s']:.3g} a second"


def _pretrain(record: Record) -> str:
    mlm, sso = (
        f"{kind} {record[f'{kind}_accuracy']:.3f} (commonest {record[f'{kind}_baseline']:.3f})"
        for kind in ("mlm", "sso")
    )
    return f"{mlm}, {sso}, {record['steps']} steps, {record['tokens_per_second']:,.0f} tokens/s"


@dataclass(frozen=True)
class Part:
    """Something to measure, by a program that prints its record as a line of JSON."""

    name: str
    seconds: float
    """The longest it may take."""
    command: str
    """Names in braces are filled in by `_fill_in`."""
    tiny: str | None
    """Flags that make it small enough for a CPU; None: it needs a GPU in any case."""
    headline: Callable[[Record], str] | None = None
    """The record in a few words; None: the last line that was printed."""
    packages: tuple[str, ...] = ()
    """What must be installed."""
    programs: tuple[str, ...] = ()
    """What must be on the path."""
    least: float | None = None
    """Seconds without which it is not begun; None: a third of the longest."""


_CHECKS = "{python} benchmarks/gpu_checks.py "
_SPEED = (
    "{python} benchmarks/op_speed.py --no-compile --repeats 3 --tokens 65536 --output {scratch} "
)
_SMALL = "--tokens 80 --seq-len 40 --width 24 --heads 3 --repeats 1 --parts pooling mixer"
_PROFILE = "{python} benchmarks/gpu_profile.py "
# blocks of PyTorch's own allocator would hide a step beyond the end of a tensor
_MEMCHECK = (
    "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "
)
_STEPS = (
    "{python} benchmarks/pretraining.py --mixers ponet attention:flash attention:cudnn fnet "
    "--no-compile --pipeline-tokens 0 --rounds 3 --budget {minutes} --output {scratch}"
)
_MIXERS = (
    "{python} benchmarks/speed_memory.py --mixers ponet attention_naive attention fnet "
    "--seq-len 512 4096 16384 --rounds 2 --budget {minutes} --output {scratch}"
)
_LISTOPS = (
    "{python} lra/run.py --task listops --model ponet --precision bf16 --data-dir {data_dir} "
    "--output-dir {scratch}/lra"
)
_FEW_TREES = (
    "--config debug --data-dir {scratch}/data --num-examples 50 --steps 2 --eval-every 2 "
    "--eval-batches 1 --test-examples 8"
)
_PRETRAIN = (
    "{python} pretrain/run.py --config small --data {text} --precision bf16 --steps 800 "
    "--eval-every 400 --cache-dir {scratch}/cache --output-dir {scratch}/pretrain"
)
_FEW_WORDS = "--config debug --max-characters 300000 --steps 4 --eval-every 4"

PARTS = [
    Part("card", 40, _CHECKS + "card", "", lambda r: "{device}, torch {torch}".format(**r["card"])),
    Part("ceilings", 40, _CHECKS + "ceilings", "--tiny", _ceilings),
    Part("operators", 90, _CHECKS + "operators", "--tiny", _checks),
    Part("tests", 110, "{python} -m pytest -q --tb=short {tests}", "", packages=("pytest",)),
    Part(
        "memcheck",
        60,
        _MEMCHECK + _CHECKS + "operators --tiny",
        None,
        programs=("compute-sanitizer",),
    ),
    Part("speed-bf16", 80, _SPEED + "--segments text --dtype bfloat16", _SMALL, _speed),
    Part(
        "speed-shapes",
        40,
        _SPEED + "--dtype bfloat16 --seq-len 4096 --parts pooling mixer",
        _SMALL + " --segments text ones documents",
        _speed,
    ),
    Part("speed-fp32", 50, _SPEED + "--segments text --dtype float32", _SMALL, _speed),
    Part("profile", 50, _PROFILE + "steps --text {output}/profile.txt", "--tiny", _profile),
    Part("steps", 80, _STEPS, "--layers 1 --seq-len 64 --tokens 128 --rounds 1", _steps),
    Part("mixers", 90, _MIXERS, "--seq-len 64 --batch-size 2 --rounds 1", _mixers),
    Part("latency", 50, _PROFILE + "latency", "--tiny", _latency),
    Part("listops", 240, _LISTOPS, _FEW_TREES, _listops, least=100),
    Part(
        "pretrain",
        150,
        _PRETRAIN,
        _FEW_WORDS,
        _pretrain,
        packages=("sentencex",),
        least=60,
    ),
]
"""All parts, in order of value."""


def missing(part: Part, tiny: bool) -> str | None:
    """Why a part cannot run here; None when it can."""
    if not torch.cuda.is_available() and (part.tiny is None or not tiny):
        return "no GPU" if tiny else "no GPU; --tiny is for a CPU, too"
    names = [name for name in part.packages if importlib.util.find_spec(name) is None]
    names += [name for name in part.programs if shutil.which(name) is None]
    return f"not installed: {', '.join(names)}" if names else None


def _fill_in(part: Part, options: argparse.Namespace, scratch: str, seconds: float) -> list[str]:
    """The words of a part's command."""
    names = {"python": sys.executable, "scratch": scratch, "output": str(options.output)}
    names["data_dir"] = str(options.data_dir.resolve())
    # the rest goes into starting and drawing
    names["minutes"] = f"{0.75 * seconds / 60:.2f}"
    quoted = {name: shlex.quote(value) for name, value in names.items()}
    quoted["text"] = shlex.join(options.text)
    quoted["tests"] = shlex.join(_tests(options.tiny))
    command = f"{part.command} {part.tiny or ''}" if options.tiny else part.command
    return shlex.split(command.format(**quoted))


def _tests(tiny: bool) -> list[str]:
    """Files and flags for pytest: the tests marked `gpu`, which run on the device."""
    if tiny:
        return ["tests/test_kernels.py", "-k", "tied or exact or choice or refused"]
    # none of the other files is imported, because some need packages that may be missing
    files = [
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("tests/test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    workers = ["-n", str(min(len(os.sched_getaffinity(0)), 12))]
    parallel = workers if importlib.util.find_spec("xdist") else []
    return [*files, "-m", "gpu", *parallel]


def _environment(tiny: bool) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    # threads that wait for each other by spinning are slow where cores are shared
    own["OMP_WAIT_POLICY"] = "passive"
    return os.environ | own | ({"OMP_NUM_THREADS": "1"} if tiny else {})


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends in time. It is not reaped: its group's number stays its own."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.05)
    return False


def _run(command: list[str], seconds: float, log: BinaryIO, environment: dict[str, str]) -> str:
    """Run a command in a group of its own, which is gone afterwards: ok, or how it ended."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    in_time = False
    try:
        in_time = _ended(process, seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if not in_time:
        return "timeout"
    return "ok" if code == 0 else f"signal {-code}" if code < 0 else f"status {code}"


def _take_output(log: BinaryIO, start: int) -> tuple[list[str], Record]:
    """What a part printed and its record, the last line of JSON; the file keeps the first alone."""
    log.seek(max(start, log.seek(0, os.SEEK_END) - _MOST_READ))
    lines, record = log.read().decode(errors="replace").splitlines(), {}
    for number in reversed(range(len(lines))):
        with contextlib.suppress(ValueError):
            if lines[number].startswith("{"):
                record = json.loads(lines.pop(number))
                break
    text = "\n".join(lines)
    if len(text) > _LOG_CHARACTERS:
        cut = _LOG_CHARACTERS // 4
        text = f"{text[:cut]}\n[cut]\n{text[-3 * cut :]}"
    log.truncate(start)
    log.write(f"{text}\n\n".encode())
    log.flush()
    return [line for line in lines if line.strip()], record


def _headline(part: Part, record: Record, lines: list[str]) -> str:
    # what a part that failed left may be no such record
    with contextlib.suppress(LookupError, TypeError, ValueError):
        if part.headline and record:
            return part.headline(record)
    return lines[-1].strip("= ") if lines else ""


def _verdicts(goals: list[Record]) -> str:
    """The worst figure of each goal."""
    worst: dict[str, Record] = {}
    for goal in sorted(goals, key=lambda goal: _VERDICTS.index(goal["verdict"])):
        worst[goal["goal"]] = goal
    return ", ".join(f"{name} {g['measured']:.3g} {g['verdict']}" for name, g in worst.items())


class Report:
    """The files of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._deadline = time.monotonic() + options.budget
        self.lines: list[list[str]] = []
        """Of the table: part, state, seconds, headline, verdict."""
        self.below_floor: list[Record] = []

    def measure(self, part: Part, log: BinaryIO, scratch: str) -> None:
        """Run a part, or say why not, and keep what came of it."""
        start, left = time.monotonic(), self._deadline - time.monotonic()
        reason = missing(part, self._options.tiny)
        least = 1.0 if self._options.tiny else part.least or part.seconds / 3
        if reason is None and left < least:
            reason = f"needs {least:.0f} s, {max(left, 0):.0f} s are left"
        if reason:
            self._keep(part, "left out", 0.0, {}, [reason])
            return
        seconds = min(part.seconds, left)
        command = _fill_in(part, self._options, scratch, seconds)
        log.write(f"##### {part.name}: {shlex.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        state = _run(command, seconds, log, _environment(self._options.tiny))
        if state == "timeout" and seconds < part.seconds:
            state = "cut short"
        lines, record = _take_output(log, begin)
        self._keep(part, state, time.monotonic() - start, record, lines)

    def _keep(
        self, part: Part, state: str, seconds: float, record: Record, lines: list[str]
    ) -> None:
        # goals are for full size
        goals = [] if self._options.tiny else record.get("goals", [])
        self.below_floor += [goal for goal in goals if goal["verdict"] == _VERDICTS[-1]]
        headline = _headline(part, record, lines)[:200].replace("\t", " ")
        line = [part.name, state, f"{seconds:.0f}", headline, _verdicts(goals)]
        self.lines.append(line)
        print(_in_columns(line), flush=True)
        with (self._options.output / "parts.tsv").open("a", encoding="utf-8") as file:
            print("\t".join(line), file=file)
        facts = {"part": part.name, "state": state, "seconds": seconds, "headline": headline}
        with (self._options.output / "results.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps({**facts, "record": record}), file=file)

    def print_table(self) -> None:
        """All parts, and the goals that were missed by far."""
        print(f"\n{_in_columns(['part', 'state', 's', 'headline', 'goals'])}")
        for line in self.lines:
            print(_in_columns(line))
        for goal in self.below_floor:
            floor = f"{goal['measured']:.3g}, floor {goal['floor']:.3g}"
            print(f"below floor: {goal['goal']} {goal['quantity']}: {floor}")
        print(f"\nwritten: {self._options.output}")


def _in_columns(line: list[str]) -> str:
    name, state, seconds, headline, verdict = line
    return f"{name:12} {state:9} {seconds:>4}  {headline}" + (f"  [{verdict}]" if verdict else "")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="measure a GPU in eight minutes")
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="for all parts [480]")
    add("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    add("--tiny", action="store_true", help="every part as small as can be, on a CPU too")
    add("--output", type=Path, metavar="DIR", help="[runs/benchmarks/gpu-TIME]")
    add("--data-dir", type=Path, default=Path("data/lra"), metavar="DIR", help="prepared ListOps")
    add("--text", nargs="+", default=["builtin"], metavar="DATA", help="as pretrain/run.py --data")
    options = parser.parse_args()
    folder = options.output or Path(f"runs/benchmarks/gpu-{datetime.now():%Y%m%d-%H%M%S}")
    options.output = folder.resolve()
    return options


def main() -> None:
    """Measure part after part."""
    options = parse_options()
    # the part that runs is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_report: ended"))
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options)
    with (
        tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch,
        (options.output / "log.txt").open("a+b") as log,
    ):
        try:
            for part in PARTS:
                if part.name in options.only:
                    report.measure(part, log, scratch)
        finally:
            report.print_table()
    if any(state not in ("ok", "left out", "cut short") for _, state, *_ in report.lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
