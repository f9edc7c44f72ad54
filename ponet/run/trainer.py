"""Training of one model in one process: steps, log, evaluations, checkpoints.

Everything random in a step follows from seeds and the number of the step (`step_seed`), so a
checkpoint holds no state of a random generator and no position in the data: an interrupted run
continues bit for bit.
"""

import io
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ponet.checkpoint import CheckpointError
from ponet.files import write_bytes
from ponet.run.device import peak_memory_mib, return_free_memory, synchronise
from ponet.run.log import MetricsWriter, describe, log_steps

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: the message says where it stopped and on what."""


def step_seed(*numbers: int) -> int:
    """A seed for PyTorch from the seed of a run and counters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of a forward pass: fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[precision])


def linear_schedule(step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate: up in a line, then down to nothing after the last step.

    Args:
        step: from 0.
        steps: of the run.
        warmup_steps: the peak is reached in the last of these.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def matrices_and_vectors(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer whose weight decay spares biases and LayerNorms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run computes and how it reports; nothing here changes its figures."""

    device: torch.device
    threads: int
    """CPU threads."""
    log_every: int
    """Steps between lines of the log."""
    checkpoint_seconds: float
    shows_bar: bool
    """A bar may be drawn: no other run writes to the same terminal."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    train_seconds: float = 0.0
    """Seconds of training steps."""
    seconds: float = 0.0
    """Seconds of the run, evaluations included."""
    evaluations: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    """Step of the first evaluation with the best score."""


class Step(Protocol):
    """Trains a model by one step."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def __call__(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss, a scalar on the device."""
        ...

    def learning_rate(self, step: int) -> float:
        """Of a step, without a look at the device."""
        ...


class _Interval:
    """Mean loss and seconds of some steps; reads the device only at the end."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._device = device
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._began = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self._sum += loss
        self.steps += 1

    def finish(self) -> tuple[float, float]:
        synchronise(self._device)
        return float(self._sum) / self.steps, time.perf_counter() - self._began


class Trainer:
    """Training of one model from where it stands to its last step."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        options: RunOptions,
        *,
        name: str,
        steps: int,
        eval_every: int,
        evaluate: Callable[[int], Mapping[str, float | None]] | None = None,
        best_by: str | None = None,
    ) -> None:
        """Begin at the first step.

        Args:
            model: on the device; trained in place.
            step: trains it.
            options: where and how.
            name: of the run, for the log.
            steps: of the whole run.
            eval_every: steps between evaluations; there is one after the last step, too.
            evaluate: scores by the number of the evaluation, from 0; None: there is none.
            best_by: score by whose highest value weights are kept in `best`.
        """
        self._model = model
        self._step = step
        self._options = options
        self._name = name
        self._steps = steps
        self._eval_every = eval_every
        self._evaluate = evaluate
        self._best_by = best_by
        self.progress = Progress()
        self.scores: dict[str, float | None] = {}
        """Of the last evaluation in this process."""
        self.best: dict[str, Tensor] | None = None
        """Weights of the best evaluation, on the CPU."""

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint if there is one.

        Raises:
            CheckpointError: it is damaged or of another run.
        """
        if not path.exists():
            return
        state = _load_state(path)
        try:
            progress = Progress(**state["progress"])
            self._model.load_state_dict(state["model"])
            self._step.optimizer.load_state_dict(state["optimizer"])
            self._step.scaler.load_state_dict(state["scaler"])
            self.best = state["best"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        self.progress = progress
        logger.info("%s | resuming after step %d", self._name, progress.step)

    def _save(self, path: Path) -> None:
        state = {
            "progress": asdict(self.progress),
            "model": self._model.state_dict(),
            "optimizer": self._step.optimizer.state_dict(),
            "scaler": self._step.scaler.state_dict(),
            "best": self.best,
        }
        # by way of memory, because torch.save reports a full disk as RuntimeError without its name
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(path, content.getbuffer())

    def train(self, folder: Path) -> None:
        """Train to the last step; metrics and `checkpoint.pt` go to a folder.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run.
            TrainingError: a loss is not finite; the last checkpoint is from before.
            OSError: a file could not be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.pt"
        self.restore(checkpoint)
        with MetricsWriter(folder, rank=0, resume_step=self.progress.step) as writer:
            self._train(checkpoint, writer)

    def _train(self, checkpoint: Path, writer: MetricsWriter) -> None:
        progress, options = self.progress, self._options
        interval, saved = _Interval(options.device), time.perf_counter()
        with progress_bar(progress.step, self._steps, shown=options.shows_bar) as bar:
            while progress.step < self._steps:
                interval.add(self._step(progress.step))
                progress.step += 1
                bar.update()
                ends = progress.step % self._eval_every == 0 or progress.step == self._steps
                if progress.step % options.log_every and not ends:
                    continue
                self._report(interval, writer)
                if ends and self._evaluate is not None:
                    self._score(self._evaluate, writer)
                if ends or time.perf_counter() - saved > options.checkpoint_seconds:
                    self._save(checkpoint)
                    saved = time.perf_counter()
                interval = _Interval(options.device)

    def _report(self, interval: _Interval, writer: MetricsWriter) -> None:
        loss, seconds = interval.finish()
        progress, device = self.progress, self._options.device
        if device.type == "cpu":
            return_free_memory(device)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self._name}: the loss became {loss} in the {interval.steps} steps before step "
                f"{progress.step}; lower --learning-rate or lengthen the warm-up"
            )
        progress.train_seconds += seconds
        progress.seconds += seconds
        log_steps(
            writer,
            name=self._name,
            step=progress.step,
            steps=self._steps,
            metrics={
                "loss": loss,
                "learning_rate": self._step.learning_rate(progress.step - 1),
                "step_ms": seconds / interval.steps * 1e3,
                "peak_memory_mib": peak_memory_mib(device),
            },
            remaining_seconds=(self._steps - progress.step) * progress.seconds / progress.step,
        )

    def _score(
        self, evaluate: Callable[[int], Mapping[str, float | None]], writer: MetricsWriter
    ) -> None:
        """Evaluate, and keep the weights if they are strictly better than all before."""
        progress, began = self.progress, time.perf_counter()
        self.scores = dict(evaluate(progress.evaluations))
        progress.evaluations += 1
        best = ""
        if self._best_by is not None:
            score = self.scores[self._best_by]
            if score is not None and score > progress.best_score:
                progress.best_score, progress.best_step = score, progress.step
                state = self._model.state_dict().items()
                self.best = {name: x.detach().cpu().clone() for name, x in state}
            best = f" (best {progress.best_score:.4f} at step {progress.best_step})"
        progress.seconds += time.perf_counter() - began
        writer.write("eval", progress.step, self.scores)
        line = describe(self.scores) + best
        logger.info("%s | step %d/%d | %s", self._name, progress.step, self._steps, line)


def progress_bar(step: int, steps: int, *, shown: bool) -> tqdm:
    """A bar over the steps of a run, where a person watches a terminal."""
    hidden = not shown or not sys.stderr.isatty()
    return tqdm(initial=step, total=steps, disable=hidden, dynamic_ncols=True)


def _load_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged or not a checkpoint of this run ({error}); delete its folder to start "
        "the run again"
    )
