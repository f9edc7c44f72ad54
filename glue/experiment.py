"""One run in its folder: training, scores, model, predictions; it continues where it was stopped.

config.json     settings, data, checkpoint, commit, command; a run with others is refused
metrics.jsonl   losses and scores by step, and the same in tensorboard/
checkpoint.pt   where training stands, while the run is unfinished
model/          the fine-tuned model with its tokenizer
submission/     predictions for splits without labels, in GLUE's format
result.json     the figures, when the run is finished
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glue.encoding import EncodedRows, RowEncoder
from glue.inference import outputs_of, predictions_of
from glue.metrics import constant_prediction, mean_of, score
from glue.model_folder import Meaning, save_model
from glue.models import Checkpoint, build_classifier
from glue.rows import Rows, TaskData
from glue.settings import RunSettings
from glue.submission import write_submission
from glue.tasks import TASKS, Task
from glue.trainer import Trainer
from ponet import PoNetForSequenceClassification
from ponet.checkpoint import write_json
from ponet.run.device import device_name, peak_memory_mib, source_commit
from ponet.run.log import MetricsWriter
from ponet.run.trainer import Place, TrainingError, read_record, refuse_other_run

CONFIG, RESULT = "config.json", "result.json"
_CHECKPOINT, _MODEL, _SUBMISSION = "checkpoint.pt", "model", "submission"
_SUBSET_SEED = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task in the tokens of a checkpoint."""

    data: TaskData
    """The rows."""
    train: EncodedRows
    """To learn from, no more than asked for."""
    evaluation: Mapping[str, EncodedRows]
    """To score."""
    submissions: Mapping[str, EncodedRows]
    """To predict."""


def encode_task(data: TaskData, settings: RunSettings, checkpoint: Checkpoint) -> EncodedTask:
    """Tokenise a task as a run sees it."""
    encoder = RowEncoder(
        checkpoint.tokenizer, max_length=settings.max_length, segments=settings.segments
    )
    return EncodedTask(
        data=data,
        train=encoder.encode(_subset(data.train, settings.max_train_examples)),
        evaluation={name: encoder.encode(rows) for name, rows in data.evaluation.items()},
        submissions={name: encoder.encode(rows) for name, rows in data.submissions.items()},
    )


def _subset(rows: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(_SUBSET_SEED).permutation(len(rows))[:limit]
    return rows.take(np.sort(chosen))


def finished_result(
    folder: Path, settings: RunSettings, digest: str, checkpoint: Checkpoint
) -> dict[str, Any] | None:
    """The figures of a run that is finished; None when there is something left to do.

    Args:
        folder: of the run.
        settings: of the run.
        digest: of the data.
        checkpoint: to start from.

    Raises:
        UsageError: the folder holds a run with other settings, data or checkpoint.
        CheckpointError: a file of the folder is damaged.
    """
    record = read_record(folder / CONFIG)
    if record is None:
        return None
    found = {
        "data": record["data"]["digest"],
        "checkpoint": record["checkpoint"]["digest"],
        **record["settings"],
    }
    asked = {"data": digest, "checkpoint": checkpoint.digest, **asdict(settings)}
    refuse_other_run(folder, found, asked)
    return read_record(folder / RESULT)


def run_experiment(
    settings: RunSettings,
    folder: Path,
    task: EncodedTask,
    checkpoint: Checkpoint,
    place: Place,
    *,
    recomputes: bool,
    keeps_model: bool,
) -> dict[str, Any]:
    """Fine-tune, or continue to.

    Args:
        settings: of the run.
        folder: of the run, new or of the same settings and unfinished.
        task: to be learned.
        checkpoint: to start from.
        place: where to compute.
        recomputes: compute layers again in the backward pass.
        keeps_model: write the model folder.

    Returns:
        The content of `result.json`.

    Raises:
        CheckpointError: the checkpoint does not fit, or a file of the folder is damaged.
        TrainingError: a loss or an output is not finite.
        OSError: a file could not be written.
    """
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    data = task.data
    if not (folder / CONFIG).exists():
        _record(folder, settings, data, checkpoint)
    model = _model(settings, data.task, checkpoint).to(place.device)
    model.ponet.encoder.recomputes = recomputes
    trainer = Trainer(model, task.train, settings, place)
    if trainer.restore(folder / _CHECKPOINT):
        logger.info("%s | resuming after step %d", settings.name, trainer.progress.step)
    with MetricsWriter(folder, rank=0, resume_step=trainer.progress.step) as writer:
        metrics = trainer.train(
            folder / _CHECKPOINT, writer, lambda: _scores(model, task, settings)
        )
    began = time.perf_counter()
    _submit(folder, model, task, settings)
    if keeps_model:
        save_model(folder / _MODEL, model, checkpoint.tokenizer, _meaning(settings, data))
    trainer.progress.seconds += time.perf_counter() - began
    result = _figures(settings, task, checkpoint, metrics) | {
        "steps": trainer.steps,
        "seconds": trainer.progress.seconds,
        "steps_per_s": trainer.steps / trainer.progress.train_seconds,
        "peak_memory_mib": peak_memory_mib(place.device),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(place.device),
        "commit": source_commit(),
        "run": str(folder),
    }
    write_json(folder / RESULT, result)
    # a finished run is never continued
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    return result


def _record(folder: Path, settings: RunSettings, data: TaskData, checkpoint: Checkpoint) -> None:
    write_json(
        folder / CONFIG,
        {
            "settings": asdict(settings),
            "data": {
                "digest": data.digest,
                "train": data.train.origin,
                "departures": data.departures,
            },
            "checkpoint": {"digest": checkpoint.digest, "folder": str(checkpoint.folder)},
            "commit": source_commit(),
            "torch": torch.__version__,
            "command": sys.argv,
        },
    )


def _model(
    settings: RunSettings, task: Task, checkpoint: Checkpoint
) -> PoNetForSequenceClassification:
    torch.manual_seed(settings.seed)
    return build_classifier(
        checkpoint,
        num_labels=1 if task.is_regression else len(task.labels),
        max_length=settings.max_length,
        pooler=settings.pooler,
        dropout=settings.dropout,
        from_scratch=settings.from_scratch,
    )


def _predict(
    model: PoNetForSequenceClassification, rows: EncodedRows, settings: RunSettings
) -> np.ndarray:
    """Classes or numbers `[N]`.

    Raises:
        TrainingError: an output is not finite.
    """
    outputs = outputs_of(model, rows, settings.precision)
    if not np.isfinite(outputs).all():
        raise TrainingError(f"{settings.name}: the model's outputs are not finite any more")
    return predictions_of(outputs)


def _scores(
    model: PoNetForSequenceClassification, task: EncodedTask, settings: RunSettings
) -> dict[str, float | None]:
    """Metrics of all evaluation sets."""
    predictions = {n: _predict(model, rows, settings) for n, rows in task.evaluation.items()}
    return _scores_of(predictions, task.data)


def _scores_of(predictions: Mapping[str, np.ndarray], data: TaskData) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for name, said in predictions.items():
        # a set of another task, as the diagnostic one, has metrics of its own
        owner = TASKS.get(name, data.task)
        labels = data.evaluation[name].labels
        assert labels is not None
        prefix = f"{name}_" if len(data.task.evaluation) > 1 or owner is not data.task else ""
        scores |= score(owner.metrics, said, labels, prefix=prefix)
    return scores


def _figures(
    settings: RunSettings,
    task: EncodedTask,
    checkpoint: Checkpoint,
    metrics: dict[str, float | None],
) -> dict[str, Any]:
    data = task.data
    assert data.train.labels is not None
    constant = {
        name: constant_prediction(data.train.labels, len(rows))
        for name, rows in data.evaluation.items()
    }
    majority = _scores_of(constant, data)
    departures = list(data.departures)
    if len(task.train) < len(data.train):
        departures.append(f"trained on {len(task.train):,} of {len(data.train):,} rows")
    return {
        "task": settings.task,
        "checkpoint": checkpoint.name,
        "mixer": checkpoint.config.mixer,
        "pooler": settings.pooler.name,
        "reading": settings.pooler.reading,
        "pooler_settings": asdict(settings.pooler),
        "from_scratch": settings.from_scratch,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "epochs": settings.epochs,
        "max_length": settings.max_length,
        "segments": settings.segments,
        "precision": settings.precision,
        "metrics": metrics,
        "score": mean_of(metrics, data.task.headline),
        "majority_metrics": majority,
        "majority": mean_of(majority, data.task.headline),
        "num_train": len(task.train),
        "num_eval": sum(len(task.evaluation[n]) for n in data.task.evaluation if n in constant),
        "complete": not departures,
        "departures": departures,
    }


def _meaning(settings: RunSettings, data: TaskData) -> Meaning:
    return Meaning(
        task=settings.task,
        labels=data.task.labels,
        num_texts=len(data.train.texts),
        max_length=settings.max_length,
        segments=settings.segments,
    )


def _submit(
    folder: Path,
    model: PoNetForSequenceClassification,
    task: EncodedTask,
    settings: RunSettings,
) -> None:
    """Predict splits without labels, each in a file of its own."""
    for name, rows in task.submissions.items():
        predictions = _predict(model, rows, settings)
        path = folder / _SUBMISSION / f"{name}.tsv"
        write_submission(path, task.data.task, task.data.submissions[name], predictions)
