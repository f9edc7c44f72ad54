"""Global aggregation (GA), PoNet section 3, without projecting queries and keys of every token.

The published form: q_t = Wq x_t + bq, k_t = Wk x_t + bk, g = mean_t q_t, per head
p = softmax_t(g . k_t / sqrt(D)), g' = sum_t p_t k_t. Both projections are linear, so

    g    = Wq mean_t(x_t) + bq
    u_h  = Wk_h^T g_h / sqrt(D)            the key bias shifts all logits alike: softmax removes it
    p_h  = softmax_t(u_h . x_t)
    g'_h = Wk_h (sum_t p_ht x_t) + bk_h    because the p_ht sum to one

which is the same function of the same parameters with two of five projections of every token
removed, forward and backward. Input x `[T, C]`, output `[B, E]`, E the width of the projections.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend
from ponet_kernels.reference import global_aggregation_ref, global_mean_ref


def _groups(cu_seqlens: Tensor) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Neighbouring sequences of one length: their sequences, their tokens, (count, length)."""
    bounds = cu_seqlens.tolist()
    first = 0
    for b in range(1, len(bounds)):
        length = bounds[first + 1] - bounds[first]
        if b == len(bounds) - 1 or bounds[b + 1] - bounds[b] != length:
            yield slice(first, b), slice(bounds[first], bounds[b]), (b - first, length)
            first = b


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


class GlobalMeanFunction(torch.autograd.Function):
    """Mean over the tokens of each sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.dtype = x.dtype
        mean = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], dtype=_accumulation_dtype(x))
        for sequences, tokens, shape in _groups(cu_seqlens):
            if shape[1]:
                torch.mean(x[tokens].unflatten(0, shape), 1, dtype=mean.dtype, out=mean[sequences])
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        lengths = cu_seqlens.diff()
        share = (grad / lengths.clamp(min=1).unsqueeze(1)).to(ctx.dtype)
        return share.repeat_interleave(lengths, dim=0), None


class AggregateFunction(torch.autograd.Function):
    """Attention of H queries a sequence over its hidden states: sum_t softmax_t(u_h . x_t) x_t."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, queries: Tensor, cu_seqlens: Tensor) -> Tensor:
        pooled = torch.zeros_like(queries)
        weights = queries.new_empty(len(x), queries.shape[1])
        with _without_autocast(x):
            for sequences, tokens, shape in _groups(cu_seqlens):
                if not shape[1]:
                    continue
                h = x[tokens].unflatten(0, shape).to(queries.dtype)
                p = (h @ queries[sequences].mT).softmax(dim=1)
                weights[tokens] = p.flatten(0, 1)
                pooled[sequences] = p.mT @ h
        ctx.save_for_backward(x, queries, weights, cu_seqlens)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, queries, weights, cu_seqlens = ctx.saved_tensors
        grad_x, grad_queries = torch.empty_like(x), torch.zeros_like(queries)
        with _without_autocast(x):
            for sequences, tokens, shape in _groups(cu_seqlens):
                if not shape[1]:
                    continue
                h = x[tokens].unflatten(0, shape).to(queries.dtype)
                p = weights[tokens].unflatten(0, shape)
                grad_p = h @ grad[sequences].mT
                grad_logits = p * (grad_p - (p * grad_p).sum(dim=1, keepdim=True))
                grad_queries[sequences] = grad_logits.mT @ h
                factors = torch.cat([grad_logits, p], dim=2)
                rows = torch.cat([queries[sequences], grad[sequences]], dim=1)
                grad_x[tokens] = (factors @ rows).flatten(0, 1)
        return grad_x, grad_queries, None


def global_mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over the tokens of each sequence.

    Args:
        x: `[T, C]`, floating.
        cu_seqlens: `[B + 1]`, int32, offsets of the sequences into the tokens.

    Returns:
        `[B, C]`, float32 for half-precision `x` and the dtype of `x` otherwise; zero for an empty
        sequence.
    """
    if active_backend() == "reference":
        return global_mean_ref(x, cu_seqlens)
    return GlobalMeanFunction.apply(x, cu_seqlens)


def global_aggregation(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
) -> Tensor:
    """g' of each sequence: its mean query attends over its keys, which are also the values.

    Args:
        x: `[T, C]`, floating, hidden states.
        query_weight, key_weight: `[E, C]`.
        query_bias, key_bias: `[E]`.
        num_heads: H, a divisor of E.
        cu_seqlens: `[B + 1]`, int32, offsets of the sequences into the tokens.

    Returns:
        `[B, E]`, float32 for half-precision parameters and their dtype otherwise; the key bias for
        an empty sequence.

    Raises:
        ValueError: E is not a multiple of `num_heads`.
    """
    width = len(query_bias)
    if width % num_heads:
        raise ValueError(
            f"global_aggregation: width {width} is not a multiple of {num_heads} heads"
        )
    parameters = (query_weight, query_bias, key_weight, key_bias)
    if active_backend() == "reference":
        return global_aggregation_ref(x, *parameters, num_heads, cu_seqlens)
    dtype = _accumulation_dtype(query_weight)
    with _without_autocast(x):
        wq, bq, wk, bk = (p.to(dtype) for p in parameters)
        g = F.linear(global_mean(x, cu_seqlens).to(dtype), wq, bq)
        wk = wk.unflatten(0, (num_heads, -1))
        scale = (width // num_heads) ** -0.5
        queries = torch.einsum("bhe,hec->bhc", g.unflatten(1, (num_heads, -1)) * scale, wk)
        pooled = AggregateFunction.apply(x, queries, cu_seqlens)
        return torch.einsum("bhc,hec->bhe", pooled, wk).flatten(1) + bk
