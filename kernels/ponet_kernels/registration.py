"""Making operators of PyTorch out of functions on plain tensors.

`torch.library.custom_op` does the same with more checks, which cost 30 us per call and direction:
as much as the rest of an operator's host code. Nor does a call go through PyTorch's dispatcher,
20 us more, unless somebody must see operators there: a compiler, an exporter, a dispatch mode.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_library = torch.library.Library("ponet", "FRAGMENT")


def is_watched() -> bool:
    """Whether somebody looks at operators: a compiler, an exporter, a mode or a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def register(
    name: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `torch.ops.ponet.<name>`.

    Args:
        compute: annotated function of tensors and plain values; changes none of its arguments. It
            runs without autograd and autocast.
        shapes: as `compute`, for tensors without numbers.
        save: `save(ctx, inputs, outputs)` keeps what the backward pass needs.
        differentiate: `differentiate(ctx, gradient)`, a gradient or None per input.

    Returns:
        A function that calls the operator and returns what it does; of an operator with a backward
        pass the first output alone, for the others serve that pass.
    """
    _library.define(name + torch.library.infer_schema(compute, mutates_args=()))
    compute_alone = alone(compute)
    _library.impl(name, compute_alone, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ponet::{name}", shapes, lib=_library)
    operator = getattr(torch.ops.ponet, name).default
    if save is None or differentiate is None:
        return lambda *inputs: (operator if is_watched() else compute_alone)(*inputs)

    seen = _function(name, alone(operator), save, differentiate, keep_outputs=True)
    _library.impl(name, seen.apply, "Autograd")
    apply = differentiable(name, compute_alone, save, differentiate)
    return lambda *inputs: _first(operator(*inputs)) if is_watched() else apply(*inputs)


def differentiable(
    name: str,
    compute: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """A function of autograd where nobody watches; arguments and result as for `register`."""
    function = _function(name, compute, save, differentiate, keep_outputs=False)
    # without what `apply` in Python does for transforms of functorch, which count as watched
    return cast(Any, super(torch.autograd.Function, function)).apply


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without autograd and autocast."""

    def run(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            return function(*inputs)

    return run


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _function(
    name: str,
    compute: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    keep_outputs: bool,
) -> type[torch.autograd.Function]:
    class Differentiable(torch.autograd.Function):
        """An operator with its backward pass."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            """Compute, and keep what the backward pass needs."""
            outputs = compute(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs if keep_outputs else _first(outputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
            """Differentiate, once; a call whose result nothing depends on has no gradient."""
            if torch.is_grad_enabled():
                raise NotImplementedError(f"ponet::{name}: no gradients of gradients")
            if gradient is None:
                return (None,) * len(ctx.needs_input_grad)
            return differentiate(ctx, gradient)

    return Differentiable
