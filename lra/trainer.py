"""The training loop: steps under the schedule, evaluations, checkpoints that continue bit for bit.

Everything random in a step follows from the seed and the number of the step, so a checkpoint holds
no state of a random generator and no position in the data.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lra.schedule import one_cycle
from ponet.checkpoint import CheckpointError
from ponet.log import MetricsWriter
from ponet.training import (
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

_BETA2, _EPSILON = 0.999, 1e-6

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage of training does."""

    steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps of rising learning rate."""
    learning_rate: float
    """Peak."""
    eval_every: int
    """Steps between evaluations; there is one after the last step, too."""


@dataclass(kw_only=True)
class StageProgress(Progress):
    """Where a stage stands."""

    evaluations: int = 0
    """Evaluations done."""
    best_accuracy: float = -1.0
    """Highest accuracy of an evaluation; -1 before the first."""
    best_step: int = 0
    """Step of the first evaluation that reached it."""


class Trainer:
    """One stage of training of one model."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        place: Place,
        *,
        loss: Callable[[int], Tensor],
        evaluate: Callable[[int], float] | None,
        precision: str,
        seeds: tuple[int, ...],
        name: str,
    ) -> None:
        """Make an optimizer, published AdamW without weight decay.

        Args:
            model: on the device; trained in place.
            plan: of the stage.
            place: where the stage runs.
            loss: the loss of a step, counted from 0, on the model.
            evaluate: the accuracy by the number of the evaluation, from 0; None: there is none.
            precision: fp32, bf16, or fp16 with a scaled loss.
            seeds: of the run and the stage.
            name: of the run, for the log.
        """
        self._model = model
        self._plan = plan
        self._place = place
        self._loss = loss
        self._evaluate = evaluate
        self._precision = precision
        self._seeds = seeds
        self._name = name
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.learning_rate, eps=_EPSILON, weight_decay=0.0, fused=True
        )
        self._scaler = torch.amp.GradScaler(place.device.type, enabled=precision == "fp16")
        self.progress = StageProgress()
        self.best: dict[str, Tensor] | None = None
        """Weights of the best evaluation, on the CPU."""

    def restore(self, path: Path) -> bool:
        """Continue from a checkpoint if there is one.

        Returns:
            Whether there was.

        Raises:
            CheckpointError: it is damaged or of another plan.
        """
        if not path.exists():
            return False
        state = load_state(path)
        try:
            planned, progress = Plan(**state["plan"]), StageProgress(**state["progress"])
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error
        if planned != self._plan:
            raise CheckpointError(f"{path}: written under {planned}, running {self._plan}")
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.progress, self.best = progress, state["best"]
        return True

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically.

        Raises:
            OSError: it could not be written; the one before is as it was.
        """
        state = {
            "plan": asdict(self._plan),
            "progress": asdict(self.progress),
            "model": self._model.state_dict(),
            "best": self.best,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        save_state(path, state)

    def train(self, checkpoint: Path, writer: MetricsWriter) -> None:
        """Train from where the stage stands to its end.

        Raises:
            TrainingError: a loss is not finite; the last checkpoint is from before.
            OSError: a checkpoint could not be written.
        """
        plan, progress, device = self._plan, self.progress, self._place.device
        interval = Interval(device)
        saved = time.perf_counter()
        with progress_bar(progress, plan.steps, self._place) as bar:
            while progress.step < plan.steps:
                interval.add(self.step(progress.step))
                progress.step += 1
                bar.update()
                ends = progress.step % plan.eval_every == 0 or progress.step == plan.steps
                if progress.step % self._place.log_every and not ends:
                    continue
                self._report(interval, writer)
                if ends and self._evaluate is not None:
                    self._select(self._evaluate, writer)
                if ends or time.perf_counter() - saved > self._place.checkpoint_seconds:
                    self.save(checkpoint)
                    saved = time.perf_counter()
                interval = Interval(device)

    def step(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss, a scalar on the device."""
        plan = self._plan
        rate, beta1 = one_cycle(
            step, steps=plan.steps, warmup_steps=plan.warmup_steps, peak=plan.learning_rate
        )
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = rate, (beta1, _BETA2)
        torch.manual_seed(step_seed(*self._seeds, step))
        self._model.train()
        with autocast(self._precision, self._place.device):
            loss = self._loss(step)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _report(self, interval: Interval, writer: MetricsWriter) -> None:
        report_interval(
            interval,
            self.progress,
            self._place,
            writer,
            name=self._name,
            steps=self._plan.steps,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            remedy="lower --learning-rate or raise --warmup-steps",
        )

    def _select(self, evaluate: Callable[[int], float], writer: MetricsWriter) -> None:
        """Evaluate, and keep the weights if they are strictly better than all before."""
        progress, began = self.progress, time.perf_counter()
        accuracy = evaluate(progress.evaluations)
        progress.evaluations += 1
        if accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_step = accuracy, progress.step
            state = self._model.state_dict().items()
            self.best = {name: x.detach().cpu().clone() for name, x in state}
        progress.seconds += time.perf_counter() - began
        values = {"accuracy": accuracy, "best_accuracy": progress.best_accuracy}
        writer.write("eval", progress.step, values)
        logger.info(
            "%s | step %d | dev accuracy %.4f (best %.4f at step %d)",
            self._name,
            progress.step,
            accuracy,
            progress.best_accuracy,
            progress.best_step,
        )
