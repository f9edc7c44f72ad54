"""Many runs in one command: their folders, what is finished, processes, locks.

config.json   what decides the figures of the run, commit, command; another run is refused
result.json   the figures, when the run is finished
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ponet.checkpoint import CheckpointError
from ponet.files import write_json
from ponet.run.cli import USER_ERRORS, UsageError, errors_in_one_line
from ponet.run.device import source_commit
from ponet.run.log import set_up_logging
from ponet.run.trainer import RunOptions

_CONFIG, RESULT = "config.json", "result.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """One run of a command and the records in its folder, as handed to a process: pickled."""

    folder: Path
    """Its last part is the name of the run."""
    options: RunOptions

    @property
    def name(self) -> str:
        """For log and errors."""
        return self.folder.name

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides the figures, as JSON; raises `USER_ERRORS`."""

    @abstractmethod
    def execute(self) -> dict[str, Any]:
        """Do the run or continue it; returns what `finish` gives. Raises `USER_ERRORS`."""

    def finished(self) -> dict[str, Any] | None:
        """The figures; None when something is left to do.

        A folder with another run is a UsageError, one with a damaged file a CheckpointError.
        """
        record = _read_json(self.folder / _CONFIG)
        if record is None:
            return None
        found = record.get("identity", {})
        other = [
            f"{name} {found.get(name)!r}, now {value!r}"
            for name, value in json.loads(json.dumps(self.identity())).items()
            if found.get(name) != value
        ]
        if other:
            raise UsageError(
                f"{self.folder}: holds a run with other settings ({'; '.join(other)}); give "
                "another --output-dir, or delete the folder"
            )
        return _read_json(self.folder / RESULT)

    def begin(self, details: Mapping[str, Any]) -> None:
        """Record what the run is, unless that is done."""
        if (self.folder / _CONFIG).exists():
            return
        record = {
            "identity": self.identity(),
            **details,
            "commit": source_commit(),
            "torch": torch.__version__,
            "command": sys.argv,
        }
        write_json(self.folder / _CONFIG, record)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record the figures; the checkpoints go, because a finished run is never continued."""
        result = result | {"commit": source_commit(), "run": str(self.folder)}
        write_json(self.folder / RESULT, result)
        for checkpoint in self.folder.rglob("checkpoint.pt"):
            checkpoint.unlink()
        return result


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete its folder to start the run again"
        ) from error
    return content


def choose_device(name: str) -> torch.device:
    """The device of all runs: "cpu", "cuda" or "auto", a GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UsageError("--device cuda: PyTorch finds no GPU; use cpu or auto")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def run_options(config: Any) -> RunOptions:
    """Where and how the runs of a command compute, by its settings."""
    return RunOptions(
        device=choose_device(config.device),
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // config.jobs),
        log_every=config.log_every,
        checkpoint_seconds=60 * config.checkpoint_minutes,
        shows_bar=config.jobs == 1,
    )


def run_all(
    program: str, runs: Sequence[Run], *, jobs: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Do the runs of a command that are not finished, several jobs in processes of their own.

    Returns the figures of the finished runs, then of the others in the order in which they ended;
    and what went wrong, logged when it came. A run that conflicts with its folder or its data is
    a ValueError before the first one begins.
    """
    known = [(run, run.finished()) for run in runs]
    results = [result for _, result in known if result is not None]
    left = [run for run, result in known if result is None]
    if results:
        logger.info("%d of %d runs are finished already", len(results), len(runs))
    failures: list[str] = []
    try:
        for outcome in _outcomes(left, jobs if len(left) > 1 else 1):
            if isinstance(outcome, str):
                logger.error("%s: error: %s", program, outcome)
                failures.append(outcome)
            else:
                results.append(outcome)
    except KeyboardInterrupt:
        # the pool would go on with all that was asked of it
        for process in multiprocessing.active_children():
            process.kill()
        raise
    return results, failures


def _outcomes(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any] | str]:
    if jobs == 1:
        yield from map(_attempt, runs)
        return
    # a forked process must not touch a GPU or a thread pool of its parent
    context = multiprocessing.get_context("spawn")
    # without `with`, which would wait for all runs after Ctrl-C
    pool = ProcessPoolExecutor(jobs, context, _end_with_parent)
    # Ctrl-C reaches the processes, too, which inherit that it is not for them
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    futures = [pool.submit(_attempt, run) for run in runs]
    signal.signal(signal.SIGINT, handler)
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        yield (
            "a process was killed, for want of memory perhaps; the same command goes on with the "
            "runs that are not finished, --jobs 1 does them one after the other"
        )
    pool.shutdown()


def _end_with_parent() -> None:
    """End with the parent, however that ended: not go on with a run, then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _attempt(run: Run) -> dict[str, Any] | str:
    """Do a run, in whatever process; returns its figures, or what went wrong outside."""
    set_up_logging(0)
    torch.set_num_threads(run.options.threads)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(run.folder / ".lock", blocking=False):
            # another command may have done it since this one looked
            return run.finished() or run.execute()
    except Timeout:
        return f"{run.name}: another process is at this run in {run.folder}"
    except USER_ERRORS as error:
        return f"{run.name}: {error}"


def run_program(program: str, work: Callable[[], tuple[dict[str, Any], list[str]]]) -> None:
    """The frame of a command: errors in one line, one JSON document as the last line of stdout.

    `work` returns the document and what went wrong on the way.
    """
    set_up_logging(0)
    with errors_in_one_line(program, advice="; the same command continues"):
        document, failures = work()
        print(json.dumps(document | {"failures": failures}))
        sys.exit(1 if failures else 0)
