"""Peak memory of a process, and a limit on what it may take, so that no machine starts to swap."""

import re
import resource
from pathlib import Path

import psutil
import torch

from ponet.run.device import peak_memory_mib, return_free_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20
# left to other programs
_USABLE = 0.85


def _status_mib(field: str) -> float:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) / 2**10


def available_mib() -> float:
    """Memory in MiB that the machine, or the container, can give without swapping."""
    free = psutil.virtual_memory().available
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / _MIB


class MemoryMeter:
    """Peak memory above the level at which it was made: resident on a CPU, allocated on a GPU."""

    def __init__(self, device: torch.device, limit_mib: float | None) -> None:
        self._device = device
        return_free_memory(device)
        self._start = self._level()
        self._cap = None if limit_mib is None else self._data() + limit_mib
        if device.type == "cuda" and limit_mib is not None:
            total = torch.cuda.get_device_properties(device).total_memory / _MIB
            torch.cuda.set_per_process_memory_fraction(min(limit_mib / total, 1.0), device)

    def begin(self) -> None:
        """Forget the peak so far and, on a CPU, set the limit to what is there now."""
        return_free_memory(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        limit = self._data() + _USABLE * available_mib()
        if self._cap is not None:
            limit = min(limit, self._cap)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * _MIB), hard))
        try:
            _RESET.write_text("5")
        except OSError:
            # not permitted here: the peak is then that of the whole process so far
            return

    def peak_mib(self) -> float:
        """The highest level since `begin`, in MiB above the start."""
        if self._device.type == "cuda":
            return peak_memory_mib(self._device) - self._start
        # unlike getrusage, not inherited from the parent process
        return _status_mib("VmHWM") - self._start

    def _level(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / _MIB
        return _status_mib("VmRSS")

    def _data(self) -> float:
        return 0.0 if self._device.type == "cuda" else _status_mib("VmData")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "bad_alloc", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def is_unavailable(error: RuntimeError) -> bool:
    """Whether PyTorch says that the attention kernel asked for cannot run here."""
    return str(error).startswith(("No available kernel", "No viable backend"))


def missing_memory(error: BaseException) -> str:
    """The first line of what an out-of-memory error says, in MiB where it names bytes."""
    message = str(error)
    asked = re.search(r"tried to allocate (\d+) bytes", message)
    if asked:
        return f"no room for another {int(asked[1]) / _MIB:,.0f} MiB"
    return message.splitlines()[0] if message else type(error).__name__
