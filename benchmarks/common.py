"""What all benchmarks share: flags, the machine's card, files of results, the clock, memory."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

try:
    import triton
    from triton.errors import TritonError
except ModuleNotFoundError:
    triton, TritonError = None, RuntimeError

from ponet.files import write_text
from ponet.run.device import peak_memory_mib, return_free_memory, source_commit
from ponet_kernels import active_backend

Row = dict[str, Any]
"""Figures or facts by name, as they stand in the JSON documents."""

RESULTS = Path(__file__).parent / "results"
"""Measurements that the documentation quotes; they are tracked."""
RUNS = Path("runs/benchmarks")
"""Where everything else goes, below the current folder."""
MIB = 2**20

# the rest is left to other programs, so that no machine starts to swap
_USABLE_MEMORY = 0.85


def above_zero(text: str) -> int:
    """Type of a flag: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return int(text)


NUMBER: Row = {"type": above_zero, "metavar": "N"}
"""Arguments of `add_argument` for such a flag."""


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the flags that every benchmark has."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="[a GPU if there is one]")
    add("--seed", default=0, type=int)
    add("--output", type=Path, metavar="DIR", help=f"folder of the files [{RUNS}]")
    add("--record", action="store_true", help="keep them in benchmarks/results, which is tracked")
    options = parser.parse_args()
    if options.output and options.record:
        parser.error("--output: not allowed with argument --record")
    options.output = options.output or (RESULTS if options.record else RUNS)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def machine_card(device: str) -> Row:
    """What figures depend on: machine, versions, commit, command."""
    cores = len(os.sched_getaffinity(0))
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        machine = {
            "device": found.name,
            "device memory": f"{found.total_memory / 2**30:.1f} GiB",
            "driver": subprocess.getoutput(driver).partition("\n")[0],
            "cuda": torch.version.cuda or torch.version.hip,
        }
    else:
        machine = {
            "device": f"cpu-{cores}core",
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "load": f"{os.getloadavg()[0]:.1f} before the run",
        }
    return {
        **machine,
        "cores": cores,
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "none",
        "commit": source_commit(),
        "date": datetime.date.today().isoformat(),
        "backend": active_backend(device),
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.is_file() else "")
    return found[1] if found else platform.processor() or platform.machine()


def print_card(card: Row) -> None:
    """One fact per line."""
    width = max(map(len, card))
    print("\n".join(f"{name:>{width}}: {value}" for name, value in card.items()), flush=True)


def save_record(record: Row, folder: Path) -> tuple[Path, int]:
    """Append a record, which has a card, to the file of its device and day: the file, the line."""
    card = record["card"]
    device = re.sub(r"[^a-z0-9]+", "-", card["device"].lower()).strip("-")
    path = folder / f"{device}_{card['date'].replace('-', '')}.jsonl"
    earlier = path.read_text(encoding="utf-8").rstrip("\n") if path.is_file() else ""
    text = f"{earlier}\n{json.dumps(record)}\n".lstrip("\n")
    write_text(path, text)
    print(f"\nwritten: {path}")
    return path, text.count("\n")


def percentiles(samples: Sequence[float]) -> tuple[float, ...]:
    """Median, 20th and 80th percentile."""
    return tuple(np.percentile(samples, (50, 20, 80)).tolist())


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) / 2**10


class MemoryMeter:
    """Peak memory above the level at which it was made: resident on a CPU, allocated on a GPU.

    It also limits what this process may take, so that too much is an error and not the end of it.
    """

    def __init__(self, device: torch.device, limit_mib: float | None = None) -> None:
        self.device = device
        return_free_memory(device)
        limit = limit_mib or torch.inf
        if device.type == "cuda":
            self._start = torch.cuda.memory_allocated(device) / MIB
            free, total = torch.cuda.mem_get_info(device)
            limit = min(limit * MIB, _USABLE_MEMORY * free)
            torch.cuda.set_per_process_memory_fraction(limit / total, device)
        else:
            self._start = _status_mib("VmRSS")
            limit = min(limit * MIB, _USABLE_MEMORY * psutil.virtual_memory().available)
            bound = int(_status_mib("VmData") * MIB + limit)
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))

    def begin(self) -> None:
        """Forget the peak so far."""
        return_free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        # where this is not permitted, the peak is that of the whole process so far
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """The highest level since `begin`, in MiB above the start."""
        if self.device.type == "cuda":
            return peak_memory_mib(self.device) - self._start
        # unlike getrusage, not inherited from the parent process
        return _status_mib("VmHWM") - self._start


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "bad_alloc", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def first_line(error: BaseException) -> str:
    """What an error says, for a row of a table: the bytes that were missing, or its first line."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    if asked:
        return f"no room for another {int(asked[1]) / MIB:,.0f} MiB"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
