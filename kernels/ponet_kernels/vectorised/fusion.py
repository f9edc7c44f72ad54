"""Pooling fusion in cache-sized pieces; see `ponet_kernels.fused_pooling`."""

import torch
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.layout import SPECIAL
from ponet_kernels.vectorised.chunks import chunks
from ponet_kernels.vectorised.windows import Edges, part_gradients, window_maxima


def _special_segments(token_segments: Tensor, token_marks: Tensor) -> Tensor:
    return token_segments[(token_marks & SPECIAL) != 0]


def _factors(
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    output: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
) -> Tensor | None:
    """g' + S of each segment, dtype of `output`: `[S, C]`.

    A segment lies in one sequence, so the sum costs a row per segment, not per token.
    """
    factors = maxima
    if factors is not None:
        factors = factors.index_fill(0, _special_segments(token_segments, token_marks), 0.0)
    if global_vectors is not None:
        spread = global_vectors.index_select(0, segment_sequences)
        factors = spread if factors is None else spread.add_(factors)
    return None if factors is None else factors.to(output.dtype)


def _pooled(output: Tensor, local: Tensor | None, token_marks: Tensor) -> Tensor:
    """L of every token, in memory of its own: `[T, C]`."""
    if local is None:
        return torch.zeros_like(output, memory_format=torch.contiguous_format)
    edges = Edges.of(token_marks)
    return window_maxima(local, edges).index_fill_(0, edges.special, 0.0)


def fusion_fwd(
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
) -> Tensor:
    """As `Backend.fusion_fwd`."""
    factors = _factors(
        global_vectors, maxima, output, token_segments, segment_sequences, token_marks
    )
    out = _pooled(output, local, token_marks)
    if factors is not None:
        for part in chunks(output):
            out[part].addcmul_(factors.index_select(0, token_segments[part]), output[part])
    return out


def _local_gradient(grad: Tensor, local: Tensor, part: slice, token_marks: Tensor) -> Tensor:
    gradients = part_gradients(grad, local, token_marks, part)
    # a special token is a run of its own, so only its own window, which is zero, reaches it
    special = ((token_marks[part] & SPECIAL) != 0).nonzero().squeeze(1)
    return gradients.index_fill_(0, special, 0.0)


def fusion_bwd(
    grad: Tensor,
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    grad_output: Tensor,
    grad_local: Tensor | None,
    has_empty: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `Backend.fusion_bwd`."""
    del has_empty
    acc = accumulation_dtype(output.dtype)
    factors = _factors(
        global_vectors, maxima, output, token_segments, segment_sequences, token_marks
    )
    sums = grad.new_zeros(len(cu_segments) - 1, grad.shape[1], dtype=acc)
    for part in chunks(output):
        if factors is None:
            grad_output[part] = 0.0
        else:
            segments = token_segments[part]
            torch.mul(factors.index_select(0, segments), grad[part], out=grad_output[part])
            products = grad[part].to(acc) * output[part]
            sums.scatter_add_(0, segments.unsqueeze(1).expand_as(products), products)
        if grad_local is not None and local is not None:
            grad_local[part] = _local_gradient(grad, local, part, token_marks)
    grad_global = None
    if global_vectors is not None:
        grad_global = sums.new_zeros(global_vectors.shape).index_add_(0, segment_sequences, sums)
    if maxima is None:
        return grad_global, None
    special = _special_segments(token_segments, token_marks)
    return grad_global, sums.index_fill_(0, special, 0.0)
