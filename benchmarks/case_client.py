"""Starts the process of a case, asks it for steps, and says why there is no answer."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workloads import Case

Row = dict[str, Any]

OK = "ok"
OUT_OF_MEMORY = "out of memory"
TIMEOUT = "timeout"
SKIPPED = "skipped (over budget)"
UNAVAILABLE = "not available"
FAILED = "failed"

PROCESS = Path(__file__).with_name("case_process.py")
# threads that wait for each other by spinning take many times as long where cores are shared
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}


class CaseStopped(Exception):
    """A case that gives no further figures."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


class CaseProcess:
    """A case in a process of its own that works when asked."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._process = subprocess.Popen(
            [sys.executable, str(PROCESS), json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**_ENVIRONMENT, **os.environ},
        )

    def ask(self, seconds: float, **request: Any) -> Row:
        """Send a request and wait for the answer.

        Args:
            seconds: how long to wait; then the process is ended.
            **request: as `case_process.py` describes.

        Raises:
            CaseStopped: out of memory, timeout, or an error in the process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # a process that has ended has said why already
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], max(seconds, 0.0))
        if not ready:
            self.close()
            raise CaseStopped(TIMEOUT, f"{request['do']} took more than {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "out_of_memory" in answer:
            raise CaseStopped(OUT_OF_MEMORY, answer["out_of_memory"])
        if "unavailable" in answer:
            raise CaseStopped(UNAVAILABLE, answer["unavailable"])
        if "failed" in answer:
            raise CaseStopped(FAILED, answer["failed"])
        return answer

    def _ended(self) -> CaseStopped:
        code = self._process.wait()
        # the kernel ends processes in this way when memory runs out
        if code == -signal.SIGKILL:
            return CaseStopped(OUT_OF_MEMORY, "the system killed the process")
        how = f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return CaseStopped(FAILED, f"the process ended with {how}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                # an unread request
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
