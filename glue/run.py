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
from pathlib import Path
from typing import Any

import torch

from glue.experiment import encode_task, finished_result, run_experiment
from glue.models import Checkpoint, check_pooler, read_checkpoint
from glue.rows import TaskData
from glue.settings import GlueConfig, RunSettings, parse
from glue.sources import load_own, load_task
from glue.summary import ResultError, read_summary
from glue.tasks import NINE_COLUMNS
from glue.trainer import Place, describe
from ponet.cli import UsageError
from ponet.log import set_up_logging
from ponet.training import TrainingError

# causes outside the program: usage, data, checkpoints (all ValueErrors), a diverging loss, a disk
_EXPECTED = (ValueError, TrainingError, OSError)
# tokens beyond which layers are recomputed
_LONG = 512

logger = logging.getLogger("glue")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to do."""

    settings: RunSettings
    """What to run."""
    folder: Path
    """Of the run."""


@dataclass(frozen=True, kw_only=True)
class TaskJobs:
    """The runs of one task."""

    data: TaskData
    """Of the task."""
    left: list[Job]
    """Runs to do."""
    finished: list[dict[str, Any]]
    """Figures of runs that are done already."""


def choose_device(config: GlueConfig) -> torch.device:
    """The device of all runs.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU; use cpu or auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.device == "auto" else config.device)


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


def plan(config: GlueConfig, data: TaskData, checkpoint: Checkpoint, device: str) -> TaskJobs:
    """Find out which runs of a task are left to do.

    Raises:
        UsageError: the folder of a run holds another one.
        CheckpointError: the folder of a run is damaged.
    """
    parent = runs_folder(config, checkpoint)
    jobs = [
        Job(settings=settings, folder=parent / settings.name)
        for settings in config.runs_of(data.task, device)
    ]
    results = [finished_result(job.folder, job.settings, data.digest, checkpoint) for job in jobs]
    return TaskJobs(
        data=data,
        left=[job for job, result in zip(jobs, results, strict=True) if result is None],
        finished=[result for result in results if result is not None],
    )


def execute(
    config: GlueConfig, jobs: TaskJobs, checkpoint: Checkpoint, device: torch.device
) -> Iterator[dict[str, Any] | str]:
    """Do the runs of a task that are left; yields figures, or what went wrong with a run."""
    if not jobs.left:
        return
    # all runs of a task in one command see the same tokens
    settings = jobs.left[0].settings
    task = encode_task(jobs.data, settings, checkpoint)
    recomputes = config.gradient_checkpointing
    if recomputes is None:
        recomputes = settings.max_length > _LONG
    place = Place(
        device=device,
        gradient_checkpointing=recomputes,
        log_every=config.log_every,
        checkpoint_seconds=60 * config.checkpoint_minutes,
    )
    for job in jobs.left:
        try:
            result = run_experiment(
                job.settings, job.folder, task, checkpoint, place, keep_model=config.save_models
            )
        except _EXPECTED as error:
            yield f"{job.settings.name}: {error}"
            continue
        logger.info(
            "%s | %s (majority: %s) in %.0f s, %.3g step/s",
            job.settings.name,
            describe(result["metrics"]),
            describe(result["majority_metrics"]),
            result["seconds"],
            result["steps_per_s"],
        )
        yield result


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
    try:
        config = parse()
        device = choose_device(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        assert config.checkpoint is not None
        checkpoint = read_checkpoint(Path(config.checkpoint))
        for pooler in config.poolers():
            check_pooler(checkpoint.config, pooler)
        # all conflicts are found before the first run starts
        tasks = [plan(config, data, checkpoint, device.type) for data in load_tasks(config)]
    except _EXPECTED as error:
        sys.exit(_complain(error))
    results = [result for jobs in tasks for result in jobs.finished]
    if results:
        total = len(results) + sum(len(jobs.left) for jobs in tasks)
        logger.info("%d of %d runs are finished already", len(results), total)
    failures = []
    for jobs in tasks:
        for outcome in execute(config, jobs, checkpoint, device):
            if isinstance(outcome, str):
                logger.error("glue: error: %s", outcome)
                failures.append(outcome)
            else:
                results.append(outcome)
    summary: list[dict[str, Any]] = []
    try:
        summary = summarise(runs_folder(config, checkpoint)) if results else []
    except ResultError as error:
        logger.error("glue: error: %s", error)
        failures.append(str(error))
    print(json.dumps({"runs": results, "summary": summary, "failures": failures}))
    sys.exit(1 if failures else 0)


def _complain(error: Exception) -> int:
    """Say what is wrong and nothing else; returns the exit status."""
    sys.stderr.write(f"glue: error: {error}\n")
    return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    main()
