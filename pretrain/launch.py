"""Starting a rank under `deepspeed`, `torchrun` or plain `python`, and its last word on stdout."""

import os
import select
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among all of a run."""

    rank: int
    """0 to world_size - 1."""
    local_rank: int
    """Place among the processes of this machine."""
    world_size: int
    """Processes of the run."""
    device: torch.device
    """Where this process computes."""
    patient_group: dist.ProcessGroup
    """For waiting as long as it takes, while one process prepares data."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rendezvous_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables a launcher sets, for a process that was started without one.

    Args:
        environment: the variables of the process; those set stay as they are.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    missing = {name: value for name, value in alone.items() if name not in environment}
    if "MASTER_PORT" not in environment:
        missing["MASTER_PORT"] = str(_free_port())
    return missing


def start() -> Launch:
    """Join the run: device, threads, process groups."""
    os.environ.update(rendezvous_variables(os.environ))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    assert isinstance(patient_group, dist.ProcessGroup)
    return Launch(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=device,
        patient_group=patient_group,
    )


def finish() -> None:
    """Leave the run."""
    dist.destroy_process_group()


def _watch_launcher() -> int | None:
    """A descriptor that becomes readable when DeepSpeed's launcher ends, if one started us."""
    parent = os.getppid()
    try:
        if "deepspeed.launcher.launch" in psutil.Process(parent).cmdline():
            return os.pidfd_open(parent)
    # no such process any more, or a system without these descriptors
    except (psutil.Error, AttributeError, OSError):
        pass
    return None


def print_last(line: str) -> None:
    """Print the line that ends stdout.

    DeepSpeed's launcher logs to stdout after its processes have ended. A forked child that waits
    for the launcher to be gone prints after it; the launcher's caller still waits then.
    """
    sys.stdout.flush()
    gone = _watch_launcher()
    if gone is None:
        print(line, flush=True)
        return
    if os.fork():
        os.close(gone)
        return
    # the launcher ends a second after this process does; should it hang, the line still comes
    select.select([gone], [], [], 60)
    os.write(sys.stdout.fileno(), f"{line}\n".encode())
    os._exit(0)
