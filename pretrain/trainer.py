"""One optimizer step, one evaluation, and the sums both report."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from ponet.model import PreTrainingOutput
from ponet.run.trainer import TrainingError
from pretrain.batches import Batch
from pretrain.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over examples from which losses and accuracies follow."""

    mlm_loss: float
    """Cross-entropy summed over masked tokens."""
    mlm_correct: float
    """Masked tokens whose likeliest prediction is right."""
    sso_loss: float
    """Cross-entropy summed over sequences."""
    sso_correct: float
    """Sequences whose likeliest class is right."""
    tokens: float
    """Tokens, special ones included."""
    masked: float
    """Masked tokens."""
    sequences: float
    """Sequences with a sentence label."""

    def metrics(self, where: str) -> dict[str, float]:
        """Means: losses in nats, accuracies as shares.

        Args:
            where: what was summed, for the error.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        means = {
            "mlm_loss": self.mlm_loss / max(self.masked, 1),
            "mlm_accuracy": self.mlm_correct / max(self.masked, 1),
        }
        if self.sequences:
            means["sso_loss"] = self.sso_loss / self.sequences
            means["sso_accuracy"] = self.sso_correct / self.sequences
        loss = means["mlm_loss"] + means.get("sso_loss", 0.0)
        if not math.isfinite(loss):
            parts = ", ".join(f"{n[:3]} {x:.4g}" for n, x in means.items() if n.endswith("loss"))
            raise TrainingError(
                f"loss is {loss} in {where} ({parts}); lower --learning-rate or --max-grad-norm, "
                "or raise --warmup-steps, and --resume from the last checkpoint"
            )
        return {"loss": loss, **means}


class Tally:
    """Adds up micro-batches without waiting: losses on the device, counts on the host."""

    def __init__(self, device: torch.device) -> None:
        # in the order of the fields of `Sums`
        self._measured = torch.zeros(4, dtype=torch.float64, device=device)
        self._counts = [0, 0, 0]

    @torch.no_grad()
    def add(self, output: PreTrainingOutput, labels: dict[str, Tensor], batch: Batch) -> None:
        """Add a micro-batch.

        Args:
            output: of the model.
            labels: those on the device, `labels` `[M]` and `sso_labels` `[B]`.
            batch: the micro-batch.
        """
        assert output.mlm_loss is not None
        mlm_correct = (output.mlm_logits.argmax(dim=-1) == labels["labels"]).sum()
        sums = [output.mlm_loss.detach() * batch.masked, mlm_correct]
        if output.sso_loss is not None and output.sso_logits is not None:
            sso_correct = (output.sso_logits.argmax(dim=-1) == labels["sso_labels"]).sum()
            sums += [output.sso_loss.detach() * batch.sequences, sso_correct]
        self._measured[: len(sums)].add_(torch.stack([value.double() for value in sums]))
        counts = (batch.tokens, batch.masked, batch.sequences)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]

    def read(self) -> Sums:
        """The sums over all ranks; waits for the device."""
        total = torch.cat([self._measured, self._measured.new_tensor(self._counts)])
        dist.all_reduce(total)
        names = (field.name for field in fields(Sums))
        return Sums(**dict(zip(names, total.tolist(), strict=True)))


def dropout_seed(seed: int, batch: Batch) -> int:
    """Seed of the dropout of a micro-batch: the same wherever and whenever it is computed."""
    # distinct odd multipliers keep the three counters from cancelling out
    mixed = seed * 0x9E3779B97F4A7C15 + batch.epoch * 0xC2B2AE3D27D4EB4F
    return (mixed + batch.step * 0x165667B19E3779F9 + batch.slot * 0x27D4EB2F165667C5) % 2**63


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did; nothing of it is read from the device."""

    grad_norm: Tensor | None
    """Norm of the gradient before clipping, when asked for."""
    epoch: int
    """Pass over the documents."""
    epoch_step: int
    """Global batch of that pass."""


def train_step(
    engine: Engine, batches: Iterator[Batch], tally: Tally, *, seed: int, want_norm: bool
) -> StepResult:
    """Accumulate this rank's micro-batches of a global batch and update the weights.

    Args:
        engine: trains the model.
        batches: of this rank.
        tally: takes their sums.
        seed: of the run.
        want_norm: of the gradient.
    """
    norm = None
    parts = list(islice(batches, engine.accumulation_steps))
    last = parts[-1]
    for batch in parts:
        inputs = batch.inputs.to(engine.device)
        torch.manual_seed(dropout_seed(seed, batch))
        output = engine.forward(inputs)
        tally.add(output, inputs, batch)
        assert output.loss is not None
        engine.backward(output.loss)
        if want_norm and batch is last:
            norm = engine.grad_norm()
        engine.end_micro_batch(last=batch is last)
    return StepResult(grad_norm=norm, epoch=last.epoch, epoch_step=last.step)


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[Batch], step: int) -> dict[str, float]:
    """Losses and accuracies after a step, over the evaluation batches of all ranks.

    Raises:
        TrainingError: the loss is not a finite number.
    """
    tally = Tally(engine.device)
    engine.model.eval()
    for batch in batches:
        inputs = batch.inputs.to(engine.device)
        tally.add(engine.forward(inputs), inputs, batch)
    engine.model.train()
    return tally.read().metrics(f"the evaluation after step {step}")


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
