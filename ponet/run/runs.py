"""What commands of many runs share: the device, processes and their threads, locks, complaints."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from ponet.run.cli import UsageError
from ponet.run.log import set_up_logging
from ponet.run.trainer import TrainingError

EXPECTED = (ValueError, TrainingError, OSError)
"""Causes outside a program: usage, data, checkpoints (all ValueErrors), a diverging loss, disks."""

Result = TypeVar("Result", bound=dict[str, Any])


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


def threads_of_a_job(threads: int | None, jobs: int) -> int:
    """CPU threads of a run: as asked for, or the cores divided among the runs at a time."""
    return threads or max(1, len(os.sched_getaffinity(0)) // jobs)


def run_all(
    program: str,
    function: Callable[..., Result | str],
    calls: Iterable[tuple[Any, ...]],
    processes: int,
) -> tuple[list[Result], list[str]]:
    """Call a function for each tuple of arguments, `processes` at a time.

    Args:
        program: for the log.
        function: of a module; it returns figures, or in a string what went wrong.
        calls: arguments, taken one by one; processes get copies.
        processes: 1 calls in this process, one after the other.

    Returns:
        The figures in the order in which calls ended, and all complaints, which are logged when
        they come.
    """
    results: list[Result] = []
    failures: list[str] = []
    for outcome in _outcomes(function, calls, processes):
        if isinstance(outcome, str):
            logging.getLogger(program).error("%s: error: %s", program, outcome)
            failures.append(outcome)
        else:
            results.append(outcome)
    return results, failures


def _outcomes(
    function: Callable[..., Result | str], calls: Iterable[tuple[Any, ...]], processes: int
) -> Iterator[Result | str]:
    if processes == 1:
        yield from (function(*arguments) for arguments in calls)
        return
    # a forked process must not touch a GPU or a thread pool of its parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _end_with_parent) as pool:
        try:
            futures = [pool.submit(function, *arguments) for arguments in calls]
            for future in as_completed(futures):
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


def attempt(name: str, threads: int, run: Callable[[], Result]) -> Result | str:
    """Do one run, in whatever process.

    Args:
        name: of the run.
        threads: of the CPU.
        run: raises one of `EXPECTED` where something outside the program goes wrong.

    Returns:
        What `run` returns, or what went wrong.
    """
    set_up_logging(0)
    torch.set_num_threads(threads)
    try:
        return run()
    except EXPECTED as error:
        return f"{name}: {error}"


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


def complain(program: str, error: Exception) -> int:
    """Say what is wrong and nothing else; returns the exit status."""
    sys.stderr.write(f"{program}: error: {error}\n")
    return 2 if isinstance(error, UsageError) else 1
