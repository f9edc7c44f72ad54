"""The training loop: steps under the schedule, scores after each pass, checkpoints.

Everything random in a step follows from the seed and the number of the step, so a checkpoint holds
no state of a random generator and no position in the data.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glue.batches import ShuffledBatches, collect
from glue.encoding import EncodedRows
from glue.inference import apply
from glue.settings import RunSettings
from ponet import PoNetForSequenceClassification
from ponet.log import MetricsWriter
from ponet.measure import peak_memory_mib, return_free_memory
from ponet.training import (
    Interval,
    TrainingError,
    autocast,
    damaged,
    load_state,
    save_state,
    step_seed,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MAX_GRAD_NORM = 1.0
_DROPOUT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run computes and reports; nothing here changes its figures."""

    device: torch.device
    """Of the model."""
    gradient_checkpointing: bool
    """Layers are computed again in the backward pass."""
    log_every: int
    """Steps between lines of the log."""
    checkpoint_seconds: float
    """Seconds between checkpoints."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    train_seconds: float = 0.0
    """Seconds of training steps."""
    seconds: float = 0.0
    """Seconds of the run, scoring included."""


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
        hidden = not sys.stderr.isatty()
        bar = tqdm(initial=progress.step, total=self.steps, disable=hidden, dynamic_ncols=True)
        saved = time.perf_counter()
        with bar:
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
        batch = collect(self._rows, self._batches.indices(step), device)
        with autocast(settings.precision, device):
            loss = apply(self._model, batch).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _report(self, interval: Interval, writer: MetricsWriter) -> None:
        progress, name = self.progress, self._settings.name
        loss, seconds = interval.finish()
        if self._place.device.type == "cpu":
            return_free_memory(self._place.device)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{name}: the loss became {loss} in the {interval.steps} steps before step "
                f"{progress.step}; lower --learning-rate or raise --warmup-fraction"
            )
        progress.train_seconds += seconds
        progress.seconds += seconds
        rate = self._optimizer.param_groups[0]["lr"]
        speed = interval.steps / seconds
        memory = peak_memory_mib(self._place.device)
        remaining = (self.steps - progress.step) * progress.seconds / progress.step
        values = {"loss": loss, "learning_rate": rate, "steps_per_s": speed}
        writer.write("train", progress.step, values | {"peak_memory_mib": memory})
        logger.info(
            "%s | step %d/%d | loss %.4f | lr %.1e | %.3g step/s | %s MiB | eta %s",
            name,
            progress.step,
            self.steps,
            loss,
            rate,
            speed,
            f"{memory:,.0f}",
            f"{remaining / 60:.0f}m" if remaining >= 60 else f"{remaining:.0f}s",
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
