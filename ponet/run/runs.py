"""Many runs in one command: their folders, what is finished, processes, locks, errors.

config.json   what decides the figures of the run, commit, command; another run is refused
result.json   the figures, when the run is finished
"""

import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout

from ponet.checkpoint import CheckpointError
from ponet.files import write_json
from ponet.run.cli import UsageError
from ponet.run.device import source_commit
from ponet.run.log import set_up_logging
from ponet.run.trainer import RunOptions, TrainingError

USER_ERRORS = (ValueError, TrainingError, OSError)
"""Causes outside a program: usage, data, checkpoints (all ValueErrors), a diverging loss, disks."""

_CONFIG, RESULT = "config.json", "result.json"

logger = logging.getLogger(__name__)


class Run(Protocol):
    """One run of a command, as handed to a process: it can be pickled."""

    @property
    def name(self) -> str:
        """For log and errors."""
        ...

    @property
    def folder(self) -> Path:
        """Of the run alone."""
        ...

    @property
    def options(self) -> RunOptions:
        """Where to compute."""
        ...

    def finished(self) -> dict[str, Any] | None:
        """The figures, if the run is finished; raises one of `USER_ERRORS` on a conflict."""
        ...

    def execute(self) -> dict[str, Any]:
        """Do the run, or continue it; returns its figures, raises one of `USER_ERRORS`."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(frozen=True)
class RunFolder:
    """The records of a run."""

    path: Path

    def finished(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures of the run; None when there is something left to do.

        Args:
            identity: all that decides the figures, as plain values.

        Raises:
            UsageError: the folder holds another run.
            CheckpointError: a file of it is damaged.
        """
        record = _read_json(self.path / _CONFIG)
        if record is None:
            return None
        found = record.get("identity", {})
        asked = json.loads(json.dumps(dict(identity)))
        other = [
            f"{name} {found.get(name)!r}, now {value!r}"
            for name, value in asked.items()
            if found.get(name) != value
        ]
        if other:
            raise UsageError(
                f"{self.path}: holds a run with other settings ({'; '.join(other)}); give another "
                "--output-dir, or delete the folder"
            )
        return _read_json(self.path / RESULT)

    def begin(self, identity: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Record what the run is, unless that is done.

        Raises:
            OSError: the record could not be written.
        """
        if (self.path / _CONFIG).exists():
            return
        record = {
            "identity": dict(identity),
            **details,
            "commit": source_commit(),
            "torch": torch.__version__,
            "command": sys.argv,
        }
        write_json(self.path / _CONFIG, record)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record the figures; the checkpoints go, because a finished run is never continued.

        Raises:
            OSError: the record could not be written.
        """
        result = result | {"commit": source_commit(), "run": str(self.path)}
        write_json(self.path / RESULT, result)
        for checkpoint in self.path.rglob("checkpoint.pt"):
            checkpoint.unlink()
        return result


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete its folder to start the run again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged; delete its folder to start the run again")
    return content


def choose_device(name: str) -> torch.device:
    """The device of all runs.

    Args:
        name: "cpu", "cuda" or "auto", a GPU if there is one.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU; use cpu or auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if name == "auto" else name)


def threads_per_run(threads: int | None, jobs: int) -> int:
    """CPU threads: as asked for, or the cores divided among the runs at a time."""
    return threads or max(1, len(os.sched_getaffinity(0)) // jobs)


def run_options(config: Any) -> RunOptions:
    """Where and how the runs of a command compute.

    Args:
        config: its settings, with `device`, `threads`, `jobs`, `log_every`, `checkpoint_minutes`.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    return RunOptions(
        device=choose_device(config.device),
        threads=threads_per_run(config.threads, config.jobs),
        log_every=config.log_every,
        checkpoint_seconds=60 * config.checkpoint_minutes,
        shows_bar=config.jobs == 1,
    )


def run_all(
    program: str, runs: Sequence[AnyRun], *, jobs: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Do all runs of a command that are not finished.

    Args:
        program: for the log.
        runs: in the order in which they begin.
        jobs: runs at a time, each in a process of its own; 1 stays in this process.

    Returns:
        The figures of the finished runs, then of the others in the order in which they ended; and
        what went wrong, logged when it came.

    Raises:
        UsageError, CheckpointError, DataError: a run conflicts with its folder or its data; found
            before the first run begins.
    """
    known = [(run, run.finished()) for run in runs]
    results = [result for _, result in known if result is not None]
    left = [run for run, result in known if result is None]
    if results:
        logger.info("%d of %d runs are finished already", len(results), len(runs))
    failures: list[str] = []
    for outcome in _outcomes(left, jobs if len(left) > 1 else 1):
        if isinstance(outcome, str):
            logger.error("%s: error: %s", program, outcome)
            failures.append(outcome)
        else:
            results.append(outcome)
    return results, failures


def _outcomes(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any] | str]:
    if jobs == 1:
        yield from map(_attempt, runs)
        return
    # a forked process must not touch a GPU or a thread pool of its parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(_attempt, run) for run in runs]):
                yield future.result()
        except BrokenProcessPool:
            yield (
                "a process was killed, for want of memory perhaps; the same command goes on with "
                "the runs that are not finished, --jobs 1 does them one after the other"
            )


def _end_with_parent() -> None:
    """Make this process end when the one that started it is gone, however that ended.

    It would go on with its run, hold its folder, and then wait for ever.
    """
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
        with locked(run.folder):
            # another command may have done it since this one looked
            return run.finished() or run.execute()
    except USER_ERRORS as error:
        return f"{run.name}: {error}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made, against other processes.

    Raises:
        TrainingError: another process holds it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise TrainingError(f"another process is at this run in {folder}") from None


def run_program(program: str, work: Callable[[], tuple[dict[str, Any], list[str]]]) -> None:
    """The frame of a command: one JSON document as the last line of stdout, errors in one line.

    Args:
        program: for errors.
        work: returns the document and what went wrong on the way; raises one of `USER_ERRORS`.
    """
    set_up_logging(0)
    try:
        document, failures = work()
    except USER_ERRORS as error:
        exit_with_error(program, error)
    print(json.dumps(document | {"failures": failures}))
    sys.exit(1 if failures else 0)


def exit_with_error(program: str, error: Exception) -> NoReturn:
    """Say what is wrong and nothing else; the status is 2 for wrong usage, 1 otherwise."""
    sys.stderr.write(f"{program}: error: {error}\n")
    sys.exit(2 if isinstance(error, UsageError) else 1)
