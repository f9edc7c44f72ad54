"""Every operator as its formula says it, one segment or sequence at a time: the ground truth.

The functions compute what the operators of the same name do and leave differentiation to
PyTorch. `torch.max(dim=0)` returns the first of equal maxima, which is the tie rule of all max
operators here: the gradient goes to the first maximal token.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.layout import SEES_LEFT, SPECIAL, PackedLayout


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def _max_over_tokens(x: Tensor) -> Tensor:
    return x.max(dim=0).values if len(x) else x.new_full(x.shape[1:], float("-inf"))


def segment_max_ref(x: Tensor, cu_segments: Tensor) -> Tensor:
    """S_j = element-wise max of x over the tokens of segment j; -inf for an empty segment."""
    rows = [_max_over_tokens(x[start:end]) for start, end in _spans(cu_segments)]
    return torch.stack(rows) if rows else x.new_empty(0, x.shape[1])


def local_pooling_ref(
    x: Tensor, token_marks: Tensor, window: int = 3, average: bool = False
) -> Tensor:
    """L_t = max or mean of x over the `window` tokens around t that lie in its run; 0 if special.

    Windows have stride 1; the mean is over the tokens that are there.
    """
    starts = ((token_marks & SEES_LEFT) == 0).nonzero().squeeze(1)
    cu_runs, reach = torch.cat([starts, starts.new_tensor([len(x)])]), window // 2
    windows = [
        x[max(start, t - reach) : min(end, t + reach + 1)]
        for start, end in _spans(cu_runs)
        for t in range(start, end)
    ]
    rows = [tokens.mean(dim=0) if average else _max_over_tokens(tokens) for tokens in windows]
    local = torch.stack(rows) if rows else x.new_empty(0, x.shape[1])
    return local.index_fill(0, ((token_marks & SPECIAL) != 0).nonzero().squeeze(1), 0.0)


def global_mean_ref(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of x over the tokens of each sequence; zero for an empty sequence."""
    rows = [x[s:e].mean(dim=0) if e > s else x.new_zeros(x.shape[1]) for s, e in _spans(cu_seqlens)]
    return torch.stack(rows) if rows else x.new_empty(0, x.shape[1])


def global_aggregation_ref(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
) -> Tensor:
    """Five-projection form: queries and keys of every token, then mean query over the keys.

    g = mean_t q_t; per head p = softmax_t(g . k_t / sqrt(D)); g' = sum_t p_t k_t. The value is the
    key. An empty sequence has g' = key_bias, the projection of a zero vector.
    """
    queries = F.linear(x, query_weight, query_bias)
    keys = F.linear(x, key_weight, key_bias)
    rows = []
    for start, end in _spans(cu_seqlens):
        if start == end:
            rows.append(key_bias)
            continue
        g = queries[start:end].mean(dim=0).view(num_heads, 1, -1)
        k = keys[start:end].view(end - start, num_heads, -1).transpose(0, 1)
        logits = (g * k).sum(dim=-1) / k.shape[-1] ** 0.5
        rows.append((logits.softmax(dim=-1).unsqueeze(-1) * k).sum(dim=1).flatten())
    return torch.stack(rows) if rows else x.new_empty(0, len(key_bias))


def pooling_fusion_ref(
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
) -> Tensor:
    """out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t, terms that are None left out."""
    rows = []
    for t, segment in enumerate(token_segments.tolist()):
        row = torch.zeros_like(output[t])
        if global_vectors is not None:
            row = row + global_vectors[int(segment_sequences[segment])]
        if segment_vectors is not None:
            row = row + segment_vectors[segment]
        row = row * output[t]
        rows.append(row if local is None else row + local[t])
    return torch.stack(rows) if rows else torch.empty_like(output)


def fused_pooling_ref(
    global_vectors: Tensor | None,
    output: Tensor,
    segment_values: Tensor | None,
    local_values: Tensor | None,
    layout: PackedLayout,
) -> Tensor:
    """Both max-poolings and the fusion, with S and L zero at special tokens."""
    maxima, local = None, None
    if segment_values is not None:
        special = layout.special.nonzero().squeeze(1)
        maxima = segment_max_ref(segment_values, layout.cu_segments)
        maxima = maxima.index_fill(0, layout.token_segments[special], 0.0)
    if local_values is not None:
        local = local_pooling_ref(local_values, layout.token_marks)
    return pooling_fusion_ref(
        global_vectors, maxima, output, local, layout.token_segments, layout.segment_sequences
    )
