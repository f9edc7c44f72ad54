"""The training loop: steps under the schedule, scores after each pass, checkpoints.

Everything random in a step follows from the seed and the number of the step, so a checkpoint holds
no state of a random generator and no position in the data.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.batches import ShuffledBatches, collect
from glue.encoding import EncodedRows
from glue.settings import RunSettings
from ponet import PoNetForSequenceClassification
from ponet.run.log import MetricsWriter
from ponet.run.trainer import (
    Interval,
    Place,
    Progress,
    autocast,
    damaged,
    load_state,
    progress_bar,
    report_interval,
    save_state,
    step_seed,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MAX_GRAD_NORM = 1.0
_DROPOUT = 2

logger = logging.getLogger(__name__)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate: up in a line, then down to nothing after the last step.

    Args:
        step: from 0 to `steps - 1`.
        steps: of the run.
        warmup_steps: the peak is reached in the last of these.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / (steps - warmup_steps)


class Trainer:
    """Training of one model."""

    def __init__(
        self,
        model: PoNetForSequenceClassification,
        rows: EncodedRows,
        settings: RunSettings,
        place: Place,
    ) -> None:
        """Make an optimizer.

        Args:
            model: on the device; trained in place.
            rows: to learn from.
            settings: of the run.
            place: where it runs.
        """
        self._model = model
        self._rows = rows
        self._settings = settings
        self._place = place
        self._batches = ShuffledBatches(rows.lengths, settings.batch_size, seed=settings.seed)
        self.steps_per_epoch = self._batches.per_pass
        self.steps = settings.epochs * self.steps_per_epoch
        self._warmup_steps = round(settings.warmup_fraction * self.steps)
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=_BETAS,
            eps=_EPSILON,
            # on a CPU, too, several times as fast as one operation after another
            fused=True,
        )
        self.progress = Progress()

    def restore(self, path: Path) -> bool:
        """Continue from a checkpoint if there is one.

        Returns:
            Whether there was.

        Raises:
            CheckpointError: it is damaged or of another run.
        """
        if not path.exists():
            return False
        state = load_state(path)
        try:
            progress = Progress(**state["progress"])
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error
        self.progress = progress
        return True

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically.

        Raises:
            OSError: it could not be written; the one before is as it was.
        """
        state = {
            "progress": asdict(self.progress),
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        save_state(path, state)

    def train(
        self,
        checkpoint: Path,
        writer: MetricsWriter,
        evaluate: Callable[[], dict[str, float | None]],
    ) -> dict[str, float | None]:
        """Train from where the run stands to its end.

        Args:
            checkpoint: where to keep the state of an unfinished run.
            writer: of the metrics.
            evaluate: scores the model.

        Returns:
            The scores after the last step.

        Raises:
            TrainingError: a loss is not finite; the last checkpoint is from before.
            OSError: a checkpoint could not be written.
        """
        progress, place = self.progress, self._place
        scores: dict[str, float | None] = {}
        interval = Interval(place.device)
        saved = time.perf_counter()
        with progress_bar(progress, self.steps, place) as bar:
            while progress.step < self.steps:
                interval.add(self.step(progress.step))
                progress.step += 1
                bar.update()
                ends = progress.step % self.steps_per_epoch == 0
                if progress.step % place.log_every and not ends:
                    continue
                self._report(interval, writer)
                if ends:
                    scores = self._evaluate(evaluate, writer)
                due = time.perf_counter() - saved > place.checkpoint_seconds
                # the last step ends the run: nothing would continue from it
                if due and progress.step < self.steps:
                    self.save(checkpoint)
                    saved = time.perf_counter()
                interval = Interval(place.device)
        return scores

    def step(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss, a scalar on the device."""
        settings, device = self._settings, self._place.device
        factor = learning_rate_factor(step, steps=self.steps, warmup_steps=self._warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        torch.manual_seed(step_seed(settings.seed, _DROPOUT, step))
        self._model.train()
        batch = collect(self._rows, self._batches.indices(step), self._model.config)
        with autocast(settings.precision, device):
            loss = self._model(**batch.to(device)).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _report(self, interval: Interval, writer: MetricsWriter) -> None:
        report_interval(
            interval,
            self.progress,
            self._place,
            writer,
            name=self._settings.name,
            steps=self.steps,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            remedy="lower --learning-rate or raise --warmup-fraction",
        )

    def _evaluate(
        self, evaluate: Callable[[], dict[str, float | None]], writer: MetricsWriter
    ) -> dict[str, float | None]:
        began = time.perf_counter()
        scores = evaluate()
        self.progress.seconds += time.perf_counter() - began
        defined: dict[str, Any] = {n: value for n, value in scores.items() if value is not None}
        writer.write("eval", self.progress.step, defined)
        logger.info(
            "%s | epoch %d of %d | %s",
            self._settings.name,
            self.progress.step // self.steps_per_epoch,
            self._settings.epochs,
            describe(scores),
        )
        return scores


def describe(scores: dict[str, float | None]) -> str:
    """Scores on a line."""
    return ", ".join(
        f"{name} {'undefined' if value is None else f'{value:.4f}'}"
        for name, value in scores.items()
    )
