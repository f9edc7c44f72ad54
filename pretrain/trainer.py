"""One optimizer step, one evaluation, and the sums both report."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ponet.model import IGNORED_LABEL, PreTrainingOutput
from pretrain.engine import Engine, device_of, gradient_norm

_INPUTS = (
    "input_ids",
    "token_type_ids",
    "segment_ids",
    "position_ids",
    "labels",
    "sso_labels",
    "cu_seqlens",
)


class TrainingError(RuntimeError):
    """Training cannot go on: the message says where it stopped and on what."""


@dataclass(kw_only=True)
class Sums:
    """Sums over examples from which losses and accuracies follow."""

    mlm_loss: float = 0.0
    """Cross-entropy summed over masked tokens."""
    mlm_correct: float = 0.0
    """Masked tokens whose likeliest prediction is right."""
    masked: float = 0.0
    """Masked tokens."""
    sso_loss: float = 0.0
    """Cross-entropy summed over sequences."""
    sso_correct: float = 0.0
    """Sequences whose likeliest class is right."""
    sequences: float = 0.0
    """Sequences."""
    tokens: float = 0.0
    """Tokens, special ones included."""

    def add(self, values: Tensor) -> None:
        """Add a vector in the order of the fields."""
        for field, value in zip(fields(self), values.tolist(), strict=True):
            setattr(self, field.name, getattr(self, field.name) + value)

    def metrics(self) -> dict[str, float]:
        """Means: losses in nats, accuracies as shares."""
        means = {
            "mlm_loss": self.mlm_loss / max(self.masked, 1),
            "mlm_accuracy": self.mlm_correct / max(self.masked, 1),
        }
        if self.sequences:
            means["sso_loss"] = self.sso_loss / self.sequences
            means["sso_accuracy"] = self.sso_correct / self.sequences
        return {"loss": means["mlm_loss"] + means.get("sso_loss", 0.0), **means}


def no_sums(device: torch.device) -> Tensor:
    """Sums of nothing: `[7]` float64, in the order of `Sums`."""
    return torch.zeros(len(fields(Sums)), dtype=torch.float64, device=device)


@torch.no_grad()
def _measure(output: PreTrainingOutput, inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["labels"]
    targets = labels[labels != IGNORED_LABEL]
    assert output.mlm_loss is not None
    correct = (output.mlm_logits.argmax(dim=-1) == targets).sum()
    sums = [output.mlm_loss.detach() * len(targets), correct, targets.new_tensor(len(targets))]
    if output.sso_loss is not None and output.sso_logits is not None:
        answers = inputs["sso_labels"]
        sums += [
            output.sso_loss.detach() * len(answers),
            (output.sso_logits.argmax(dim=-1) == answers).sum(),
            answers.new_tensor(len(answers)),
        ]
    else:
        sums += [targets.new_tensor(0)] * 3
    sums.append(targets.new_tensor(len(labels)))
    return torch.stack([value.double() for value in sums])


def _inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: batch[name].to(device, non_blocking=True) for name in _INPUTS if name in batch}


def dropout_seed(seed: int, batch: dict[str, Any]) -> int:
    """Seed of the dropout of a micro-batch: the same wherever and whenever it is computed."""
    # distinct odd multipliers keep the three counters from cancelling out
    mixed = seed * 0x9E3779B97F4A7C15 + batch["epoch"] * 0xC2B2AE3D27D4EB4F
    return (mixed + batch["step"] * 0x165667B19E3779F9 + batch["slot"] * 0x27D4EB2F165667C5) % 2**63


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did on this rank."""

    sums: Tensor
    """`[7]` float64, in the order of `Sums`."""
    grad_norm: float | None
    """Norm of the gradient before clipping, when asked for."""
    epoch: int
    """Pass over the documents."""
    epoch_step: int
    """Global batch of that pass."""


def train_step(
    engine: Engine,
    batches: Iterator[dict[str, Any]],
    *,
    seed: int,
    want_norm: bool,
) -> StepResult:
    """Accumulate this rank's micro-batches of a global batch and update the weights.

    Raises:
        TrainingError: a loss is not a finite number.
    """
    total = no_sums(device_of(engine))
    norm = None
    parts = list(islice(batches, engine.gradient_accumulation_steps()))
    for batch in parts:
        total += _backward(engine, batch, seed)
        if want_norm and batch is parts[-1]:
            norm = gradient_norm(engine)
        engine.step()
    last = parts[-1]
    return StepResult(sums=total, grad_norm=norm, epoch=last["epoch"], epoch_step=last["step"])


def _backward(engine: Engine, batch: dict[str, Any], seed: int) -> Tensor:
    inputs = _inputs(batch, device_of(engine))
    torch.manual_seed(dropout_seed(seed, batch))
    output = engine(**inputs)
    # read once: it waits for the device
    loss = float(output.loss.detach())
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss is {loss} in step {batch['step']} of epoch "
            f"{batch['epoch']}, micro-batch {batch['slot']} (mlm "
            f"{float(output.mlm_loss.detach()):.4g}); lower --learning-rate or --max-grad-norm, or "
            "raise --warmup-steps, and --resume from the last checkpoint"
        )
    engine.backward(output.loss)
    return _measure(output, inputs)


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Losses and accuracies over the evaluation batches of all ranks."""
    total = no_sums(device_of(engine))
    engine.eval()
    for batch in batches:
        inputs = _inputs(batch, device_of(engine))
        total += _measure(engine(**inputs), inputs)
    engine.train()
    return add_ranks(total).metrics()


def add_ranks(total: Tensor) -> Sums:
    """Add up the sums of all ranks."""
    total = total.clone()
    dist.all_reduce(total)
    sums = Sums()
    sums.add(total)
    return sums


class Stopwatch:
    """Seconds of training, paused while something else is done."""

    def __init__(self, seconds: float) -> None:
        self._before = seconds
        self._start: float | None = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._before + running

    def pause(self) -> None:
        """Stop counting."""
        self._before, self._start = self.seconds(), None

    def resume(self) -> None:
        """Count again."""
        self._start = time.perf_counter()
