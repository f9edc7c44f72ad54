"""Training steps in two forms: on a batch from the host, or captured, on data of the device.

Everything random in a step follows from the seeds and the number of the step. Both forms run AdamW
without weight decay under the published schedule, and either continues a state of the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
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
# the first calls choose algorithms and allocate what a graph must find in place
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The published schedule: PyTorch's OneCycleLR, linear, which cycles Adam's beta1 by default.

    The rate rises from peak / 25 to the peak and falls to peak / 250,000 at the last step; beta1
    goes from 0.95 to 0.85 and back, although the published code asks AdamW for 0.9.
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
            ends = (start, self.peak), (_BETA1_ENDS, _BETA1_PEAK)
        else:
            share = (step - top) / (self.steps - 1 - top)
            ends = (self.peak, start / _END_DIVISOR), (_BETA1_PEAK, _BETA1_ENDS)
        rate, beta1 = (first + (last - first) * share for first, last in ends)
        return rate, beta1


@dataclass
class TrainingStep(ABC):
    """Does the steps of a schedule on a model on its device."""

    model: nn.Module
    schedule: OneCycle
    _: KW_ONLY
    precision: str
    seeds: tuple[int, ...]
    """Of the run and the stage."""
    device: torch.device
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def __call__(self, step: int) -> Tensor:
        """Do a step, counted from 0; returns the loss on the device, good until the next step."""
        torch.manual_seed(step_seed(*self.seeds, step))
        self.model.train()
        return self._do(step)

    def learning_rate(self, step: int) -> float:
        """Of a step, without a look at the device."""
        return self.schedule.at(step)[0]

    @abstractmethod
    def _do(self, step: int) -> Tensor: ...

    def _update(self, loss: Callable[[], Tensor]) -> Tensor:
        with autocast(self.precision, self.device):
            value = loss()
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()


@dataclass(kw_only=True)
class PlainStep(TrainingStep):
    """On batches of any shape."""

    loss: Callable[[int], Tensor]
    """Of the model in a step, counted from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, eps=_EPSILON, weight_decay=0.0, fused=True
        )

    def _do(self, step: int) -> Tensor:
        rate, beta1 = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = rate, (beta1, _BETA2)
        return self._update(lambda: self.loss(step))


@dataclass(kw_only=True)
class CapturedStep(TrainingStep):
    """On batches of one shape, of data on the device: on a GPU one CUDA graph from examples to
    optimizer, the same operations one by one elsewhere.
    """

    loss: Callable[[Tensor], Tensor]
    """Of examples by their `[B]` numbers on the device."""
    indices: Callable[[int], np.ndarray]
    """Numbers of the examples of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flat = FlatAdamW(self.model.parameters(), beta2=_BETA2, eps=_EPSILON)
        self.optimizer = self._flat
        steps = range(self.schedule.steps)
        self._batches = put_rows(list(map(self.indices, steps)), self.device)
        self._rates = put_rows(list(map(self.schedule.at, steps)), self.device)
        self._chosen = torch.zeros_like(self._batches[0])
        self._replay = Replay(self._work, self.device, self._undone)

    def _do(self, step: int) -> Tensor:
        self._chosen.copy_(self._batches[step])
        self._flat.rates.copy_(self._rates[step])
        return self._replay()

    def _work(self) -> Tensor:
        return self._update(lambda: self.loss(self._chosen))

    @contextmanager
    def _undone(self) -> Iterator[None]:
        tensors, scale = self._flat.tensors, self.scaler.state_dict()
        kept = [tensor.detach().clone() for tensor in tensors]
        with draws_undone():
            yield
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        self.scaler.load_state_dict(scale)


def put_rows(rows: Sequence[np.ndarray | tuple[float, ...]], device: torch.device) -> Tensor:
    """A table of numbers on a device, without a wait for what it is doing."""
    table = torch.from_numpy(np.array(rows))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@contextmanager
def draws_undone() -> Iterator[None]:
    """Put PyTorch's generators back to where the last seed had put them."""
    seed = torch.initial_seed()
    yield
    torch.manual_seed(seed)


@dataclass
class Replay:
    """Work on a device that is recorded once and then started by one call, as a CUDA graph.

    The work reads and writes tensors that stay where they are, of fixed shapes. Random numbers
    follow from the seed that PyTorch's generator has at each call, as they would without a record:
    before a replay PyTorch hands the generator's seed and offset to the graph.
    """

    work: Callable[[], Tensor]
    """Its result is overwritten by the next call."""
    device: torch.device
    undone: Callable[[], AbstractContextManager[None]] = draws_undone
    """Takes back what the work changes and draws."""
    _graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    _result: Tensor | None = field(default=None, init=False)

    def __call__(self) -> Tensor:
        """Do the work once."""
        if self.device.type != "cuda":
            return self.work()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return cast(Tensor, self._result)

    def _record(self) -> torch.cuda.CUDAGraph:
        with self.undone():
            # not on the default stream, which capture does not allow either
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self.work()
            torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self.work()
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
        counts = torch.zeros(len(self._sizes), device=first.device)
        means, squares = (first.new_zeros(sum(self._sizes), requires_grad=False) for _ in range(2))
        self._flat = (counts, means, squares)
        self.rates = torch.zeros(2, dtype=torch.float64, device=first.device)
        """Learning rate and beta1 of the next step, float64; to be written in place."""
        self._share()

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self._parameters, *self._flat]

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _share(self) -> None:
        counts, means, squares = self._flat
        values = (counts.unbind(), self._views(means), self._views(squares))
        for parameter, *parts in zip(self._parameters, *values, strict=True):
            self.state[parameter] = dict(zip(_STATE, parts, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        self._parameters = group["params"]
        for name, flat in zip(_STATE, self._flat, strict=True):
            flat.copy_(torch.cat([self.state[p][name].flatten() for p in self._parameters]))
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters from their gradients."""
        (group,) = self.param_groups
        (_, beta2), eps = group["betas"], group["eps"]
        rate, beta1 = self.rates.unbind()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        overflow: Tensor | None = getattr(self, "found_inf", None)

        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)
        gradient = torch.cat([g.flatten() for g in gradients])
        if scale is not None:
            gradient = gradient / scale
        counts, means, squares = self._flat
        counts = counts + 1
        count = counts[0].double()
        means = means + (gradient - means) * (1 - beta1)
        squares = squares * beta2 + gradient.square() * (1 - beta2)
        size = rate / (1 - beta1**count)
        root = (1 - beta2**count).sqrt()
        change = -size * means / (squares.sqrt() / root + eps)
        after = [counts, means, squares]
        if overflow is not None:
            fine = overflow.squeeze() == 0
            change = change.masked_fill(~fine, 0.0)
            after = [new.where(fine, old) for new, old in zip(after, self._flat, strict=True)]
        changes = self._views(change)
        torch._foreach_add_(self._parameters, changes)  # pyright: ignore[reportPrivateImportUsage]
        for flat, new in zip(self._flat, after, strict=True):
            flat.copy_(new)
