"""What training programs share: seeds, arithmetic, intervals of the log, files of a run."""

import io
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ponet.checkpoint import CheckpointError, write_bytes
from ponet.cli import UsageError
from ponet.measure import synchronise

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


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
