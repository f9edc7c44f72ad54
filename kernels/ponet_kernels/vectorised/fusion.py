"""Pooling fusion in cache-sized pieces; see `ponet_kernels.fused_pooling`.

Local windows are maxima of shifted rows. A token that does not see its left or right neighbour is
put right after the plain shift: there are few of them, two a run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL
from ponet_kernels.vectorised.chunks import chunks


class _Edges(NamedTuple):
    """Tokens that lack a neighbour, places in the stream: `[X]` int64."""

    no_left: Tensor
    no_right: Tensor
    special: Tensor

    @classmethod
    def of(cls, token_marks: Tensor) -> "_Edges":
        no_left, no_right = (token_marks & SEES_LEFT) == 0, (token_marks & SEES_RIGHT) == 0
        masks = (no_left, no_right, (token_marks & SPECIAL) != 0)
        return cls(*(mask.nonzero().squeeze(1) for mask in masks))


def _left_maxima(x: Tensor, edges: _Edges) -> Tensor:
    """Maximum of each token and the one before, where it sees it."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[:1] = x[:1]
    torch.maximum(x[:-1], x[1:], out=out[1:])
    out[edges.no_left] = x[edges.no_left]
    return out


def _window_maxima(x: Tensor, edges: _Edges) -> Tensor:
    """`[T, C]`: maximum over each token and the neighbours that it sees; zero at special ones."""
    out = _left_maxima(x, edges)
    apart = out[edges.no_right]
    torch.maximum(out[:-1], x[1:], out=out[:-1])
    out[edges.no_right] = apart
    return out.index_fill_(0, edges.special, 0.0)


def _window_gradients(grad: Tensor, x: Tensor, edges: _Edges) -> Tensor:
    """`[T, C]`: the gradient of each window goes to its first maximal token."""
    # comparisons are written as 1.0 and 0.0, because products with bool tensors are converted
    # first and cost ten times as much on CPU
    right = _left_maxima(x, edges)
    torch.gt(x[1:], right[:-1], out=right[:-1])
    right[-1:] = 0
    right[edges.no_right] = 0
    to_right = right.mul_(grad)
    rest = grad - to_right
    centre = torch.empty_like(rest)
    torch.gt(x[1:], x[:-1], out=centre[1:])
    centre[:1] = 1
    centre[edges.no_left] = 1
    total = centre.mul_(rest)
    to_left = rest.sub_(total)
    total[1:].add_(to_right[:-1])
    total[:-1].add_(to_left[1:])
    # a special token is a run of its own, so only its own window, which is zero, reaches it
    return total.index_fill_(0, edges.special, 0.0)


def _part_gradients(grad: Tensor, x: Tensor, token_marks: Tensor, part: slice) -> Tensor:
    """`_window_gradients` of the tokens `part` of a stream, as a view.

    A token gets the gradients of three windows, which reach two tokens to each side of it.
    """
    wide = slice(max(part.start - 2, 0), min(part.stop + 2, len(x)))
    gradients = _window_gradients(grad[wide], x[wide], _Edges.of(token_marks[wide]))
    return gradients[part.start - wide.start : part.stop - wide.start]


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
    tables = (token_segments, segment_sequences, token_marks)
    factors = _factors(global_vectors, maxima, output, *tables)
    if local is None:
        out = torch.zeros_like(output, memory_format=torch.contiguous_format)
    else:
        out = _window_maxima(local, _Edges.of(token_marks))
    if factors is not None:
        for part in chunks(output):
            out[part].addcmul_(factors.index_select(0, token_segments[part]), output[part])
    return out


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
    tables = (token_segments, segment_sequences, token_marks)
    factors = _factors(global_vectors, maxima, output, *tables)
    acc = accumulation_dtype(output.dtype)
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
            grad_local[part] = _part_gradients(grad, local, token_marks, part)
    grad_global = None
    if global_vectors is not None:
        grad_global = sums.new_zeros(global_vectors.shape).index_add_(0, segment_sequences, sums)
    if maxima is None:
        return grad_global, None
    special = _special_segments(token_segments, token_marks)
    return grad_global, sums.index_fill_(0, special, 0.0)
