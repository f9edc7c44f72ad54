"""Segment max-pooling as scatter reductions along the tokens; see `ponet_kernels.segment_max`."""

import torch
from torch import Tensor

from ponet_kernels.vectorised.chunks import chunks

# losers rank behind every token; float32 holds sums up to 2**24 exactly
_LOSER = 2.0**23


def segment_max_fwd(
    x: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    argmax_dtype: torch.dtype | None,
    has_empty: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `Backend.segment_max_fwd`; exact for segments of up to 2**23 tokens."""
    del has_empty
    # reducing along dim 0 with an index expanded over channels is the layout that PyTorch's
    # CPU scatter does row by row, some 30 times faster than along dim 1
    maxima = x.new_full((len(cu_segments) - 1, x.shape[1]), float("-inf"))
    # rows must be contiguous for it
    for part in chunks(x) if not x.is_contiguous() else (slice(None),):
        rows = x[part].contiguous()
        index = token_segments[part].unsqueeze(1).expand_as(rows)
        maxima.scatter_reduce_(0, index, rows, "amax")
    if argmax_dtype is None:
        return maxima, None
    starts = cu_segments.long().index_select(0, token_segments)
    places = (torch.arange(len(x), device=x.device) - starts).float().unsqueeze(1)
    first = torch.full_like(maxima, float("inf"), dtype=torch.float32)
    for part in chunks(x):
        segments = token_segments[part]
        values = maxima.index_select(0, segments)
        ranks = torch.empty_like(values, dtype=torch.float32)
        torch.ne(x[part], values, out=ranks)
        ranks.mul_(_LOSER).add_(places[part])
        first.scatter_reduce_(0, segments.unsqueeze(1).expand_as(ranks), ranks, "amin")
    # no token equals a maximum that is NaN, and an empty segment has no token: argmax 0 for both
    return maxima, torch.where(first < _LOSER, first, 0.0).to(argmax_dtype)


def segment_max_bwd(
    grad: Tensor,
    argmax: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    out: Tensor,
) -> None:
    """As `Backend.segment_max_bwd`."""
    out.zero_()
    if not len(out):
        return
    # an empty segment has no token of its own; its zero is added to some token
    alive = (cu_segments.diff() > 0).unsqueeze(1)
    tokens = argmax.long() + cu_segments[:-1].unsqueeze(1)
    tokens = torch.where(alive, tokens, 0)
    out.scatter_add_(0, tokens, torch.where(alive, grad, 0.0).to(out.dtype))
