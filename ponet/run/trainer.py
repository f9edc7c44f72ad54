"""Training of one model in one process: steps, log, evaluations, checkpoints.

Everything random in a step follows from seeds and the number of the step (`step_seed`), so an
interrupted run continues bit for bit without a state of random generators or of the data.
"""

import io
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field
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
_UNREADABLE = (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError)

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
    """Share of the peak learning rate in a step, from 0: up in a line, then down.

    The peak is reached in the last step of the warm-up, nothing after the last of all.
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
    """Of training steps alone."""
    seconds: float = 0.0
    """Evaluations included."""
    evaluations: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    """Step of the first evaluation with the best score."""


class Step(Protocol):
    """Trains a model by one step, counted from 0; returns the loss, a scalar on the device."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def __call__(self, step: int) -> Tensor: ...
    def learning_rate(self, step: int) -> float: ...


@dataclass
class Trainer:
    """Training of one model from where it stands to its last step."""

    model: nn.Module
    """On the device; trained in place."""
    step: Step
    options: RunOptions
    _: KW_ONLY
    name: str
    """Of the run, for the log."""
    steps: int
    """Of the whole run."""
    eval_every: int
    """Steps between evaluations; there is one after the last step, too."""
    evaluate: Callable[[int], Mapping[str, float | None]] | None = None
    """Scores by the number of the evaluation, from 0; None: there is none."""
    best_by: str | None = None
    """Score by whose highest value weights are kept in `best`."""
    progress: Progress = field(default_factory=Progress, init=False)
    scores: dict[str, float | None] = field(default_factory=dict, init=False)
    """Of the last evaluation in this process."""
    best: dict[str, Tensor] | None = field(default=None, init=False)
    """Weights of the best evaluation, on the CPU."""

    def train(self, folder: Path) -> None:
        """Train to the last step; metrics and `checkpoint.pt` go to a folder.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run.
            TrainingError: a loss is not finite.
        """
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            self._restore(checkpoint)
        progress, options, saved = self.progress, self.options, time.perf_counter()
        with (
            MetricsWriter(folder, rank=0, resume_step=progress.step) as writer,
            progress_bar(progress.step, self.steps, shown=options.shows_bar) as bar,
        ):
            while progress.step < self.steps:
                self._train_interval(writer, bar)
                ends = progress.step % self.eval_every == 0 or progress.step == self.steps
                if ends:
                    self._score(writer)
                if ends or time.perf_counter() - saved > options.checkpoint_seconds:
                    self._save(checkpoint)
                    saved = time.perf_counter()

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.progress = Progress(**state["progress"])
            self.model.load_state_dict(state["model"])
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.step.scaler.load_state_dict(state["scaler"])
            self.best = state["best"]
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path}: damaged or not a checkpoint of this run ({error}); delete its folder to "
                "start the run again"
            ) from error
        logger.info("%s | resuming after step %d", self.name, self.progress.step)

    def _save(self, path: Path) -> None:
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "best": self.best,
        }
        # by way of memory, because torch.save reports a full disk as RuntimeError without its name
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(path, content.getbuffer())

    def _train_interval(self, writer: MetricsWriter, bar: tqdm) -> None:
        """Train to the next line of the log; the device is read only there."""
        progress, device, began = self.progress, self.options.device, time.perf_counter()
        first, every = progress.step, (self.options.log_every, self.eval_every)
        last = min(self.steps, *(first - first % n + n for n in every))
        total = torch.zeros((), dtype=torch.float64, device=device)
        while progress.step < last:
            total += self.step(progress.step)
            progress.step += 1
            bar.update()
        synchronise(device)
        seconds, loss = time.perf_counter() - began, float(total) / (last - first)
        if device.type == "cpu":
            return_free_memory(device)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.name}: the loss became {loss} in the {last - first} steps before step "
                f"{last}; lower --learning-rate or lengthen the warm-up"
            )
        progress.train_seconds += seconds
        progress.seconds += seconds
        metrics = {
            "loss": loss,
            "learning_rate": self.step.learning_rate(last - 1),
            "step_ms": seconds / (last - first) * 1e3,
            "peak_memory_mib": peak_memory_mib(device),
        }
        log_steps(
            writer,
            name=self.name,
            step=last,
            steps=self.steps,
            metrics=metrics,
            remaining_seconds=(self.steps - last) * progress.seconds / last,
        )

    def _score(self, writer: MetricsWriter) -> None:
        """Evaluate, and keep the weights if they are strictly better than all before."""
        if self.evaluate is None:
            return
        progress, began = self.progress, time.perf_counter()
        self.scores = dict(self.evaluate(progress.evaluations))
        progress.evaluations += 1
        best = ""
        if self.best_by is not None:
            score = self.scores[self.best_by]
            if score is not None and score > progress.best_score:
                progress.best_score, progress.best_step = score, progress.step
                state = self.model.state_dict().items()
                self.best = {name: x.detach().cpu().clone() for name, x in state}
            best = f" (best {progress.best_score:.4f} at step {progress.best_step})"
        progress.seconds += time.perf_counter() - began
        writer.write("eval", progress.step, self.scores)
        line = describe(self.scores) + best
        logger.info("%s | step %d/%d | %s", self.name, progress.step, self.steps, line)


def progress_bar(step: int, steps: int, *, shown: bool) -> tqdm:
    """A bar over the steps of a run, where a person watches a terminal."""
    return tqdm(initial=step, total=steps, disable=None if shown else True, dynamic_ncols=True)
