"""Training steps in two forms: on a batch from the host, or captured, on data of the device.

Everything random in a step follows from the seeds and the number of the step. Both forms run AdamW
without weight decay under the published schedule, and either continues a state of the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ponet.run.trainer import autocast, step_seed

_START_DIVISOR, _END_DIVISOR = 25.0, 1e4
_BETA1_ENDS, _BETA1_PEAK = 0.95, 0.85
_BETA2, _EPSILON = 0.999, 1e-6
# what PyTorch's AdamW keeps for each parameter
_STATE = ("step", "exp_avg", "exp_avg_sq")
# steps whose batches and rates are put on the device together
_AHEAD = 256
# the first calls choose algorithms and allocate what a graph must find in place
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The published schedule: PyTorch's OneCycleLR, linear, with its default cycle of Adam's beta1.

    The rate rises from peak / 25 to the peak and falls to peak / 250,000 at the last step; beta1
    goes from 0.95 to 0.85 and back, although AdamW was asked for 0.9: the published code leaves the
    cycling of the momentum on.
    """

    steps: int
    warmup_steps: int
    """The peak is reached in the last of these."""
    peak: float
    """Highest learning rate."""

    def at(self, step: int) -> tuple[float, float]:
        """Learning rate and beta1 of a step, counted from 0."""
        start, top = self.peak / _START_DIVISOR, self.warmup_steps - 1
        if step <= top:
            share = step / top if top else 1.0
            return _between(start, self.peak, share), _between(_BETA1_ENDS, _BETA1_PEAK, share)
        share = (step - top) / (self.steps - 1 - top)
        end = start / _END_DIVISOR
        return _between(self.peak, end, share), _between(_BETA1_PEAK, _BETA1_ENDS, share)


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share


class TrainingStep(ABC):
    """Does the steps of a schedule."""

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: nn.Module,
        schedule: OneCycle,
        *,
        precision: str,
        seeds: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Prepare to train a model on its device; `seeds` are those of the run and the stage."""
        self._model = model
        self._schedule = schedule
        self._precision = precision
        self._seeds = seeds
        self._device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss on the device, good until the next step."""
        torch.manual_seed(step_seed(*self._seeds, step))
        self._model.train()
        return self._do(step)

    def learning_rate(self, step: int) -> float:
        """Of a step, without a look at the device."""
        return self._schedule.at(step)[0]

    @abstractmethod
    def _do(self, step: int) -> Tensor: ...

    def _update(self, loss: Callable[[], Tensor]) -> Tensor:
        with autocast(self._precision, self._device):
            value = loss()
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()


class PlainStep(TrainingStep):
    """On batches of any shape."""

    def __init__(
        self, model: nn.Module, schedule: OneCycle, *, loss: Callable[[int], Tensor], **shared: Any
    ) -> None:
        """As the base; `loss` is that of a step, counted from 0, on the model."""
        super().__init__(model, schedule, **shared)
        self._loss = loss
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, eps=_EPSILON, weight_decay=0.0, fused=True
        )

    def _do(self, step: int) -> Tensor:
        rate, beta1 = self._schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = rate, (beta1, _BETA2)
        return self._update(lambda: self._loss(step))


class CapturedStep(TrainingStep):
    """On batches of one shape whose data lie on the device, from the choice of examples to the
    optimizer one CUDA graph on a GPU; the same operations one by one elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: OneCycle,
        *,
        loss: Callable[[Tensor], Tensor],
        indices: Callable[[int], np.ndarray],
        **shared: Any,
    ) -> None:
        """As the base; `loss` is that of examples by their `[B]` numbers on the device, `indices`
        the numbers of the examples of a step.
        """
        super().__init__(model, schedule, **shared)
        self._loss = loss
        self._choose = indices
        self._flat = FlatAdamW(model.parameters(), beta2=_BETA2, eps=_EPSILON)
        self.optimizer: torch.optim.Optimizer = self._flat
        self._ahead = range(0)
        self._tables: tuple[Tensor, ...] = ()
        self._indices = torch.zeros(len(indices(0)), dtype=torch.long, device=self._device)
        self._replay = Replay(self._work, self._device, self._keep)

    def _do(self, step: int) -> Tensor:
        if step not in self._ahead:
            self._ahead = range(step, min(step + _AHEAD, self._schedule.steps))
            self._tables = (
                put_rows([self._choose(number) for number in self._ahead], self._device),
                put_rows([self._schedule.at(number) for number in self._ahead], self._device),
            )
        indices, rates = self._tables
        self._indices.copy_(indices[step - self._ahead.start])
        self._flat.rates.copy_(rates[step - self._ahead.start])
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


def put_rows(
    rows: Sequence[np.ndarray] | Sequence[tuple[float, ...]], device: torch.device
) -> Tensor:
    """A table of numbers on a device, without a wait for what it is doing."""
    table = torch.from_numpy(np.array(rows))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


class Replay:
    """Work on a device that is recorded once and then started by one call, as a CUDA graph.

    The work reads and writes tensors that stay where they are, of fixed shapes. On a GPU the first
    call records it, and every call replays the record; elsewhere it is called. Random numbers
    follow from the seed that PyTorch's generator has at each call, as they would without a record:
    before a replay PyTorch hands the generator's seed and offset to the graph.
    """

    def __init__(
        self,
        work: Callable[[], Tensor],
        device: torch.device,
        keep: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        """Take work whose result is a tensor that the next call overwrites.

        `keep` notes what the work changes, and returns what undoes the changes; None: nothing.
        """
        self._work = work
        self._device = device
        self._keep = keep
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """Do the work once."""
        if self._device.type != "cuda":
            return self._work()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return cast(Tensor, self._result)

    def _record(self) -> torch.cuda.CUDAGraph:
        undo = None if self._keep is None else self._keep()
        # not on the default stream, which capture does not allow either
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if undo is not None:
            undo()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._work()
        return graph


class FlatAdamW(torch.optim.AdamW):
    """AdamW without weight decay whose learning rate and beta1 are tensors, for captured steps.

    PyTorch's fused AdamW takes the rate as a tensor but beta1 as a number, which a captured step
    would keep for good; its other forms read a beta1 on the device back. Here all parameters are
    updated as one vector, by the formulas of `torch.optim.AdamW`:

        m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2,
        p <- p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

    Its state has the form of that of `torch.optim.AdamW(..., fused=True)`. A parameter without
    gradient counts as one whose gradient is zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, beta2: float, eps: float) -> None:
        """Make the state of parameters of one dtype on one device."""
        super().__init__(parameters, lr=0.0, betas=(0.0, beta2), eps=eps, weight_decay=0.0)
        # as a fused optimizer, it takes the scale of the loss, and skips a step that overflows
        self._step_supports_amp_scaling = True
        (group,) = self.param_groups
        group["fused"] = True
        self._parameters: list[Tensor] = group["params"]
        first = self._parameters[0]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._means = first.new_zeros(sum(self._sizes), requires_grad=False)
        self._squares = torch.zeros_like(self._means)
        self._counts = torch.zeros(len(self._sizes), device=first.device)
        self.rates = torch.zeros(2, dtype=torch.float64, device=first.device)
        """Learning rate and beta1 of the next step, float64; to be written in place."""
        self._share()

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self._parameters, self._means, self._squares, self._counts]

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _share(self) -> None:
        values = (self._counts.unbind(), self._views(self._means), self._views(self._squares))
        for parameter, *parts in zip(self._parameters, *values, strict=True):
            self.state[parameter] = dict(zip(_STATE, parts, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        self._parameters = group["params"]
        states = [self.state[parameter] for parameter in self._parameters]
        for name, flat in zip(_STATE, (self._counts, self._means, self._squares), strict=True):
            flat.copy_(torch.cat([state[name].flatten() for state in states]))
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters from their gradients."""
        (group,) = self.param_groups
        (_, beta2), eps = group["betas"], group["eps"]
        rate, beta1 = self.rates.unbind()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        overflow: Tensor | None = getattr(self, "found_inf", None)

        missing = (torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)
        gradient = torch.cat([g.flatten() for g in missing])
        if scale is not None:
            gradient = gradient / scale
        counts = self._counts + 1
        count = counts[0].double()
        means = self._means + (gradient - self._means) * (1 - beta1)
        squares = self._squares * beta2 + gradient.square() * (1 - beta2)
        size = rate / (1 - beta1**count)
        root = (1 - beta2**count).sqrt()
        change = -size * means / (squares.sqrt() / root + eps)
        if overflow is not None:
            fine = overflow.squeeze() == 0
            change = change.masked_fill(~fine, 0.0)
            means = means.where(fine, self._means)
            squares = squares.where(fine, self._squares)
            counts = counts.where(fine, self._counts)
        changes = self._views(change)
        torch._foreach_add_(self._parameters, changes)  # pyright: ignore[reportPrivateImportUsage]
        self._means.copy_(means)
        self._squares.copy_(squares)
        self._counts.copy_(counts)
