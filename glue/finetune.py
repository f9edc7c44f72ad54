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


@lru_cache(maxsize=1)
def encode_training_set(
    config: GlueConfig, task: str, max_length: int, segments: Segments, limit: int | None, seed: int
) -> EncodedExamples:
    """Tokenise what a run learns from, and log what it holds.

    With a `limit` these are the first of all examples in an order that the seed draws.
    """
    data = load_examples(task, config)
    train = data.train
    if limit is not None:
        order = np.random.default_rng((_SUBSET_SEED, seed)).permutation(len(train))
        train = train.take(np.sort(order[:limit]))
    counts = class_counts(data.task, train)
    logger.info("%s | train: %d examples, %s", task, len(train), counts)
    return _encode(config, task, "train", train, max_length, segments)


@lru_cache(maxsize=1)
def encode_other_sets(
    config: GlueConfig, task: str, max_length: int, segments: Segments
) -> Mapping[str, EncodedExamples]:
    """Tokenise what a task scores, by split, and what it predicts, by `submission/NAME`."""
    data = load_examples(task, config)
    sets = {**data.evaluation, **data.tests}
    sets |= {f"submission/{name}": examples for name, examples in data.submissions.items()}
    return {n: _encode(config, task, n, x, max_length, segments) for n, x in sets.items()}


def _encode(
    config: GlueConfig,
    task: str,
    split: str,
    examples: TextExamples,
    max_length: int,
    segments: Segments,
) -> EncodedExamples:
    tokenizer = cached_checkpoint(Path(config.checkpoint)).tokenizer
    encoded = ExampleEncoder(tokenizer, max_length=max_length, segments=segments).encode(examples)
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
        of_task = self.config, settings.task, settings.max_length, settings.segments
        limit = settings.max_train_examples
        train = encode_training_set(*of_task, limit, 0 if limit is None else settings.seed)
        encoded = encode_other_sets(*of_task)
        checkpoint = cached_checkpoint(Path(self.config.checkpoint))
        self.begin({"data": data.train.origin, "from": str(checkpoint.folder)})
        torch.manual_seed(settings.seed)
        model = build_classifier(checkpoint, settings, len(data.task.labels) or 1).to(device)
        model.ponet.encoder.recomputes = settings.max_length > _LONG
        step = FineTuningStep(model, train, settings, device)

        def evaluate(number: int) -> dict[str, float | None]:
            return scores_on(data.evaluation)

        def scores_on(sets: Mapping[str, TextExamples]) -> dict[str, float | None]:
            predictions = {name: self._predict(model, encoded[name]) for name in sets}
            return _scores(data, sets, predictions)

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
        metrics = metrics | scores_on(data.tests)
        for name, examples in data.submissions.items():
            file = f"submission/{name}"
            predictions = self._predict(model, encoded[file])
            write_submission(self.folder / f"{file}.tsv", data.task, examples, predictions)
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
                **_compared(metrics, data, len(train)),
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


def _scores(
    data: TaskExamples, sets: Mapping[str, TextExamples], predictions: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for name, examples in sets.items():
        assert examples.labels is not None
        # a set of another task, as the diagnostic one, has metrics of its own
        metrics = TASKS.get(name, data.task).metrics
        prefix = "" if name == "dev" else f"{name}_"
        scores |= score(metrics, predictions[name], examples.labels, prefix=prefix)
    return scores


def _compared(
    metrics: dict[str, float | None], data: TaskExamples, num_train: int
) -> dict[str, Any]:
    """The scores, those of a constant prediction, and how far either are the published task's."""
    labels = data.train.labels
    assert labels is not None
    sets = {**data.evaluation, **data.tests}
    constant = {name: constant_prediction(labels, len(x)) for name, x in sets.items()}
    majority = _scores(data, sets, constant)
    differences = list(data.differences)
    if num_train < len(data.train):
        differences.append(f"trained on {num_train:,} of {len(data.train):,} rows")
    scored = [data.evaluation[n] for n in data.task.evaluation if n in data.evaluation]
    return {
        "metrics": metrics,
        "score": mean_of(metrics, data.task.headline),
        "majority_metrics": majority,
        "majority": mean_of(majority, data.task.headline),
        "num_train": num_train,
        "num_eval": sum(map(len, scored)),
        "num_test": sum(map(len, data.tests.values())),
        "differences": differences,
    }
