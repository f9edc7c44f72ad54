"""Sums and products over the tokens of each sequence; see `ponet_kernels.global_aggregation`.

Neighbouring sequences of one length are one batched product, so a fixed-length batch is a single
one and a ragged batch costs a product a length.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype


def _groups(cu_seqlens: Tensor) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Neighbouring sequences of one length: their sequences, their tokens, (count, length)."""
    bounds = cu_seqlens.tolist()
    first = 0
    for b in range(1, len(bounds)):
        length = bounds[first + 1] - bounds[first]
        if b == len(bounds) - 1 or bounds[b + 1] - bounds[b] != length:
            if length:
                yield slice(first, b), slice(bounds[first], bounds[b]), (b - first, length)
            first = b


def sequence_means(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_means`."""
    del max_seqlen
    shape = (len(cu_seqlens) - 1, x.shape[1])
    means = x.new_zeros(shape, dtype=accumulation_dtype(x.dtype))
    for sequences, tokens, group in _groups(cu_seqlens):
        torch.mean(x[tokens].unflatten(0, group), 1, dtype=means.dtype, out=means[sequences])
    return means


def token_scores(x: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.token_scores`."""
    del max_seqlen
    scores = rows.new_empty(len(x), rows.shape[1])
    for sequences, tokens, group in _groups(cu_seqlens):
        h = x[tokens].to(rows.dtype).unflatten(0, group)
        torch.bmm(h, rows[sequences].mT, out=scores[tokens].unflatten(0, group))
    return scores


def sequence_softmax(scores: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_softmax`."""
    del max_seqlen
    weights = torch.empty_like(scores)
    for _, tokens, group in _groups(cu_seqlens):
        weights[tokens] = scores[tokens].unflatten(0, group).softmax(dim=1).flatten(0, 1)
    return weights


def sequence_sums(weights: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_sums`."""
    del max_seqlen
    sums = weights.new_zeros(len(cu_seqlens) - 1, weights.shape[1], x.shape[1])
    for sequences, tokens, group in _groups(cu_seqlens):
        h = x[tokens].to(weights.dtype).unflatten(0, group)
        torch.bmm(weights[tokens].unflatten(0, group).mT, h, out=sums[sequences])
    return sums


def spread_rows(
    weights: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int, dtype: torch.dtype
) -> Tensor:
    """As `Backend.spread_rows`."""
    del max_seqlen
    out = rows.new_empty(len(weights), rows.shape[2], dtype=dtype)
    for sequences, tokens, group in _groups(cu_seqlens):
        place, factors = out[tokens].unflatten(0, group), weights[tokens].unflatten(0, group)
        if dtype == rows.dtype:
            torch.bmm(factors, rows[sequences], out=place)
        else:
            place.copy_(factors @ rows[sequences])
    return out
