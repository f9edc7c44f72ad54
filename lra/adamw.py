"""AdamW without weight decay whose learning rate and beta1 are tensors, for captured steps.

PyTorch's fused AdamW takes the rate as a tensor but beta1 as a number, which a captured step would
keep for good; its other forms read a beta1 on the device back. Here all parameters are updated as
one vector, by the formulas of `torch.optim.AdamW`:

    m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2,
    p <- p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FlatAdamW(torch.optim.AdamW):
    """Its state has the form of that of `torch.optim.AdamW(..., fused=True)`, and either continues
    the other. A parameter without gradient counts as one whose gradient is zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, beta2: float, eps: float) -> None:
        """Make the state.

        Args:
            parameters: of one dtype, on one device.
            beta2: of the second moments.
            eps: added to their root.
        """
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
        self._schedule = torch.zeros(2, dtype=torch.float64, device=first.device)
        self._share()

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self._parameters, self._means, self._squares, self._counts]

    def set_schedule(self, schedule: Tensor) -> None:
        """Take `[2]` float64 on the device, learning rate and beta1 of the steps from now on."""
        self._schedule = schedule

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _share(self) -> None:
        names = ("step", "exp_avg", "exp_avg_sq")
        values = (self._counts.unbind(), self._views(self._means), self._views(self._squares))
        for parameter, *parts in zip(self._parameters, *values, strict=True):
            self.state[parameter] = dict(zip(names, parts, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        self._parameters = group["params"]
        states = [self.state[parameter] for parameter in self._parameters]
        for flat, name in (
            (self._means, "exp_avg"),
            (self._squares, "exp_avg_sq"),
            (self._counts, "step"),
        ):
            flat.copy_(torch.cat([state[name].flatten() for state in states]))
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters from their gradients."""
        (group,) = self.param_groups
        (_, beta2), eps = group["betas"], group["eps"]
        rate, beta1 = self._schedule.unbind()
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
