"""The training loop: steps under the schedule, evaluations, checkpoints that continue bit for bit.

Everything random in a step follows from the seed and the number of the step (`lra.steps`), so a
checkpoint holds no state of a random generator and no position in the data.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from lra.schedule import Plan
from lra.steps import Step
from ponet.checkpoint import CheckpointError
from ponet.run.log import MetricsWriter
from ponet.run.trainer import (
    Interval,
    Place,
    Progress,
    damaged,
    load_state,
    progress_bar,
    report_interval,
    save_state,
)

logger = logging.getLogger(__name__)


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
        step: Step,
        evaluate: Callable[[int], float] | None,
        name: str,
    ) -> None:
        """Begin at the first step.

        Args:
            model: on the device.
            plan: of the stage.
            place: where the stage runs.
            step: trains the model.
            evaluate: the accuracy by the number of the evaluation, from 0; None: there is none.
            name: of the run, for the log.
        """
        self._model = model
        self._plan = plan
        self._place = place
        self._step = step
        self._evaluate = evaluate
        self._name = name
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
        self._step.optimizer.load_state_dict(state["optimizer"])
        self._step.scaler.load_state_dict(state["scaler"])
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
            "optimizer": self._step.optimizer.state_dict(),
            "scaler": self._step.scaler.state_dict(),
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
                interval.add(self._step(progress.step))
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

    def _report(self, interval: Interval, writer: MetricsWriter) -> None:
        report_interval(
            interval,
            self.progress,
            self._place,
            writer,
            name=self._name,
            steps=self._plan.steps,
            learning_rate=self._plan.at(self.progress.step - 1)[0],
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
