"""Segment max-pooling (SMP), PoNet section 3: S_j = max over the tokens of segment j, per channel.

Input `[T, C]`, output `[S, C]`. Equal maxima: the gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import argmax_dtype
from ponet_kernels.layout import PackedLayout
from ponet_kernels.reference import segment_max_ref
from ponet_kernels.registration import register


def _compute(
    x: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    longest: int,
    has_empty: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = argmax_dtype(longest) if with_argmax else None
    maxima, argmax = backend_named(backend).segment_max_fwd(
        x, cu_segments, token_segments, dtype, has_empty
    )
    return maxima, x.new_empty(0, dtype=torch.uint8) if argmax is None else argmax


def _shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, cu_segments, _, longest, _, with_argmax, _ = inputs
    maxima = x.new_empty(cu_segments.shape[0] - 1, x.shape[1])
    if not with_argmax:
        return maxima, x.new_empty(0, dtype=torch.uint8)
    return maxima, torch.empty_like(maxima, dtype=argmax_dtype(longest))


def _compute_backward(
    grad: Tensor, argmax: Tensor, cu_segments: Tensor, token_segments: Tensor, backend: str
) -> Tensor:
    out = _backward_shapes(grad, argmax, cu_segments, token_segments)
    backend_named(backend).segment_max_bwd(grad, argmax, cu_segments, token_segments, out)
    return out


def _backward_shapes(
    grad: Tensor, argmax: Tensor, cu_segments: Tensor, token_segments: Tensor, *_: Any
) -> Tensor:
    return grad.new_empty(token_segments.shape[0], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    _, cu_segments, token_segments, _, _, _, ctx.backend = inputs
    ctx.save_for_backward(outputs[1], cu_segments, token_segments)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.backend), *(None,) * 6


_backward = register("segment_max_backward", _compute_backward, _backward_shapes)
_segment_max = register("segment_max", _compute, _shapes, _save, _differentiate)


def segment_max(x: Tensor, layout: PackedLayout) -> Tensor:
    """Element-wise maximum over the tokens of each segment, `[S, C]`; -inf where one is empty.

    Args:
        x: `[T, C]`, floating.
    """
    if x.ndim != 2 or x.shape[0] != layout.num_tokens:
        raise ValueError(
            f"segment_max: expected x [{layout.num_tokens}, C], found {tuple(x.shape)}"
        )
    backend = active_backend(x.device)
    if backend == "reference":
        return segment_max_ref(x, layout.cu_segments)
    with_argmax = x.requires_grad and torch.is_grad_enabled()
    return _segment_max(
        x,
        layout.cu_segments,
        layout.token_segments,
        layout.max_segment_len,
        layout.has_empty_segments,
        with_argmax,
        backend,
    )
