"""Fine-tune a checkpoint: `python glue/run.py --task mrpc --checkpoint DIR --pooler maxseq_mha`.

Every task, pooler, point of a grid and seed is a run in a folder of its own; finished ones are
skipped, interrupted ones continue. Progress goes to stderr; the last line of stdout is one JSON
document.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from glue.experiment import EncodedTask, encode_task, finished_result, run_experiment
from glue.models import Checkpoint, check_pooler, read_checkpoint
from glue.rows import TaskData
from glue.settings import GlueConfig, RunSettings, parse
from glue.sources import load_own, load_task
from glue.summary import read_summary
from glue.tasks import NINE_COLUMNS
from glue.trainer import describe
from ponet.run.log import set_up_logging
from ponet.run.report import ResultError
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

# tokens beyond which layers are recomputed
_LONG = 512

logger = logging.getLogger("glue")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to do, as handed to a process."""

    settings: RunSettings
    """What to run."""
    folder: Path
    """Of the run."""
    checkpoint: Path
    """Folder of the model to start from."""
    place: Place
    """Where to compute."""
    threads: int
    """CPU threads."""
    recomputes: bool
    """Layers are computed again in the backward pass."""
    keeps_model: bool
    """The fine-tuned model is written."""


@dataclass(frozen=True, kw_only=True)
class TaskJobs:
    """The runs of one task."""

    data: TaskData
    """Of the task."""
    left: list[Job]
    """Runs to do."""
    finished: list[dict[str, Any]]
    """Figures of runs that are done already."""


# once in each process
_read_checkpoint = lru_cache(maxsize=1)(read_checkpoint)


def load_tasks(config: GlueConfig) -> list[TaskData]:
    """Rows of all tasks of a command.

    Raises:
        DataError: some are missing or unfit.
    """
    if config.own_files is not None:
        return [load_own(config.task[0], config.own_files)]
    return [load_task(task, Path(config.data_dir)) for task in config.tasks]


def runs_folder(config: GlueConfig, checkpoint: Checkpoint) -> Path:
    """Where the runs of a checkpoint are, or those of its randomly initialised twin."""
    name = checkpoint.name + ("-scratch" if config.from_scratch else "")
    return Path(config.output_dir) / name


def plan(
    config: GlueConfig, data: TaskData, checkpoint: Checkpoint, device: torch.device
) -> TaskJobs:
    """Find out which runs of a task are left to do.

    Raises:
        UsageError: the folder of a run holds another one.
        CheckpointError: the folder of a run is damaged.
    """
    parent = runs_folder(config, checkpoint)
    place = Place(
        device=device,
        log_every=config.log_every,
        checkpoint_seconds=60 * config.checkpoint_minutes,
        shows_bar=config.jobs == 1,
    )
    left, finished = [], []
    for settings in config.runs_of(data.task, device.type):
        folder = parent / settings.name
        result = finished_result(folder, settings, data.digest, checkpoint)
        if result is not None:
            finished.append(result)
            continue
        recomputes = config.gradient_checkpointing
        left.append(
            Job(
                settings=settings,
                folder=folder,
                checkpoint=checkpoint.folder,
                place=place,
                threads=threads_of_a_job(config.threads, config.jobs),
                recomputes=settings.max_length > _LONG if recomputes is None else recomputes,
                keeps_model=config.save_models,
            )
        )
    return TaskJobs(data=data, left=left, finished=finished)


def encode(tasks: list[TaskJobs], checkpoint: Checkpoint) -> Iterator[tuple[Job, EncodedTask]]:
    """The runs that are left, each with its task in tokens."""
    for jobs in tasks:
        if jobs.left:
            # all runs of a task in one command see the same tokens
            task = encode_task(jobs.data, jobs.left[0].settings, checkpoint)
            yield from ((job, task) for job in jobs.left)


def execute(job: Job, task: EncodedTask) -> dict[str, Any] | str:
    """Do a job, in whatever process.

    Returns:
        The figures, or what went wrong outside the program.
    """
    settings = job.settings
    result = attempt(settings.name, job.threads, lambda: _run(job, task))
    if isinstance(result, str):
        return result
    logger.info(
        "%s | %s (majority: %s) in %.0f s, %.3g step/s",
        settings.name,
        describe(result["metrics"]),
        describe(result["majority_metrics"]),
        result["seconds"],
        result["steps_per_s"],
    )
    return result


def _run(job: Job, task: EncodedTask) -> dict[str, Any]:
    checkpoint = _read_checkpoint(job.checkpoint)
    with locked(job.folder):
        # another command may have done it since this one looked
        result = finished_result(job.folder, job.settings, task.data.digest, checkpoint)
        return result or run_experiment(
            job.settings,
            job.folder,
            task,
            checkpoint,
            job.place,
            recomputes=job.recomputes,
            keeps_model=job.keeps_model,
        )


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Scores of the runs that a checkpoint has had, this command's and earlier ones; logged, too.

    Args:
        folder: of the checkpoint's runs.

    Returns:
        For each pooler the columns in percent, at the best point of each grid, and the average of
        the nine published ones, None while one is undefined or missing.

    Raises:
        ResultError: a result is damaged.
    """
    summary = read_summary(folder)
    answer = []
    for model in summary.models:
        cells = {c.title: cell for c in summary.columns if (cell := summary.cell(model, c))}
        for title, cell in cells.items():
            logger.info(
                "%s, %s: %s, %d seeds at batch size %d, learning rate %g",
                title,
                model.pooler_title,
                "undefined" if cell.mean is None else f"{cell.mean:.2f} %",
                len(cell.runs),
                cell.runs[0].batch_size,
                cell.runs[0].learning_rate,
            )
        average = summary.average(model)
        if cells.keys() >= NINE_COLUMNS.keys():
            found = "undefined" if average is None else f"{average:.2f} %"
            logger.info("average of the nine columns, %s: %s", model.pooler_title, found)
        columns = {title: cell.mean for title, cell in cells.items()}
        answer.append({"pooler": model.pooler_title, "columns": columns, "average": average})
    return answer


def main() -> None:
    """Run the program."""
    set_up_logging(0)
    # the folder may hold another model than at an earlier call
    _read_checkpoint.cache_clear()
    try:
        config = parse()
        device = choose_device(config.device)
        assert config.checkpoint is not None
        checkpoint = _read_checkpoint(Path(config.checkpoint))
        for pooler in config.poolers():
            check_pooler(checkpoint.config, pooler)
        # all conflicts are found before the first run starts
        tasks = [plan(config, data, checkpoint, device) for data in load_tasks(config)]
    except EXPECTED as error:
        sys.exit(complain("glue", error))
    finished = [result for jobs in tasks for result in jobs.finished]
    left = sum(len(jobs.left) for jobs in tasks)
    if finished:
        logger.info("%d of %d runs are finished already", len(finished), len(finished) + left)
    processes = config.jobs if left > 1 else 1
    results, failures = run_all("glue", execute, encode(tasks, checkpoint), processes)
    results = finished + results
    summary: list[dict[str, Any]] = []
    try:
        summary = summarise(runs_folder(config, checkpoint)) if results else []
    except ResultError as error:
        complain("glue", error)
        failures.append(str(error))
    print(json.dumps({"runs": results, "summary": summary, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
