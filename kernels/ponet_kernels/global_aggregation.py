"""Global aggregation (GA), PoNet section 3, without projecting queries and keys of every token.

The published form: q_t = Wq x_t + bq, k_t = Wk x_t + bk, g = mean_t q_t, per head
p = softmax_t(g . k_t / sqrt(D)), g' = sum_t p_t k_t. Both projections are linear, so

    g    = Wq m + bq,  m = mean_t(x_t)
    u_h  = Wk_h^T g_h / sqrt(D)            the key bias shifts all logits alike: softmax removes it
    p_h  = softmax_t(u_h . x_t)
    z_h  = sum_t p_ht x_t
    g'_h = Wk_h z_h + bk_h                 because the p_ht sum to one

which is the same function of the same parameters with two of five projections of every token
removed, forward and backward. With dg' given, and dz_h = Wk_h^T dg'_h, the backward pass is

    da_ht = p_ht (dz_h . x_t - dz_h . z_h)                  the softmax: sum_t p_ht (dz_h . x_t)
                                                            is dz_h . z_h, so it needs no pass
    du_h  = sum_t da_ht (x_t - m)                           sum_t da_ht = 0, in exact arithmetic
    dg_h  = Wk_h du_h / sqrt(D),  dm = Wq^T dg
    dx_t  = sum_h (da_ht u_h + p_ht dz_h) + dm / n
    dWk_h = g_h du_h^T / sqrt(D) + dg'_h z_h^T,  dbk = dg',  dWq = dg m^T,  dbq = dg

Input x `[T, C]`, output `[B, E]`, E the width of the projections.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.layout import PackedLayout
from ponet_kernels.reference import global_aggregation_ref, global_mean_ref
from ponet_kernels.registration import register


def _compute_mean(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    return backend_named(backend).sequence_totals(x, cu_seqlens, max_seqlen, mean=True)


def _mean_shapes(x: Tensor, cu_seqlens: Tensor, *_: Any) -> Tensor:
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _compute_mean_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    backend_named(backend).spread_rows((), grad, cu_seqlens, max_seqlen, out)
    return out


def _mean_backward_shapes(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    ctx.save_for_backward(x, cu_seqlens)


def _differentiate_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _mean_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend), None, None, None


_mean_backward = register("global_mean_backward", _compute_mean_backward, _mean_backward_shapes)
_global_mean = register("global_mean", _compute_mean, _mean_shapes, _save_mean, _differentiate_mean)


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """As `Tensor.to`, which takes a microsecond to find that there is nothing to do."""
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)


def _heads_first(rows: Tensor, num_heads: int) -> Tensor:
    """`[B, H D]`, contiguous -> `[H, B, D]`, a view by one call instead of two."""
    batch_size, width = rows.shape
    head_width = width // num_heads
    return rows.as_strided((num_heads, batch_size, head_width), (head_width, width, 1))


def aggregate(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g', and for the backward pass m, g, the rows u, the weights p and the sums z."""
    functions, span = backend_named(backend), (cu_seqlens, max_seqlen)
    batch_size, dtype = cu_seqlens.shape[0] - 1, accumulation_dtype(query_weight.dtype)
    wq, bq, wk, bk = _cast(dtype, query_weight, query_bias, key_weight, key_bias)
    wk, bk = wk.view(num_heads, -1, wk.shape[1]), bk.view(num_heads, 1, -1)
    scale = wk.shape[1] ** -0.5
    (means,) = _cast(dtype, functions.sequence_totals(x, *span, mean=True))
    g = F.linear(means, wq, bq)
    rows = means.new_empty((batch_size, num_heads, x.shape[1]))
    out = rows.transpose(0, 1)
    torch.baddbmm(out, _heads_first(g, num_heads), wk, beta=0, alpha=scale, out=out)
    weights = functions.sequence_softmax(functions.token_scores(x, rows, *span), *span)
    sums = functions.sequence_sums(weights, x, *span)
    pooled = torch.empty_like(g)
    out = _heads_first(pooled, num_heads)
    # an empty sequence sums to zero, which leaves the key bias
    torch.baddbmm(bk, sums.transpose(0, 1), wk.transpose(1, 2), out=out)
    return pooled, means, g, rows, weights, sums


def _shapes(*inputs: Any) -> tuple[Tensor, ...]:
    x, query_weight, _, _, _, num_heads, cu_seqlens, _, _ = inputs
    batch_size, num_channels = cu_seqlens.shape[0] - 1, x.shape[1]
    dtype, width = accumulation_dtype(query_weight.dtype), query_weight.shape[0]
    g, means = (batch_size, width), (batch_size, num_channels)
    rows, weights = (batch_size, num_heads, num_channels), (x.shape[0], num_heads)
    shapes = (g, means, g, rows, weights, rows)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def aggregate_backward(
    grad: Tensor,
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    means: Tensor,
    g: Tensor,
    rows: Tensor,
    weights: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, Wq, bq, Wk, bk in the notation of the module's docstring."""
    functions, span = backend_named(backend), (cu_seqlens, max_seqlen)
    wq, wk, grad = _cast(rows.dtype, query_weight, key_weight, grad.contiguous())
    num_heads = rows.shape[1]
    wk = wk.view(num_heads, -1, wk.shape[1])
    per_head, sums_per_head = _heads_first(grad, num_heads), sums.transpose(0, 1)
    grad_sums = torch.empty_like(rows)
    torch.bmm(per_head, wk, out=grad_sums.transpose(0, 1))
    centre = torch.linalg.vecdot(grad_sums, sums)
    grad_scores = functions.token_scores(x, grad_sums, *span, weights, centre)
    grad_rows = functions.sequence_sums(grad_scores, x, *span)
    # the da of a sequence sum to zero but for rounding, which what all its tokens share would
    # magnify: seven times the error in dWq on tokens whose mean is as large as their spread
    rounding = functions.sequence_totals(grad_scores, *span)
    grad_rows.baddbmm_(rounding.unsqueeze(2), means.unsqueeze(1), alpha=-1)
    rows_per_head = grad_rows.transpose(0, 1)
    grad_g = torch.empty_like(g)
    out, scale = _heads_first(grad_g, num_heads), wk.shape[1] ** -0.5
    torch.baddbmm(out, rows_per_head, wk.transpose(1, 2), beta=0, alpha=scale, out=out)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    pairs = ((grad_scores, rows), (weights, grad_sums))
    functions.spread_rows(pairs, grad_g.mm(wq), *span, grad_x)
    grad_wk = torch.bmm(per_head.transpose(1, 2), sums_per_head)
    queries = _heads_first(g, num_heads).transpose(1, 2)
    grad_wk.baddbmm_(queries, rows_per_head, alpha=scale)
    grad_wq, grad_wk = grad_g.t().mm(means), grad_wk.view(key_weight.shape)
    parameters = (grad_wq, grad_g.sum(dim=0), grad_wk, grad.sum(dim=0))
    grad_wq, grad_bq, grad_wk, grad_bk = _cast(query_weight.dtype, *parameters)
    return grad_x, grad_wq, grad_bq, grad_wk, grad_bk


def _backward_shapes(
    grad: Tensor, x: Tensor, query_weight: Tensor, key_weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    bias = query_weight.shape[:1]
    shapes = (query_weight.shape, bias, key_weight.shape, bias)
    return x.new_empty(x.shape), *(query_weight.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, wq, _, wk, _, _, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    ctx.save_for_backward(x, wq, wk, *outputs[1:], cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend)
    return (*gradients, None, None, None, None)


_backward = register("global_aggregation_backward", aggregate_backward, _backward_shapes)
_global_aggregation = register("global_aggregation", aggregate, _shapes, _save, _differentiate)


def global_mean(x: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over the tokens of each sequence, `[B, C]`; zero for an empty one.

    Args:
        x: `[T, C]`, floating; its mean comes in float32 for half precision.
    """
    backend = active_backend(x.device)
    if backend == "reference":
        return global_mean_ref(x, layout.cu_seqlens)
    return _global_mean(x, layout.cu_seqlens, layout.max_seqlen, backend)


def global_aggregation(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    layout: PackedLayout,
) -> Tensor:
    """g' of each sequence: its mean query attends over its keys, which are also the values.

    Args:
        x: `[T, C]`, floating, hidden states.
        query_weight, key_weight: `[E, C]`.
        query_bias, key_bias: `[E]`, all four of one dtype.
        num_heads: H, a divisor of E.

    Returns:
        `[B, E]`, float32 for half-precision parameters and their dtype otherwise; the key bias for
        an empty sequence.
    """
    width = query_bias.shape[0]
    if width % num_heads:
        raise ValueError(
            f"global_aggregation: width {width} is not a multiple of {num_heads} heads"
        )
    parameters = (query_weight, query_bias, key_weight, key_bias)
    backend = active_backend(x.device)
    if backend == "reference":
        return global_aggregation_ref(x, *parameters, num_heads, layout.cu_seqlens)
    span = (layout.cu_seqlens, layout.max_seqlen)
    return _global_aggregation(x, *parameters, num_heads, *span, backend)
