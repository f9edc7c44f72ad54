"""Sums and products over the tokens of each sequence; see `ponet_kernels.global_aggregation`.

Neighbouring sequences of one length are one batched product, so a fixed-length batch is a single
one and a ragged batch costs a product a length.
"""

from collections.abc import Iterator, Sequence

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


def sequence_totals(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, mean: bool = False) -> Tensor:
    """As `Backend.sequence_totals`."""
    del max_seqlen
    totals = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], dtype=accumulation_dtype(x.dtype))
    reduce = torch.mean if mean else torch.sum
    for sequences, tokens, group in _groups(cu_seqlens):
        reduce(x[tokens].unflatten(0, group), 1, dtype=totals.dtype, out=totals[sequences])
    return totals


def token_scores(
    x: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """As `Backend.token_scores`."""
    del max_seqlen
    scores = rows.new_empty(len(x), rows.shape[1])
    for sequences, tokens, group in _groups(cu_seqlens):
        h = x[tokens].to(rows.dtype).unflatten(0, group)
        out = scores[tokens].unflatten(0, group)
        torch.bmm(h, rows[sequences].mT, out=out)
        if centre is not None:
            out.sub_(centre[sequences].unsqueeze(1))
    return scores if weights is None else scores.mul_(weights)


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
    pairs: Sequence[tuple[Tensor, Tensor]],
    shared: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
) -> None:
    """As `Backend.spread_rows`."""
    del max_seqlen
    lengths = cu_seqlens.diff().clamp(min=1).unsqueeze(1)
    # the shared row is one more of weight 1, so that everything is one product
    ones = shared.new_ones(len(out), 1)
    weights = torch.cat([*(pair[0] for pair in pairs), ones], dim=1)
    rows = torch.cat([*(pair[1] for pair in pairs), (shared / lengths).unsqueeze(1)], dim=1)
    for sequences, tokens, group in _groups(cu_seqlens):
        place, factors = out[tokens].unflatten(0, group), weights[tokens].unflatten(0, group)
        if out.dtype == rows.dtype:
            torch.bmm(factors, rows[sequences], out=place)
        else:
            place.copy_(factors @ rows[sequences])
