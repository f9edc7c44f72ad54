"""One run in its folder: self-pretraining, training, test; it continues where it was stopped.

config.json         settings, data, plan, commit, command; a run with others is refused
metrics.jsonl       losses and accuracies by step, and the same in tensorboard/
checkpoint.pt       where training stands, while the run is unfinished
pretrain/           the last three of self-pretraining
model.safetensors   the classifier of the best development accuracy
result.json         the figures, when the run is finished
"""

import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lra.budget import measure, plan_within, published_plan
from lra.cache import TaskData
from lra.classify import Classification
from lra.model import LongRangeClassifier
from lra.resident import obstacle
from lra.schedule import Plan
from lra.selfpretrain import MaskedPrediction, build_masked_lm
from lra.settings import RunSettings
from lra.steps import PlainStep
from lra.trainer import StageProgress, Trainer
from ponet.checkpoint import write_bytes, write_json
from ponet.run.device import device_name, source_commit
from ponet.run.log import MetricsWriter
from ponet.run.trainer import Place, read_record, refuse_other_run, step_seed

CONFIG, RESULT = "config.json", "result.json"
_CHECKPOINT, _MODEL = "checkpoint.pt", "model.safetensors"
_PRETRAIN = "pretrain"
_TRAIN_STAGE, _PRETRAIN_STAGE = 0, 1

logger = logging.getLogger(__name__)


def is_full(data: TaskData) -> bool:
    """Whether the splits have the published sizes."""
    train, dev, test = (len(split) for split in (data.train, data.dev, data.test))
    if data.manifest["variant"] == "clean" and data.task.dev_from == "test":
        # the published development set is the test set, the clean one is cut from the training set
        return (train + dev, test) == (data.task.split_sizes[0], data.task.split_sizes[2])
    return (train, dev, test) == data.task.split_sizes


def finished_result(folder: Path, settings: RunSettings, data: TaskData) -> dict[str, Any] | None:
    """The figures of a run that is finished; None when there is something left to do.

    Raises:
        UsageError: the folder holds a run with other settings or data.
    """
    record = read_record(folder / CONFIG)
    if record is None:
        return None
    found = {"data": record["data"]["digest"], **record["settings"]}
    asked = {"data": data.manifest["digest"], **asdict(settings)}
    refuse_other_run(folder, found, asked)
    return read_record(folder / RESULT)


def run_experiment(
    settings: RunSettings, folder: Path, data: TaskData, place: Place, *, captures: bool = False
) -> dict[str, Any]:
    """Train and test, or continue to.

    Args:
        settings: of the run.
        folder: of the run, new or of the same settings and unfinished.
        data: of the task.
        place: where to compute.
        captures: capture the steps where nothing stands against it.

    Returns:
        The content of `result.json`.

    Raises:
        CheckpointError: a file of the folder is damaged.
        DataError: a split does not fill one batch.
        TrainingError: a loss is not finite.
        UsageError: the time allows no training.
        OSError: a file could not be written.
    """
    torch.manual_seed(settings.seed)
    model = LongRangeClassifier(settings.model_config(), data.task.num_inputs).to(place.device)
    classification = Classification(
        model,
        data,
        settings,
        place.device,
        resident=captures and _can_capture(settings, data, place),
    )
    plan = _plan_of(folder, settings, data, classification, place)
    pretrain_seconds = _pretrain(model, folder, settings, data, place)
    if settings.compile:
        model.ponet.encoder.compile()
    trainer = Trainer(
        model,
        plan,
        place,
        step=classification.step(plan, _TRAIN_STAGE),
        evaluate=classification.dev_accuracy,
        name=settings.name,
    )
    _train(trainer, folder / _CHECKPOINT, folder, settings)
    assert trainer.best is not None
    model.load_state_dict(trainer.best)
    tested = sum(len(indices) for indices in classification.test_batches())
    logger.info("%s | testing on %d examples", settings.name, tested)
    began = time.perf_counter()
    accuracy = classification.test_accuracy()
    test_seconds = time.perf_counter() - began
    write_bytes(folder / _MODEL, save(trainer.best))
    result = {
        **_figures(settings, data, plan, trainer.progress),
        "test_accuracy": accuracy,
        "num_test_examples": tested,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": pretrain_seconds + trainer.progress.seconds + test_seconds,
        "device": device_name(place.device),
    }
    write_json(folder / RESULT, result)
    # a finished run is never continued
    for stage in (folder, folder / _PRETRAIN):
        (stage / _CHECKPOINT).unlink(missing_ok=True)
    return result


def _can_capture(settings: RunSettings, data: TaskData, place: Place) -> bool:
    reason = obstacle(settings, data, place.device)
    if reason is not None:
        logger.info("%s | steps are not captured: %s", settings.name, reason)
    return reason is None


def _figures(
    settings: RunSettings, data: TaskData, plan: Plan, progress: StageProgress
) -> dict[str, Any]:
    departures = settings.departures()
    return {
        "task": settings.task,
        "model": settings.model,
        "protocol": settings.protocol,
        "seed": settings.seed,
        "pretrain_epochs": settings.pretrain_epochs,
        "complete": is_full(data) and not departures,
        "departures": departures,
        "steps": progress.step,
        "planned_steps": plan.steps,
        "published_steps": data.task.steps,
        "dev_accuracy": progress.best_accuracy,
        "best_step": progress.best_step,
        "majority_rate": data.test.majority_rate,
        "steps_per_s": progress.step / progress.train_seconds,
        "commit": source_commit(),
        "precision": settings.precision,
        "data": _describe(data),
    }


def _describe(data: TaskData) -> dict[str, Any]:
    sizes = {name: len(getattr(data, name)) for name in ("train", "dev", "test")}
    return {"digest": data.manifest["digest"], "source": data.manifest["source"], **sizes}


def _plan_of(
    folder: Path,
    settings: RunSettings,
    data: TaskData,
    classification: Classification,
    place: Place,
) -> Plan:
    """The plan that the folder records, or a new one, recorded with all that the run is."""
    record = read_record(folder / CONFIG)
    if record is not None:
        return Plan(**record["plan"])
    if settings.max_minutes is None:
        plan = published_plan(settings)
    else:
        speed = measure(classification, data, settings, place)
        plan = plan_within(settings.max_minutes, speed, settings)
        logger.info(
            "%s | %.2f s a step, %.0f s an evaluation, %.0f s the test: %d of %d steps fit into "
            "%g minutes, evaluated every %d",
            settings.name,
            speed.step,
            speed.evaluation,
            speed.test,
            plan.steps,
            settings.steps,
            settings.max_minutes,
            plan.eval_every,
        )
    write_json(
        folder / CONFIG,
        {
            "settings": asdict(settings),
            "data": _describe(data),
            "plan": asdict(plan),
            "model": settings.model_config().to_dict(),
            "commit": source_commit(),
            "torch": torch.__version__,
            "command": sys.argv,
        },
    )
    return plan


def _pretrain(
    classifier: LongRangeClassifier,
    folder: Path,
    settings: RunSettings,
    data: TaskData,
    place: Place,
) -> float:
    """Give the classifier a self-pretrained encoder, if asked for; returns the seconds it took."""
    if not settings.pretrain_epochs:
        return 0.0
    torch.manual_seed(step_seed(settings.seed, _PRETRAIN_STAGE))
    model = build_masked_lm(settings).to(place.device)
    prediction = MaskedPrediction(model, data, settings, place.device)
    plan = prediction.plan()
    step = PlainStep(
        model,
        plan,
        loss=prediction.loss,
        precision=settings.precision,
        seeds=(settings.seed, _PRETRAIN_STAGE),
        device=place.device,
    )
    trainer = Trainer(
        model,
        plan,
        place,
        step=step,
        evaluate=None,
        name=f"{settings.name} pretraining",
    )
    subfolder = folder / _PRETRAIN
    _train(trainer, subfolder / _CHECKPOINT, subfolder, settings)
    classifier.ponet.load_state_dict(model.ponet.state_dict())
    return trainer.progress.seconds


def _train(trainer: Trainer, checkpoint: Path, folder: Path, settings: RunSettings) -> None:
    """Run a stage to its end, from its checkpoint if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.restore(checkpoint):
        logger.info("%s | resuming after step %d", settings.name, trainer.progress.step)
    with MetricsWriter(folder, rank=0, resume_step=trainer.progress.step) as writer:
        trainer.train(checkpoint, writer)
