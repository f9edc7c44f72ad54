"""Segment max-pooling (SMP), PoNet section 3: S_j = max over the tokens of segment j, per channel.

Input `[T, C]`, output `[S, C]`. Equal maxima: the gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import place_dtype
from ponet_kernels.reference import segment_max_ref


@torch.library.custom_op("ponet::segment_max", mutates_args=())
def _segment_max(
    x: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    longest: int,
    with_places: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = place_dtype(longest) if with_places else None
    maxima, places = backend_named(backend).segment_max_fwd(x, cu_segments, token_segments, dtype)
    return maxima, x.new_empty(0, dtype=torch.uint8) if places is None else places


@_segment_max.register_fake
def _(
    x: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    longest: int,
    with_places: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (cu_segments.shape[0] - 1, x.shape[1])
    places = x.new_empty(shape, dtype=place_dtype(longest)) if with_places else None
    return x.new_empty(shape), x.new_empty(0, dtype=torch.uint8) if places is None else places


@torch.library.custom_op("ponet::segment_max_backward", mutates_args=())
def _segment_max_backward(
    grad: Tensor,
    places: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    backend: str,
) -> Tensor:
    return backend_named(backend).segment_max_bwd(
        grad, places, cu_segments, token_segments, grad.dtype
    )


@_segment_max_backward.register_fake
def _(
    grad: Tensor,
    places: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    backend: str,
) -> Tensor:
    return grad.new_empty(token_segments.shape[0], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cu_segments, token_segments, _, _, ctx.backend = inputs
    ctx.save_for_backward(output[1], cu_segments, token_segments)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grad_x = torch.ops.ponet.segment_max_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, None, None, None, None, None


_segment_max.register_autograd(_differentiate, setup_context=_save)


def segment_max(
    x: Tensor, cu_segments: Tensor, token_segments: Tensor, longest: int | None = None
) -> Tensor:
    """Element-wise maximum over the tokens of each segment.

    Args:
        x: `[T, C]`, floating.
        cu_segments: `[S + 1]`, int32, offsets of the segments into the tokens, ascending.
        token_segments: `[T]`, int64, the segment of each token (the same partition as
            `cu_segments`, given too because both directions are computed once a batch).
        longest: no segment has more tokens; the smaller, the less is kept for the backward pass.
            None: T.

    Returns:
        `[S, C]`, dtype of `x`; -inf where a segment is empty.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim != 2 or token_segments.shape != x.shape[:1]:
        raise ValueError(
            f"segment_max: expected x [T, C] and token_segments [T], found {tuple(x.shape)} and "
            f"{tuple(token_segments.shape)}"
        )
    backend = active_backend(x.device)
    if backend == "reference":
        return segment_max_ref(x, cu_segments, token_segments)
    longest = x.shape[0] if longest is None else longest
    with_places = x.requires_grad and torch.is_grad_enabled()
    return torch.ops.ponet.segment_max(
        x, cu_segments, token_segments, longest, with_places, backend
    )[0]
