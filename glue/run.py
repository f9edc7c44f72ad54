"""Fine-tune a checkpoint: `python glue/run.py --task mrpc --checkpoint DIR --pooler maxseq_mha`.

Every task, pooler, point of a grid and seed is a run in a folder of its own; finished ones are
skipped, interrupted ones continue. Progress goes to stderr; the last line of stdout is one JSON
document.
"""

import logging
import os
from pathlib import Path
from typing import Any

# threads that wait for work without a core of their own are ten times slower when they spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from glue.finetune import ExampleSource, FineTuningRun, cached_checkpoint, load_examples
from glue.model import EncoderCheckpoint, check_pooler
from glue.report import summarise
from glue.settings import GlueConfig, parse
from ponet.run.report import ResultError
from ponet.run.runs import run_all, run_options, run_program
from ponet.run.trainer import RunOptions

logger = logging.getLogger("glue")


def sources_of(config: GlueConfig) -> list[ExampleSource]:
    """Where the examples of the tasks come from."""
    data_dir, own = Path(config.data_dir), config.own_files
    names = [task.name for task in config.tasks] if own is None else config.task
    return [ExampleSource(task=name, data_dir=data_dir, own=own) for name in names]


def runs_folder(config: GlueConfig, checkpoint: EncoderCheckpoint) -> Path:
    """Where the runs of a checkpoint are, or those of its randomly initialised twin."""
    name = checkpoint.name + ("-scratch" if config.from_scratch else "")
    return Path(config.output_dir) / name


def plan_runs(
    config: GlueConfig, source: ExampleSource, checkpoint: EncoderCheckpoint, options: RunOptions
) -> list[FineTuningRun]:
    """All runs of a task.

    Raises:
        DataError: its examples are missing or unfit.
    """
    data = load_examples(source)
    return [
        FineTuningRun(
            settings=settings,
            source=source,
            checkpoint=checkpoint.folder,
            data_digest=data.digest,
            checkpoint_digest=checkpoint.digest,
            folder=runs_folder(config, checkpoint) / settings.name,
            options=options,
            keeps_model=config.save_models,
        )
        for settings in config.runs_of(data.task, options.device.type)
    ]


def work() -> tuple[dict[str, Any], list[str]]:
    """All that the command line asks for; returns the document and what went wrong on the way."""
    config = parse()
    options = run_options(config)
    assert config.checkpoint is not None
    checkpoint = cached_checkpoint(Path(config.checkpoint))
    for pooler in config.poolers():
        check_pooler(checkpoint.config, pooler)
    # all data are read, and all conflicts found, before the first run starts
    runs = [
        run
        for source in sources_of(config)
        for run in plan_runs(config, source, checkpoint, options)
    ]
    results, failures = run_all("glue", runs, jobs=config.jobs)
    summary = []
    try:
        summary = summarise(runs_folder(config, checkpoint)) if results else []
    except ResultError as error:
        logger.error("glue: error: %s", error)
        failures.append(str(error))
    return {"runs": results, "summary": summary}, failures


if __name__ == "__main__":
    run_program("glue", work)
