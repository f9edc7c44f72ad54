"""Making operators of PyTorch out of functions on plain tensors.

`torch.library.custom_op` does the same with more checks, which cost 30 us per call and direction:
as much as the rest of an operator's host code.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("ponet", "FRAGMENT")


def register(
    name: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `torch.ops.ponet.<name>`.

    Args:
        name: of the operator.
        compute: annotated function of tensors and plain values; changes none of its arguments.
        shapes: as `compute`, for tensors without numbers.
        save: `save(ctx, inputs, outputs)` keeps what the backward pass needs.
        differentiate: `differentiate(ctx, *gradients)`, a gradient or None per input.

    Returns:
        The operator.
    """
    _library.define(name + torch.library.infer_schema(compute, mutates_args=()))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ponet::{name}", shapes, lib=_library)
    operator = getattr(torch.ops.ponet, name).default
    if save is not None and differentiate is not None:
        _library.impl(name, _differentiable(operator, save, differentiate).apply, "Autograd")
    return operator


def _differentiable(
    operator: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Differentiable(torch.autograd.Function):
        """The operator with its backward pass."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            """Compute, below autograd."""
            with torch._C._AutoDispatchBelowAutograd():
                outputs = operator(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            """Differentiate; a call whose result nothing depends on has no gradient."""
            if gradients[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            return differentiate(ctx, *gradients)

    return Differentiable
