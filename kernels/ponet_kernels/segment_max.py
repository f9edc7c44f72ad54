"""Segment max-pooling (SMP), PoNet section 3: S_j = max over the tokens of segment j, per channel.

Input `[T, C]`, output `[S, C]`. Equal maxima: the gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend
from ponet_kernels.reference import segment_max_ref


def _first_winners(winners: Tensor, cu_segments: Tensor, token_segments: Tensor) -> Tensor:
    """Keep the first true token of each segment and channel of `winners` `[T, C]`."""
    num_tokens, num_channels = winners.shape
    starts = cu_segments.long().index_select(0, token_segments)
    # float32 because only floating types take the fast scatter path on CPU; exact below 2**24
    places = (torch.arange(num_tokens, device=winners.device) - starts).float().unsqueeze(1)
    ranked = torch.where(winners, places, float("inf"))
    first = ranked.new_full((len(cu_segments) - 1, num_channels), float("inf"))
    index = token_segments.unsqueeze(1).expand_as(ranked)
    first.scatter_reduce_(0, index, ranked, "amin")
    return winners & (places == first.index_select(0, token_segments))


class SegmentMaxFunction(torch.autograd.Function):
    """Scatter along tokens forward; compare with the maximum backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_segments: Tensor, token_segments: Tensor) -> Tensor:
        # reducing along dim 0 with an index expanded over channels is the layout that PyTorch's
        # CPU scatter does row by row, 28 times faster than along dim 1
        out = x.new_full((len(cu_segments) - 1, x.shape[1]), float("-inf"))
        out.scatter_reduce_(0, token_segments.unsqueeze(1).expand_as(x), x, "amax")
        ctx.save_for_backward(x, out, cu_segments, token_segments)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, out, cu_segments, token_segments = ctx.saved_tensors
        winners = x == out.index_select(0, token_segments)
        non_empty = (cu_segments[1:] > cu_segments[:-1]).sum()
        # ties are rare (none in fp32 text batches, under 1 % of the maxima in bf16)
        if winners.sum() > non_empty * x.shape[1]:
            winners = _first_winners(winners, cu_segments, token_segments)
        return grad.index_select(0, token_segments).mul_(winners), None, None


def segment_max(x: Tensor, cu_segments: Tensor, token_segments: Tensor) -> Tensor:
    """Element-wise maximum over the tokens of each segment.

    Args:
        x: `[T, C]`, floating.
        cu_segments: `[S + 1]`, int32, offsets of the segments into the tokens, ascending.
        token_segments: `[T]`, int64, the segment of each token (the same partition as
            `cu_segments`, given too because both directions are computed once a batch).

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
    if active_backend() == "reference":
        return segment_max_ref(x, cu_segments, token_segments)
    return SegmentMaxFunction.apply(x, cu_segments, token_segments)
