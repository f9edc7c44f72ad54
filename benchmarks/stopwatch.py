"""Timing of candidates that take turns in one process, and of a copy beside them."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from parts import Candidate
from torch import Tensor

from ponet.run.device import synchronise

# a turn of a candidate lasts about this long, so that short calls are measured many times
_TURN_MS = 20.0
_MOST_CALLS = 50
# the launch queue of a GPU holds about a thousand kernels, more waiting would not fill it further
_MOST_AHEAD_MS = 30.0
_CYCLES_PER_MS = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile."""

    ms: float
    p20: float
    p80: float
    backward_ms: float | None = None
    """Median of the backward pass alone, where there is one."""


@dataclass(frozen=True)
class _Moment:
    """A point in time of the device's work: an event on a GPU, seconds on a CPU."""

    event: torch.cuda.Event | None
    seconds: float

    @classmethod
    def now(cls, device: torch.device, clock: Callable[[], float]) -> "_Moment":
        if device.type != "cuda":
            return cls(None, clock())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(event, 0.0)

    def ms_until(self, later: "_Moment") -> float:
        if self.event is None or later.event is None:
            return (later.seconds - self.seconds) * 1e3
        return self.event.elapsed_time(later.event)


class OtherLoad:
    """Processors that other programs keep busy: what makes timings on a CPU unreliable."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return busy - sum(os.times()[:4]), time.perf_counter()

    def cores(self) -> float:
        """Their number since this object was made."""
        (before, start), (after, end) = self._start, self._read()
        return max(after - before, 0.0) / max(end - start, 1e-6)


@dataclass(frozen=True)
class _Turn:
    """How a candidate takes its turns."""

    upstream: Tensor | None
    calls: int = 1
    ahead_ms: float = 0.0
    """Time that the host needs to queue the calls; the GPU is kept waiting for so long."""


@dataclass
class Stopwatch:
    """Times calls of candidates on a device.

    On a GPU the calls of a turn are queued before the first one starts, so that what is timed is
    the work of the GPU; for latency each call is waited for, and the host's time counts.
    """

    device: torch.device
    repeats: int
    latency: bool
    clock: Callable[[], float] = time.perf_counter
    """On a CPU: seconds, those of the clock on the wall or those that this process worked."""

    def measure(
        self,
        candidates: list[Candidate],
        backward: bool,
        give_up: Callable[[str, str], None] | None = None,
    ) -> dict[str, Timing]:
        """Time candidates in turns.

        Args:
            candidates: to be timed; the first of them must run.
            backward: forward and backward pass, or forward alone without recording a graph.
            give_up: called with the name of a later candidate that cannot run, and the reason; it
                is then left out. None: nothing may fail.
        """
        turns: dict[str, _Turn] = {}
        for c in candidates:
            try:
                turns[c.name] = self._plan(c, backward and not c.copies)
            # out of memory, or no such attention kernel
            except RuntimeError as error:
                if give_up is None or c is candidates[0]:
                    raise
                give_up(c.name, f"{type(error).__name__}: {error}".splitlines()[0][:200])
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
        for _ in range(self.repeats):
            for c in candidates:
                if c.name in turns:
                    samples[c.name] += self._take(c, turns[c.name])
        return {name: _timing(found, backward) for name, found in samples.items()}

    def _plan(self, candidate: Candidate, backward: bool) -> _Turn:
        """Find how many calls fill a turn, which warms up too."""
        turn = _Turn(_upstream(candidate) if backward else None)
        start = time.perf_counter()
        total, _ = self._take(candidate, turn)[0]
        # of two calls, which is at least what queueing one takes
        host_ms = (time.perf_counter() - start) * 1e3
        calls = int(min(max(_TURN_MS / total, 1), _MOST_CALLS))
        queues = self.device.type == "cuda" and not self.latency
        return replace(turn, calls=calls, ahead_ms=min(host_ms * calls, _MOST_AHEAD_MS) * queues)

    def _take(self, candidate: Candidate, turn: _Turn) -> list[tuple[float, float]]:
        """Milliseconds of each call of a turn, and of its backward pass.

        The first call is not timed: it finds caches and freed memory as another candidate left
        them.
        """
        self._call(candidate, turn.upstream, 0)
        synchronise(self.device)
        if turn.ahead_ms:
            torch.cuda._sleep(int(turn.ahead_ms * _CYCLES_PER_MS))
        marks = []
        for number in range(1, turn.calls + 1):
            marks.append(self._call(candidate, turn.upstream, number))
            if self.latency:
                synchronise(self.device)
        synchronise(self.device)
        return [(start.ms_until(end), middle.ms_until(end)) for start, middle, end in marks]

    def _call(
        self, candidate: Candidate, upstream: Tensor | None, number: int
    ) -> tuple[_Moment, _Moment, _Moment]:
        """Moments before a call, before its backward pass and after it."""
        values = candidate.sets[number % len(candidate.sets)]
        leaves = candidate.leaves(values)
        start = self._now()
        if upstream is None:
            with torch.no_grad():
                candidate.call(values)
            end = self._now()
            return start, end, end
        out = candidate.call(values)
        middle = self._now()
        torch.autograd.grad(out, leaves, upstream)
        return start, middle, self._now()

    def _now(self) -> _Moment:
        return _Moment.now(self.device, self.clock)


def _upstream(candidate: Candidate) -> Tensor:
    with torch.no_grad():
        return torch.randn_like(candidate.call(candidate.sets[0]))


def _timing(samples: list[tuple[float, float]], backward: bool) -> Timing:
    totals = [total for total, _ in samples]
    fifths = (
        statistics.quantiles(totals, n=5, method="inclusive") if len(totals) > 1 else totals * 4
    )
    return Timing(
        ms=statistics.median(totals),
        p20=fifths[0],
        p80=fifths[3],
        backward_ms=statistics.median(part for _, part in samples) if backward else None,
    )


def copy_candidate(num_bytes: int, device: torch.device, num_sets: int) -> Candidate:
    """A copy that moves so many bytes, half of them read and half written."""
    half = max(num_bytes // 2 // 4, 1)
    sets = [
        {
            "source": torch.randn(half, device=device),
            "target": torch.empty(half, device=device).fill_(0.0),
        }
        for _ in range(num_sets)
    ]
    return Candidate("copy", lambda v: v["target"].copy_(v["source"]), sets, copies=True)


def copy_rate(device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    num_bytes = 2**28 if device.type == "cpu" else 2**32
    copy = copy_candidate(num_bytes, device, 1)
    timing = Stopwatch(device, 5, False, clock).measure([copy], backward=False)
    return num_bytes / timing["copy"].ms * 1e3
