"""A training step in two forms: on a batch from the host, or captured, on data of the device.

Everything random in a step follows from the seeds and the number of the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lra.adamw import FlatAdamW
from lra.replay import Replay
from lra.schedule import Plan
from ponet.run.trainer import autocast, step_seed

_BETA2, _EPSILON = 0.999, 1e-6
# steps whose batches and rates are put on the device together
_AHEAD = 256


class Step(ABC):
    """Does the steps of a plan; the optimizer is published AdamW without weight decay."""

    optimizer: torch.optim.AdamW
    """Of the model; either form continues a state of the other."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        precision: str,
        seeds: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            model: on the device; trained in place.
            plan: of the stage.
            precision: fp32, bf16, or fp16 with a scaled loss.
            seeds: of the run and the stage.
            device: of the model.
        """
        self._model = model
        self._plan = plan
        self._precision = precision
        self._seeds = seeds
        self._device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, step: int) -> Tensor:
        """Do a step, counted from 0.

        Returns:
            The loss, a scalar on the device, good until the next step.
        """
        torch.manual_seed(step_seed(*self._seeds, step))
        self._model.train()
        return self._do(step)

    @abstractmethod
    def _do(self, step: int) -> Tensor:
        """Train."""

    def _update(self, loss: Callable[[], Tensor]) -> Tensor:
        with autocast(self._precision, self._device):
            value = loss()
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()


class PlainStep(Step):
    """On batches of any shape."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        loss: Callable[[int], Tensor],
        precision: str,
        seeds: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """As the base, and:

        Args:
            loss: the loss of a step, counted from 0, on the model.
        """
        super().__init__(model, plan, precision=precision, seeds=seeds, device=device)
        self._loss = loss
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, eps=_EPSILON, weight_decay=0.0, fused=True
        )

    def _do(self, step: int) -> Tensor:
        rate, beta1 = self._plan.at(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = rate, (beta1, _BETA2)
        return self._update(lambda: self._loss(step))


class CapturedStep(Step):
    """On batches of one shape whose data lie on the device, from the choice of examples to the
    optimizer one CUDA graph on a GPU; the same operations one by one elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        loss: Callable[[Tensor], Tensor],
        indices: Callable[[int], np.ndarray],
        precision: str,
        seeds: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """As the base, and:

        Args:
            loss: of examples by their `[B]` numbers on the device, on the model.
            indices: the numbers of the examples of a step.
        """
        super().__init__(model, plan, precision=precision, seeds=seeds, device=device)
        self._loss = loss
        self._choose = indices
        self.optimizer = self._flat = FlatAdamW(model.parameters(), beta2=_BETA2, eps=_EPSILON)
        self._ahead = range(0)
        self._tables: tuple[Tensor, ...] = ()
        self._indices = torch.zeros(len(indices(0)), dtype=torch.long, device=device)
        self._schedule = torch.zeros(2, dtype=torch.float64, device=device)
        self._flat.set_schedule(self._schedule)
        self._replay = Replay(self._work, device, self._keep)

    def _do(self, step: int) -> Tensor:
        if step not in self._ahead:
            self._ahead = range(step, min(step + _AHEAD, self._plan.steps))
            self._tables = (
                put([self._choose(number) for number in self._ahead], self._device),
                put([self._plan.at(number) for number in self._ahead], self._device),
            )
        indices, schedule = self._tables
        self._indices.copy_(indices[step - self._ahead.start])
        self._schedule.copy_(schedule[step - self._ahead.start])
        return self._replay()

    def _work(self) -> Tensor:
        return self._update(lambda: self._loss(self._indices))

    def _keep(self) -> Callable[[], None]:
        tensors, scale = self._flat.tensors, self.scaler.state_dict()
        kept = [tensor.detach().clone() for tensor in tensors]
        seed = torch.initial_seed()

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value)
            self.scaler.load_state_dict(scale)
            # the generator stands where `__call__` had put it
            torch.manual_seed(seed)

        return undo


def put(rows: Sequence[np.ndarray] | Sequence[tuple[float, ...]], device: torch.device) -> Tensor:
    """A table of numbers on a device, without a wait for what it is doing."""
    table = torch.from_numpy(np.array(rows))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
