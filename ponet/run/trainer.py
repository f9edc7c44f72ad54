"""What training programs share: seeds, arithmetic, progress and its log, files of a run."""

import io
import json
import logging
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ponet.checkpoint import CheckpointError, write_bytes
from ponet.run.cli import UsageError
from ponet.run.device import peak_memory_mib, return_free_memory, synchronise
from ponet.run.log import MetricsWriter

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


class Interval:
    """Mean loss and seconds of some steps; reads the device only at the end."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._device = device
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._began = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step."""
        self._sum += loss
        self.steps += 1

    def finish(self) -> tuple[float, float]:
        """Mean loss, and seconds since the beginning."""
        synchronise(self._device)
        return float(self._sum) / self.steps, time.perf_counter() - self._began


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run computes and reports; nothing here changes its figures."""

    device: torch.device
    """Of the model."""
    log_every: int
    """Steps between lines of the log."""
    checkpoint_seconds: float
    """Seconds between checkpoints."""
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


def progress_bar(progress: Progress, steps: int, place: Place) -> tqdm:
    """A bar over the steps of a run, where a person watches."""
    hidden = not place.shows_bar or not sys.stderr.isatty()
    return tqdm(initial=progress.step, total=steps, disable=hidden, dynamic_ncols=True)


def report_interval(
    interval: Interval,
    progress: Progress,
    place: Place,
    writer: MetricsWriter,
    *,
    name: str,
    steps: int,
    learning_rate: float,
    remedy: str,
) -> None:
    """Record and log the steps since the last time, and count their seconds.

    Args:
        interval: the steps.
        progress: of the run, after them.
        place: where it runs.
        writer: of its metrics.
        name: of the run.
        steps: of the whole run.
        learning_rate: in the last step.
        remedy: what helps against a loss that is not finite.

    Raises:
        TrainingError: the loss is not finite.
    """
    loss, seconds = interval.finish()
    if place.device.type == "cpu":
        return_free_memory(place.device)
    if not math.isfinite(loss):
        raise TrainingError(
            f"{name}: the loss became {loss} in the {interval.steps} steps before step "
            f"{progress.step}; {remedy}"
        )
    progress.train_seconds += seconds
    progress.seconds += seconds
    speed = interval.steps / seconds
    memory = peak_memory_mib(place.device)
    remaining = (steps - progress.step) * progress.seconds / progress.step
    values = {"loss": loss, "learning_rate": learning_rate, "steps_per_s": speed}
    writer.write("train", progress.step, values | {"peak_memory_mib": memory})
    logger.info(
        "%s | step %d/%d | loss %.4f | lr %.1e | %.3g step/s | %s MiB | eta %s",
        name,
        progress.step,
        steps,
        loss,
        learning_rate,
        speed,
        f"{memory:,.0f}",
        f"{remaining / 60:.0f}m" if remaining >= 60 else f"{remaining:.0f}s",
    )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically.

    Raises:
        OSError: it could not be written; the file before is as it was.
    """
    # by way of memory, because torch.save reports a full disk as RuntimeError without its name
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, to the CPU, without unpickling code.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to say of a checkpoint whose content is not that of the run."""
    return CheckpointError(
        f"{path}: damaged or not a checkpoint of this program ({error}); delete its folder to "
        "start the run again"
    )


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a JSON document of a run's folder; None when there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete its folder to start the run again"
        ) from error


def refuse_other_run(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Check that the run of a folder is the one that is asked for.

    Args:
        folder: of the run.
        found: what decides its figures, as recorded there.
        asked: the same, as wanted now.

    Raises:
        UsageError: they differ.
    """
    other = [
        f"{name} {found.get(name)!r}, now {value!r}"
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if other:
        raise UsageError(
            f"{folder}: holds a run with other settings ({'; '.join(other)}); give another "
            "--output-dir, or delete the folder"
        )
