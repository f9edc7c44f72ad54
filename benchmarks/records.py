"""What a benchmark says about its machine, and the file that it leaves its records in."""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ponet.checkpoint import write_text
from ponet.run.device import source_commit
from ponet_kernels import active_backend

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
"""Measurements that the README quotes; they are tracked."""
RUNS = Path("runs/benchmarks")
"""Where everything else goes, below the current folder."""


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be told where its files go: `output` of what is parsed."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, default=RUNS, metavar="DIR", help=f"folder of the files [{RUNS}]"
    )
    where.add_argument(
        "--record",
        dest="output",
        action="store_const",
        const=RESULTS,
        default=RUNS,
        help="keep the files in benchmarks/results, which is tracked",
    )


def cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_driver() -> str:
    """Version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.splitlines()[0]


def triton_version() -> str:
    """Version of the installed Triton, or "none"."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def machine_card(device: str, threads: int | None) -> Record:
    """What the figures of a whole model depend on.

    Args:
        device: cpu or cuda.
        threads: of the CPU; None: PyTorch's choice.
    """
    cores = len(os.sched_getaffinity(0))
    if device == "cuda":
        machine = {
            "device": torch.cuda.get_device_name(),
            "driver": gpu_driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "matmul precision": torch.get_float32_matmul_precision(),
        }
    else:
        machine = {
            "device": f"cpu-{cores}core",
            "cpu": cpu_name(),
            "threads": threads or torch.get_num_threads(),
            "waiting threads": os.environ.get("OMP_WAIT_POLICY", "passive"),
            "load": f"{os.getloadavg()[0]:.1f} before the run",
        }
    return {
        **machine,
        "cores": cores,
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": source_commit(),
        "date": datetime.date.today().isoformat(),
        "backend": active_backend(device),
        "command": shlex.join(["python", *sys.argv]),
    }


def print_card(card: Record) -> None:
    """A fact a line."""
    width = max(len(name) for name in card)
    for name, value in card.items():
        print(f"{name:>{width}}: {value}")


def append_record(record: Record, folder: Path) -> Path:
    """Append a record to the file of the device and day.

    Args:
        record: has a `card` with `device` and `date`.
        folder: where the file is, made when missing.

    Returns:
        The file, `DEVICE_DATE.jsonl`.
    """
    card = record["card"]
    device = re.sub(r"[^a-z0-9]+", "-", card["device"].lower()).strip("-")
    path = folder / f"{device}_{card['date'].replace('-', '')}.jsonl"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    if earlier and not earlier.endswith("\n"):
        earlier += "\n"
    write_text(path, earlier + json.dumps(record) + "\n")
    return path
