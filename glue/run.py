"""Fine-tune a checkpoint: `python glue/run.py --task mrpc --checkpoint DIR --pooler maxseq_mha`.

Every task, pooler, point of a grid and seed is a run in a folder of its own; finished ones are
skipped, interrupted ones continue. The last line of stdout is one JSON document, the log on stderr.
"""

import logging
import os
from pathlib import Path
from typing import Any

# threads that wait for work without a core of their own are ten times slower when they spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from glue.data import load_examples
from glue.finetune import FineTuningRun, cached_checkpoint
from glue.model import check_pooler
from glue.report import summarise
from glue.settings import parse
from ponet.run.report import ResultError
from ponet.run.runs import run_all, run_options, run_program

logger = logging.getLogger("glue")


def fine_tune_tasks() -> tuple[dict[str, Any], list[str]]:
    """All that the command line asks for; returns the document and what went wrong on the way."""
    config = parse()
    options = run_options(config)
    checkpoint = cached_checkpoint(Path(config.checkpoint))
    config = config.within(checkpoint.config.num_hidden_layers)
    for pooler in config.poolers():
        check_pooler(checkpoint.config, pooler)
    scratch = "-scratch" if config.from_scratch else ""
    folder = Path(config.output_dir) / f"{checkpoint.name}{scratch}"
    runs = []
    # all data are read, and all conflicts found, before the first run starts
    for task in config.task_names:
        data = load_examples(task, config)
        runs += [
            FineTuningRun(
                settings=settings,
                config=config,
                data_digest=data.digest,
                checkpoint_digest=checkpoint.digest,
                folder=folder / settings.name,
                options=options,
            )
            for settings in config.runs_of(data.task, len(data.train), options.device.type)
        ]
    results, failures = run_all("glue", runs, jobs=config.jobs)
    summary = []
    try:
        summary = summarise(folder) if results else []
    except ResultError as error:
        logger.error("glue: error: %s", error)
        failures.append(str(error))
    return {"runs": results, "summary": summary}, failures


if __name__ == "__main__":
    run_program("glue", fine_tune_tasks)
