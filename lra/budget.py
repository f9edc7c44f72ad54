"""How many steps fit into a time: measured on a copy of the model before the run."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lra.cache import Split, TaskData
from lra.classify import Classification
from lra.schedule import Plan
from lra.settings import RunSettings
from lra.tasks import TASKS
from ponet.run.cli import UsageError
from ponet.run.device import synchronise
from ponet.run.trainer import Place

_STEPS = 12
_EVALUATION_BATCHES = 4
# of the time, so that a run that slows down a little still ends within it
_RESERVE = 0.05
_MOST_EVALUATION = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that parts of a run take."""

    step: float
    """A training step."""
    evaluation: float
    """An evaluation on the development set."""
    test: float
    """The test."""


def published_plan(settings: RunSettings) -> Plan:
    """The plan of a run whose steps are given."""
    task = TASKS[settings.task]
    return _plan(settings, settings.steps, settings.eval_every or task.eval_every)


def _plan(settings: RunSettings, steps: int, eval_every: int) -> Plan:
    task = TASKS[settings.task]
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(task.warmup_steps * steps / task.steps)
    return Plan(
        steps=steps,
        warmup_steps=min(warmup, steps),
        learning_rate=settings.learning_rate,
        eval_every=eval_every,
    )


def plan_within(minutes: float, speed: Speed, settings: RunSettings) -> Plan:
    """The longest schedule that ends in time, no longer than the published one.

    Unless the settings say how often to evaluate, evaluations become rarer than published where
    they would take more than a fifth of the time of the steps.

    Args:
        minutes: for steps, evaluations and the test.
        speed: as measured.
        settings: of the run.

    Raises:
        UsageError: not even two steps fit.
    """
    every = settings.eval_every
    if every is None:
        sparse = math.ceil(speed.evaluation / (_MOST_EVALUATION * speed.step))
        every = max(TASKS[settings.task].eval_every, sparse)
    # the evaluation after the last step is paid for on top
    seconds = 60 * minutes * (1 - _RESERVE) - speed.test - speed.evaluation
    fit = int(seconds / (speed.step + speed.evaluation / every))
    if fit < 2:
        raise UsageError(
            f"--max-minutes {minutes:g} is too short: a step takes {speed.step:.2f} s, an "
            f"evaluation {speed.evaluation:.0f} s and the test {speed.test:.0f} s; give more, or "
            "fewer --eval-batches and --test-examples"
        )
    return _plan(settings, min(fit, settings.steps), every)


def measure(
    classification: Classification, data: TaskData, settings: RunSettings, place: Place
) -> Speed:
    """Time steps and evaluations on a copy of the model, which stays as it is."""
    probe = classification.probe()
    step = probe.step(published_plan(settings), stage=0)

    def seconds_of(split: Split, batches: list[np.ndarray]) -> float:
        # from the middle of each quarter, because batches may be sorted by length
        places = (np.arange(_EVALUATION_BATCHES) + 0.5) / _EVALUATION_BATCHES * len(batches)
        chosen = [batches[i] for i in places.astype(int)]

        def evaluate(number: int) -> None:
            for _ in probe.answers(split, [chosen[number]]):
                pass

        return len(batches) * _mean_seconds(evaluate, len(chosen), place.device)

    return Speed(
        step=_mean_seconds(step, _STEPS, place.device),
        evaluation=seconds_of(data.dev, probe.dev_batches(0)),
        test=seconds_of(data.test, probe.test_batches()),
    )


def _mean_seconds(work: Callable[[int], object], count: int, device: torch.device) -> float:
    """Mean time of `work(0)` to `work(count - 1)`, after one that does not count."""
    work(0)
    synchronise(device)
    began = time.perf_counter()
    for number in range(count):
        work(number)
    synchronise(device)
    return (time.perf_counter() - began) / count
