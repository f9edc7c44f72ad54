"""One run: fine-tuning, scores, model and predictions in a folder of its own.

config.json     settings, data, checkpoint, commit, command; a run with others is refused
metrics.jsonl   losses and scores by step, and the same in tensorboard/
checkpoint.pt   where training stands, while the run is unfinished
model/          the fine-tuned model with its tokenizer
submission/     predictions for splits without labels, in GLUE's format
result.json     the figures, when the run is finished
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.data import (
    OwnFiles,
    TaskExamples,
    TextExamples,
    class_counts,
    load_own,
    load_task,
    write_submission,
)
from glue.encoding import (
    BatchesOfSimilarLength,
    EncodedExamples,
    ExampleEncoder,
    collect_examples,
)
from glue.metrics import constant_prediction, mean_of, score
from glue.model import (
    EncoderCheckpoint,
    LabelSpec,
    build_classifier,
    outputs_of,
    predictions_of,
    read_checkpoint,
    save_classifier,
)
from glue.settings import FineTuningSettings
from glue.tasks import TASKS, Segments
from ponet import PoNetForSequenceClassification
from ponet.run.device import device_name, peak_memory_mib
from ponet.run.log import describe
from ponet.run.runs import RunFolder
from ponet.run.trainer import (
    RunOptions,
    Trainer,
    TrainingError,
    autocast,
    linear_schedule,
    matrices_and_vectors,
    step_seed,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MAX_GRAD_NORM = 1.0
_DROPOUT = 2
_SUBSET_SEED = 1
# tokens beyond which layers are computed again in the backward pass
_LONG = 512

logger = logging.getLogger(__name__)

# a process reads the checkpoint and each task once for all its runs
cached_checkpoint = lru_cache(maxsize=1)(read_checkpoint)


@dataclass(frozen=True)
class ExampleSource:
    """Where the examples of a task come from: the task's own files, or else `data_dir`."""

    task: str
    data_dir: Path
    own: OwnFiles | None


@lru_cache(maxsize=1)
def load_examples(source: ExampleSource) -> TaskExamples:
    """Read all examples of a task.

    Raises:
        DataError: some are missing or unfit.
    """
    if source.own is not None:
        return load_own(source.task, source.own)
    return load_task(TASKS[source.task], source.data_dir)


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task in the tokens of a checkpoint."""

    train: EncodedExamples
    """No more than asked for."""
    evaluation: Mapping[str, EncodedExamples]
    submissions: Mapping[str, EncodedExamples]


@lru_cache(maxsize=1)
def encode_task(
    source: ExampleSource,
    checkpoint: Path,
    max_length: int,
    segments: Segments,
    max_train_examples: int | None,
) -> EncodedTask:
    """Tokenise a task as a run sees it, and log what its training set holds."""
    data = load_examples(source)
    tokenizer = cached_checkpoint(checkpoint).tokenizer
    encoder = ExampleEncoder(tokenizer, max_length=max_length, segments=segments)

    def encode(split: str, examples: TextExamples) -> EncodedExamples:
        encoded = encoder.encode(examples)
        if encoded.num_truncated:
            share = encoded.num_truncated / len(encoded)
            logger.warning(
                "%s | %s: %.1f %% of %d examples are cut to %d tokens (see --max-length)",
                source.task,
                split,
                100 * share,
                len(encoded),
                max_length,
            )
        return encoded

    train = _subset(data.train, max_train_examples)
    logger.info(
        "%s | train: %d examples, %s", source.task, len(train), class_counts(data.task, train)
    )
    return EncodedTask(
        train=encode("train", train),
        evaluation={name: encode(name, examples) for name, examples in data.evaluation.items()},
        submissions={name: encode(name, examples) for name, examples in data.submissions.items()},
    )


def _subset(examples: TextExamples, limit: int | None) -> TextExamples:
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(_SUBSET_SEED).permutation(len(examples))[:limit]
    return examples.take(np.sort(chosen))


class FineTuningStep:
    """Trains a classifier by one step under the published recipe."""

    def __init__(
        self,
        model: PoNetForSequenceClassification,
        examples: EncodedExamples,
        settings: FineTuningSettings,
        device: torch.device,
    ) -> None:
        """Make an optimizer.

        Args:
            model: on the device; trained in place.
            examples: to learn from.
            settings: of the run.
            device: of the model.
        """
        self._model = model
        self._examples = examples
        self._settings = settings
        self._device = device
        self._batches = BatchesOfSimilarLength(
            examples.lengths, settings.batch_size, seed=settings.seed
        )
        self.steps_per_epoch = self._batches.per_pass
        self.steps = settings.epochs * self.steps_per_epoch
        self._warmup_steps = round(settings.warmup_fraction * self.steps)
        # fused on a CPU, too, several times as fast as one operation after another
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            matrices_and_vectors(model, settings.weight_decay),
            betas=_BETAS,
            eps=_EPSILON,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        share = linear_schedule(step, steps=self.steps, warmup_steps=self._warmup_steps)
        return self._settings.learning_rate * share

    def __call__(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss, a scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        torch.manual_seed(step_seed(self._settings.seed, _DROPOUT, step))
        self._model.train()
        batch = collect_examples(self._examples, self._batches.indices(step), self._model.config)
        with autocast(self._settings.precision, self._device):
            loss = self._model(**batch.to(self._device)).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class FineTuningRun:
    """A run to do, as handed to a process: a `ponet.run.runs.Run`."""

    settings: FineTuningSettings
    source: ExampleSource
    checkpoint: Path
    """Folder of the model to start from."""
    data_digest: str
    checkpoint_digest: str
    folder: Path
    options: RunOptions
    keeps_model: bool

    @property
    def name(self) -> str:
        """For log and errors."""
        return self.settings.name

    def _identity(self) -> dict[str, Any]:
        digests = {"data": self.data_digest, "checkpoint": self.checkpoint_digest}
        return digests | asdict(self.settings)

    def finished(self) -> dict[str, Any] | None:
        """The figures, if the run is finished.

        Raises:
            UsageError: the folder holds a run with other data or another checkpoint.
            CheckpointError: a file of the folder is damaged.
        """
        return RunFolder(self.folder).finished(self._identity())

    def execute(self) -> dict[str, Any]:
        """Fine-tune, or continue to.

        Returns:
            The content of `result.json`.

        Raises:
            CheckpointError: the checkpoint does not fit, or a file of the folder is damaged.
            TrainingError: a loss or an output is not finite.
            OSError: a file could not be written.
        """
        settings, device = self.settings, self.options.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        data, checkpoint = load_examples(self.source), cached_checkpoint(self.checkpoint)
        encoded = encode_task(
            self.source,
            self.checkpoint,
            settings.max_length,
            settings.segments,
            settings.max_train_examples,
        )
        folder = RunFolder(self.folder)
        folder.begin(self._identity(), {"data": data.train.origin, "from": str(self.checkpoint)})
        model = _new_model(settings, data, checkpoint).to(device)
        step = FineTuningStep(model, encoded.train, settings, device)
        evaluation = Evaluation(model, data, encoded, settings)
        trainer = Trainer(
            model,
            step,
            self.options,
            name=self.name,
            steps=step.steps,
            eval_every=step.steps_per_epoch,
            evaluate=evaluation.scores,
        )
        trainer.train(self.folder)
        # a run that was stopped after its last step has its weights, but no scores
        metrics = trainer.scores or evaluation.scores(0)
        began = time.perf_counter()
        evaluation.write_submissions(self.folder / "submission")
        if self.keeps_model:
            spec = _label_spec(settings, data)
            save_classifier(self.folder / "model", model, checkpoint.tokenizer, spec)
        seconds = trainer.progress.seconds + time.perf_counter() - began
        result = folder.finish(
            {
                **asdict(settings),
                "checkpoint": checkpoint.name,
                "mixer": checkpoint.config.mixer,
                **_compared(metrics, data, encoded),
                "steps": step.steps,
                "seconds": seconds,
                "steps_per_s": step.steps / trainer.progress.train_seconds,
                "peak_memory_mib": peak_memory_mib(device),
                "num_parameters": sum(p.numel() for p in model.parameters()),
                "device": device_name(device),
            }
        )
        logger.info(
            "%s | %s (majority: %s) in %.0f s, %.3g step/s",
            self.name,
            describe(metrics),
            describe(result["majority_metrics"]),
            seconds,
            result["steps_per_s"],
        )
        return result


def _new_model(
    settings: FineTuningSettings, data: TaskExamples, checkpoint: EncoderCheckpoint
) -> PoNetForSequenceClassification:
    torch.manual_seed(settings.seed)
    model = build_classifier(
        checkpoint,
        num_labels=1 if data.task.is_regression else len(data.task.labels),
        max_length=settings.max_length,
        pooler=settings.pooler,
        dropout=settings.dropout,
        from_scratch=settings.from_scratch,
    )
    model.ponet.encoder.recomputes = settings.max_length > _LONG
    return model


class Evaluation:
    """What a model in training says of the splits of its task."""

    def __init__(
        self,
        model: PoNetForSequenceClassification,
        data: TaskExamples,
        encoded: EncodedTask,
        settings: FineTuningSettings,
    ) -> None:
        self._model, self._data, self._encoded = model, data, encoded
        self._settings = settings

    def _predict(self, examples: EncodedExamples) -> np.ndarray:
        """Classes or numbers `[N]`.

        Raises:
            TrainingError: an output is not finite.
        """
        outputs = outputs_of(self._model, examples, self._settings.precision)
        if not np.isfinite(outputs).all():
            raise TrainingError(f"{self._settings.name}: the model's outputs are no longer finite")
        return predictions_of(outputs)

    def scores(self, number: int) -> dict[str, float | None]:
        """Metrics of all evaluation sets; `number` counts evaluations and changes nothing."""
        evaluation = self._encoded.evaluation
        return _scores(self._data, {name: self._predict(x) for name, x in evaluation.items()})

    def write_submissions(self, folder: Path) -> None:
        """Predict splits without labels, each in a file of its own."""
        for name, encoded in self._encoded.submissions.items():
            examples = self._data.submissions[name]
            predictions = self._predict(encoded)
            write_submission(folder / f"{name}.tsv", self._data.task, examples, predictions)


def _scores(data: TaskExamples, predictions: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for name, predicted in predictions.items():
        # a set of another task, as the diagnostic one, has metrics of its own
        owner = TASKS.get(name, data.task)
        labels = data.evaluation[name].labels
        assert labels is not None
        prefix = f"{name}_" if len(data.task.evaluation) > 1 or owner is not data.task else ""
        scores |= score(owner.metrics, predicted, labels, prefix=prefix)
    return scores


def _compared(
    metrics: dict[str, float | None], data: TaskExamples, encoded: EncodedTask
) -> dict[str, Any]:
    """The scores, those of a constant prediction, and how far either are the published task's."""
    assert data.train.labels is not None
    constant = {
        name: constant_prediction(data.train.labels, len(examples))
        for name, examples in data.evaluation.items()
    }
    majority = _scores(data, constant)
    differences = list(data.differences)
    if len(encoded.train) < len(data.train):
        differences.append(f"trained on {len(encoded.train):,} of {len(data.train):,} rows")
    scored = [encoded.evaluation[n] for n in data.task.evaluation if n in encoded.evaluation]
    return {
        "metrics": metrics,
        "score": mean_of(metrics, data.task.headline),
        "majority_metrics": majority,
        "majority": mean_of(majority, data.task.headline),
        "num_train": len(encoded.train),
        "num_eval": sum(map(len, scored)),
        "differences": differences,
    }


def _label_spec(settings: FineTuningSettings, data: TaskExamples) -> LabelSpec:
    return LabelSpec(
        task=settings.task,
        labels=data.task.labels,
        text_columns=data.train.columns,
        max_length=settings.max_length,
        segments=settings.segments,
    )
