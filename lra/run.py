"""Train and test on the Long Range Arena: `python lra/run.py --task text --model ponet attention`.

Every task, model and seed is a run in a folder of its own; finished ones are skipped, interrupted
ones continue. Progress goes to stderr; the last line of stdout is one JSON document.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra.cache import load_task
from lra.experiment import finished_result, run_experiment
from lra.prepare import prepare_task
from lra.settings import LRAConfig, RunSettings, parse
from ponet.run.log import set_up_logging
from ponet.run.runs import (
    EXPECTED,
    attempt,
    choose_device,
    complain,
    locked,
    run_all,
    threads_of_a_job,
)
from ponet.run.trainer import Place

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
    captures: bool
    """Capture the steps where nothing stands against it."""
    threads: int
    """CPU threads."""


def make_jobs(config: LRAConfig) -> list[Job]:
    """All runs of a command, with their data prepared.

    Raises:
        UsageError: settings contradict each other or the device.
        DataError: the data of a task are missing or unfit.
    """
    device = choose_device(config.device)
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
    captures = config.capture == "on" or (config.capture == "auto" and device.type == "cuda")
    threads = threads_of_a_job(config.threads, config.jobs)
    return [
        Job(
            settings=settings,
            folder=Path(config.output_dir) / settings.group / settings.name,
            data_folder=data_folders[settings.task],
            place=place,
            captures=captures,
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
    settings = job.settings
    result = attempt(settings.name, job.threads, lambda: _run(job))
    if isinstance(result, str):
        return result
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


def _run(job: Job) -> dict[str, Any]:
    data = load_task(job.settings.task, job.data_folder, job.settings.protocol)
    with locked(job.folder):
        # another command may have done it since this one looked
        result = finished_result(job.folder, job.settings, data)
        return result or run_experiment(
            job.settings, job.folder, data, job.place, captures=job.captures
        )


def main() -> None:
    """Run the program."""
    set_up_logging(0)
    try:
        config = parse()
        jobs = make_jobs(config)
        # all conflicts are found before the first run starts
        known = {job.settings: check(job) for job in jobs}
    except EXPECTED as error:
        sys.exit(complain("lra", error))
    finished = [result for result in known.values() if result is not None]
    left = [job for job in jobs if known[job.settings] is None]
    if finished:
        logger.info("%d of %d runs are finished already", len(finished), len(jobs))
    processes = config.jobs if len(left) > 1 else 1
    results, failures = run_all("lra", execute, [(job,) for job in left], processes)
    print(json.dumps({"runs": finished + results, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
