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

from glue.data import TaskExamples, TextExamples, class_counts, load_examples, write_submission
from glue.encoding import BatchesOfSimilarLength, EncodedExamples, ExampleEncoder, collect_examples
from glue.metrics import constant_prediction, mean_of, score
from glue.model import LabelSpec, build_classifier, outputs_of, read_checkpoint, save_classifier
from glue.settings import FineTuningSettings, GlueConfig
from glue.tasks import TASKS, Segments
from ponet import PoNetForSequenceClassification
from ponet.run.device import device_name, peak_memory_mib
from ponet.run.log import describe
from ponet.run.runs import Run
from ponet.run.trainer import (
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

# a process reads the checkpoint once for all its runs
cached_checkpoint = lru_cache(maxsize=1)(read_checkpoint)


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task in the tokens of a checkpoint."""

    train: EncodedExamples
    """No more than asked for."""
    evaluation: Mapping[str, EncodedExamples]
    submissions: Mapping[str, EncodedExamples]


@lru_cache(maxsize=1)
def encode_task(
    task: str, config: GlueConfig, max_length: int, segments: Segments, max_train: int | None
) -> EncodedTask:
    """Tokenise a task as a run sees it, and log what its training set holds."""
    data = load_examples(task, config)
    tokenizer = cached_checkpoint(Path(config.checkpoint)).tokenizer
    encoder = ExampleEncoder(tokenizer, max_length=max_length, segments=segments)

    def encode(split: str, examples: TextExamples) -> EncodedExamples:
        encoded = encoder.encode(examples)
        if encoded.num_truncated:
            logger.warning(
                "%s | %s: %.1f %% of %d examples are cut to %d tokens (see --max-length)",
                task,
                split,
                100 * encoded.num_truncated / len(encoded),
                len(encoded),
                max_length,
            )
        return encoded

    train = _subset(data.train, max_train)
    counts = class_counts(data.task, train)
    logger.info("%s | train: %d examples, %s", task, len(train), counts)
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
        """Make an optimizer for a model on its device, which is trained in place."""
        self._model = model
        self._examples = examples
        self._settings = settings
        self._device = device
        size, seed = settings.batch_size, settings.seed
        self._batches = BatchesOfSimilarLength(examples.lengths, size, seed=seed)
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
class FineTuningRun(Run):
    """A run to do."""

    settings: FineTuningSettings
    config: GlueConfig
    """Of the command: data and checkpoint."""
    data_digest: str
    checkpoint_digest: str

    def identity(self) -> dict[str, Any]:
        digests = {"data": self.data_digest, "checkpoint": self.checkpoint_digest}
        return digests | asdict(self.settings)

    def execute(self) -> dict[str, Any]:
        """Fine-tune, or continue to."""
        settings, device = self.settings, self.options.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        data = load_examples(settings.task, self.config)
        encoded = encode_task(
            settings.task,
            self.config,
            settings.max_length,
            settings.segments,
            settings.max_train_examples,
        )
        checkpoint = cached_checkpoint(Path(self.config.checkpoint))
        self.begin({"data": data.train.origin, "from": str(checkpoint.folder)})
        torch.manual_seed(settings.seed)
        model = build_classifier(checkpoint, settings, len(data.task.labels) or 1).to(device)
        model.ponet.encoder.recomputes = settings.max_length > _LONG
        step = FineTuningStep(model, encoded.train, settings, device)

        def evaluate(number: int) -> dict[str, float | None]:
            evaluation = encoded.evaluation.items()
            return _scores(data, {name: self._predict(model, x) for name, x in evaluation})

        trainer = Trainer(
            model,
            step,
            self.options,
            name=self.name,
            steps=step.steps,
            eval_every=step.steps_per_epoch,
            evaluate=evaluate,
        )
        trainer.train(self.folder)
        # a run that was stopped after its last step has its weights, but no scores
        metrics = trainer.scores or evaluate(0)
        began = time.perf_counter()
        for name, examples in encoded.submissions.items():
            path = self.folder / "submission" / f"{name}.tsv"
            predictions = self._predict(model, examples)
            write_submission(path, data.task, data.submissions[name], predictions)
        if self.config.save_models:
            spec = LabelSpec(
                task=settings.task,
                labels=data.task.labels,
                text_columns=data.train.columns,
                max_length=settings.max_length,
                segments=settings.segments,
            )
            save_classifier(self.folder / "model", model, checkpoint.tokenizer, spec)
        seconds = trainer.progress.seconds + time.perf_counter() - began
        result = self.finish(
            {
                **asdict(settings),
                "checkpoint": checkpoint.name,
                "mixer": checkpoint.config.mixer,
                **_compared(metrics, data, encoded),
                "steps": step.steps,
                "seconds": seconds,
                "step_ms": 1e3 * trainer.progress.train_seconds / step.steps,
                "peak_memory_mib": peak_memory_mib(device),
                "num_parameters": sum(p.numel() for p in model.parameters()),
                "device": device_name(device),
            }
        )
        logger.info(
            "%s | %s (majority: %s) in %.0f s",
            self.name,
            describe(metrics),
            describe(result["majority_metrics"]),
            seconds,
        )
        return result

    def _predict(
        self, model: PoNetForSequenceClassification, examples: EncodedExamples
    ) -> np.ndarray:
        """Classes `[N]` int64, or the numbers `[N]` float64 of a regression."""
        outputs = outputs_of(model, examples, self.settings.precision)
        if not np.isfinite(outputs).all():
            raise TrainingError(f"{self.name}: the model's outputs are no longer finite")
        is_regression = outputs.shape[1] == 1
        return outputs[:, 0].astype(np.float64) if is_regression else outputs.argmax(axis=1)


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
