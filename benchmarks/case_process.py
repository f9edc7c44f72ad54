"""One case of a whole-model benchmark in a process of its own; `case_client.py` starts it.

    python benchmarks/case_process.py CASE_AS_JSON

Reads a request a line from stdin and answers each with a line of JSON on stdout:

    {"do": "build"}                                   model, optimizer, batches
    {"do": "train" | "infer", "steps": n, "skip": k}  n steps, of which the first k are not timed
"""

import json
import os
import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import Any, TextIO

import torch
from case_memory import MemoryMeter, is_out_of_memory, is_unavailable, missing_memory
from torch import Tensor
from workloads import Case, Workload, build_workload

from ponet.run.device import return_free_memory, synchronise

Answer = dict[str, Any]

# long enough for every mixer's blocks and windows, too short to count
_REHEARSAL_TOKENS = 64
_MIB = 2**20


class _Clock:
    """Milliseconds between marks: events on a GPU, so that steps can follow without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note a point in time of the device's work."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Times between neighbouring marks; waits for the device."""
        synchronise(self._device)
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type == "cuda":
            return [first.elapsed_time(second) for first, second in pairs]
        return [(second - first) * 1e3 for first, second in pairs]


class CaseServer:
    """Answers the requests about one case."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._device = torch.device(case.device)
        self._workload: Workload | None = None
        self._meter: MemoryMeter | None = None

    def answer(self, request: dict[str, Any]) -> Answer:
        """Do what is asked; no memory and no such kernel are answers, other errors are not."""
        try:
            if request["do"] == "build":
                return self._build()
            return self._steps(request["do"], request["steps"], request["skip"])
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and is_unavailable(error):
                return {"unavailable": f"{self._case.mixer} does not run on this device and dtype"}
            if not is_out_of_memory(error):
                raise
            message = missing_memory(error)
        # outside the handler, whose traceback would keep the tensors alive
        return_free_memory(self._device)
        return {"out_of_memory": message}

    def _build(self) -> Answer:
        self._rehearse()
        self._meter = MemoryMeter(self._device, self._case.memory_limit_mib)
        self._meter.begin()
        self._workload = build_workload(self._case)
        return {
            "input_mib": self._workload.input_bytes / _MIB,
            "state_mib": self._workload.state_bytes / _MIB,
            "parameters": self._workload.num_parameters,
        }

    def _rehearse(self) -> None:
        """A tiny step, so that what libraries set up once is not counted."""
        tokens = min(self._case.seq_len, _REHEARSAL_TOKENS)
        tiny = replace(self._case, seq_len=tokens, batch_size=1, layers=1, compile=False)
        build_workload(tiny).train(0)
        synchronise(self._device)

    def _steps(self, kind: str, steps: int, skip: int) -> Answer:
        assert self._workload is not None
        assert self._meter is not None
        step = self._workload.train if kind == "train" else self._workload.infer
        self._meter.begin()
        clock = _Clock(self._device)
        clock.mark()
        out = None
        for number in range(steps):
            # the result of the step before must not take room beside this one
            out = None
            out = step(number)
            clock.mark()
        times = clock.intervals_ms()
        assert out is not None
        self._check(kind, out)
        peak = self._meter.peak_mib()
        del out
        return_free_memory(self._device)
        return {"ms": times[skip:], "skipped_ms": times[:skip], "peak_mib": peak}

    def _check(self, kind: str, out: Tensor) -> None:
        assert self._workload is not None
        shape = () if kind == "train" else self._workload.infer_shape
        if tuple(out.shape) != shape:
            raise ValueError(f"{kind}: expected shape {shape}, found {tuple(out.shape)}")
        if not bool(out.isfinite().all()):
            raise ValueError(f"{kind}: the result is not finite")


def _report_failures(channel: TextIO) -> None:
    """Answer with the error that ends the process, whose traceback goes to stderr as usual."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = str(error).strip().splitlines()
        reason = f"{kind.__name__}: {lines[0]}" if lines else kind.__name__
        print(json.dumps({"failed": reason[:300]}), file=channel, flush=True)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def main() -> None:
    """Serve one case until stdin ends."""
    # whatever libraries print goes to stderr; stdout is for answers
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _report_failures(channel)
    case = Case(**json.loads(sys.argv[1]))
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    server = CaseServer(case)
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    main()
