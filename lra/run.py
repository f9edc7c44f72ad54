"""Train and test on the Long Range Arena: `python lra/run.py --task text --model ponet attention`.

Every task, model and seed is a run in a folder of its own; finished ones are skipped, interrupted
ones continue. Progress goes to stderr; the last line of stdout is one JSON document.
"""

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lra.cache import load_task
from lra.experiment import finished_result, run_experiment
from lra.prepare import prepare_task
from lra.settings import LRAConfig, RunSettings, parse
from lra.trainer import Place
from ponet.cli import UsageError
from ponet.log import set_up_logging
from ponet.training import TrainingError

# causes outside the program: usage, data, checkpoints (all ValueErrors), a diverging loss, a disk
_EXPECTED = (ValueError, TrainingError, OSError)

logger = logging.getLogger("lra")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run and where it happens, as handed to a process."""

    settings: RunSettings
    """What to run."""
    folder: Path
    """Of the run."""
    data_folder: Path
    """Of the prepared task."""
    place: Place
    """Where to compute."""
    threads: int
    """CPU threads."""


def choose_device(config: LRAConfig) -> torch.device:
    """The device of all runs.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU; use cpu or auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.device == "auto" else config.device)


def make_jobs(config: LRAConfig) -> list[Job]:
    """All runs of a command, with their data prepared.

    Raises:
        UsageError: settings contradict each other or the device.
        DataError: the data of a task are missing or unfit.
    """
    device = choose_device(config)
    runs = config.runs(device.type)
    data_folders = {
        task.name: prepare_task(task.name, config.data_dir, num_examples=config.num_examples)
        for task in config.tasks
    }
    place = Place(
        device=device,
        log_every=config.log_every,
        checkpoint_seconds=60 * config.checkpoint_minutes,
        shows_bar=config.jobs == 1,
    )
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.jobs)
    return [
        Job(
            settings=settings,
            folder=Path(config.output_dir) / settings.group / settings.name,
            data_folder=data_folders[settings.task],
            place=place,
            threads=threads,
        )
        for settings in runs
    ]


def check(job: Job) -> dict[str, Any] | None:
    """The figures of a job that is finished already; None when there is something left to do.

    Raises:
        UsageError: its folder holds a run with other settings.
        DataError: the prepared task is damaged.
    """
    settings = job.settings
    data = load_task(settings.task, job.data_folder, settings.protocol)
    return finished_result(job.folder, settings, data)


def execute(job: Job) -> dict[str, Any] | str:
    """Do a job, in whatever process.

    Returns:
        The figures, or what went wrong outside the program.
    """
    set_up_logging(0)
    torch.set_num_threads(job.threads)
    settings = job.settings
    try:
        data = load_task(settings.task, job.data_folder, settings.protocol)
        job.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(job.folder / ".lock", blocking=False):
            # another command may have done it since this one looked
            result = finished_result(job.folder, settings, data)
            if result is None:
                result = run_experiment(settings, job.folder, data, job.place)
    except Timeout:
        return f"{settings.name}: another process is at this run in {job.folder}"
    except _EXPECTED as error:
        return f"{settings.name}: {error}"
    logger.info(
        "%s | test accuracy %.4f (majority %.4f) after %d steps, %.3g step/s%s",
        settings.name,
        result["test_accuracy"],
        result["majority_rate"],
        result["steps"],
        result["steps_per_s"],
        "" if result["complete"] else ", not the complete published run",
    )
    return result


def execute_all(jobs: list[Job], processes: int) -> Iterator[dict[str, Any] | str]:
    """Do jobs, `processes` at a time; yields what `execute` returns as jobs end."""
    if processes == 1 or len(jobs) <= 1:
        yield from map(execute, jobs)
        return
    # a forked process must not touch a GPU or a thread pool of its parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in as_completed([pool.submit(execute, job) for job in jobs]):
            yield future.result()


def main() -> None:
    """Run the program."""
    set_up_logging(0)
    try:
        config = parse()
        jobs = make_jobs(config)
        # all conflicts are found before the first run starts
        results = {job.settings: check(job) for job in jobs}
    except _EXPECTED as error:
        sys.exit(_complain(error))
    finished = [result for result in results.values() if result is not None]
    left = [job for job in jobs if results[job.settings] is None]
    if finished:
        logger.info("%d of %d runs are finished already", len(finished), len(jobs))
    failures = []
    for outcome in execute_all(left, config.jobs):
        if isinstance(outcome, str):
            logger.error("lra: error: %s", outcome)
            failures.append(outcome)
        else:
            finished.append(outcome)
    print(json.dumps({"runs": finished, "failures": failures}))
    sys.exit(1 if failures else 0)


def _complain(error: Exception) -> int:
    """Say what is wrong and nothing else; returns the exit status."""
    sys.stderr.write(f"lra: error: {error}\n")
    return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    main()
