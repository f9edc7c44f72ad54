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
    dx_t  = sum_h (da_ht u_h + p_ht dz_h) + dm / n          one product of rank 2H + 1
    dWk_h = g_h du_h^T / sqrt(D) + dg'_h z_h^T,  dbk = dg',  dWq = dg m^T,  dbq = dg

Input x `[T, C]`, output `[B, E]`, E the width of the projections.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.reference import global_aggregation_ref, global_mean_ref


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def spread_rank(num_heads: int) -> int:
    """Rank of the product for dx: 2H + 1, filled up to 16 bytes of float32 for wide loads."""
    return -(-(2 * num_heads + 1) // 4) * 4


def _lengths(cu_seqlens: Tensor) -> Tensor:
    """Tokens of each sequence, 1 where there are none: `[B, 1]`."""
    return cu_seqlens.diff().clamp(min=1).unsqueeze(1)


@torch.library.custom_op("ponet::global_mean", mutates_args=())
def _global_mean(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    return backend_named(backend).sequence_means(x, cu_seqlens, max_seqlen)


@_global_mean.register_fake
def _(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("ponet::global_mean_backward", mutates_args=())
def _global_mean_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str
) -> Tensor:
    rows = (grad / _lengths(cu_seqlens)).unsqueeze(1)
    ones = grad.new_ones(len(x), 1)
    return backend_named(backend).spread_rows(ones, rows, cu_seqlens, max_seqlen, x.dtype)


@_global_mean_backward.register_fake
def _(grad: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    ctx.save_for_backward(x, cu_seqlens)


def _differentiate_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.ponet.global_mean_backward(
        grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend
    )
    return grad_x, None, None, None


_global_mean.register_autograd(_differentiate_mean, setup_context=_save_mean)


@torch.library.custom_op("ponet::global_aggregation", mutates_args=())
def _global_aggregation(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g', and for the backward pass the means m, the rows u, the weights p and the sums z."""
    functions = backend_named(backend)
    dtype = accumulation_dtype(query_weight.dtype)
    with _without_autocast(x):
        wq, bq, wk, bk = (p.to(dtype) for p in (query_weight, query_bias, key_weight, key_bias))
        wk = wk.unflatten(0, (num_heads, -1))
        means = functions.sequence_means(x, cu_seqlens, max_seqlen).to(dtype)
        g = F.linear(means, wq, bq).unflatten(1, (num_heads, -1))
        rows = torch.einsum("bhe,hec->bhc", g * wk.shape[1] ** -0.5, wk)
        scores = functions.token_scores(x, rows, cu_seqlens, max_seqlen)
        weights = functions.sequence_softmax(scores, cu_seqlens, max_seqlen)
        sums = functions.sequence_sums(weights, x, cu_seqlens, max_seqlen)
        # an empty sequence sums to zero, which leaves the key bias
        pooled = torch.einsum("bhc,hec->bhe", sums, wk).flatten(1) + bk
    return pooled, means, rows.contiguous(), weights, sums


@_global_aggregation.register_fake
def _(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_channels = cu_seqlens.shape[0] - 1, x.shape[1]

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=accumulation_dtype(query_weight.dtype))

    return (
        empty(batch_size, query_weight.shape[0]),
        empty(batch_size, num_channels),
        empty(batch_size, num_heads, num_channels),
        empty(x.shape[0], num_heads),
        empty(batch_size, num_heads, num_channels),
    )


@torch.library.custom_op("ponet::global_aggregation_backward", mutates_args=())
def _global_aggregation_backward(
    grad: Tensor,
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    means: Tensor,
    rows: Tensor,
    weights: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, Wq, bq, Wk, bk in the notation of the module's docstring."""
    functions = backend_named(backend)
    num_heads, span = rows.shape[1], (cu_seqlens, max_seqlen)
    with _without_autocast(x):
        wq, bq, wk = (p.to(rows.dtype) for p in (query_weight, query_bias, key_weight))
        wk = wk.unflatten(0, (num_heads, -1))
        scale = wk.shape[1] ** -0.5
        per_head = grad.to(rows.dtype).unflatten(1, (num_heads, -1))
        grad_sums = torch.einsum("bhe,hec->bhc", per_head, wk).contiguous()
        grad_scores = functions.token_scores(x, grad_sums, *span)
        centre = (grad_sums * sums).sum(dim=2)
        owners = _owners(cu_seqlens, len(x))
        grad_scores.sub_(centre.index_select(0, owners)).mul_(weights)
        grad_rows = functions.sequence_sums(grad_scores, x, *span)
        # the da of a sequence sum to zero but for rounding, which what all its tokens share would
        # magnify: seven times the error in dWq on tokens whose mean is as large as their spread
        rounding = functions.sequence_means(grad_scores, *span) * _lengths(cu_seqlens)
        grad_rows -= rounding.unsqueeze(2) * means.unsqueeze(1)
        grad_g = torch.einsum("bhc,hec->bhe", grad_rows, wk).mul_(scale).flatten(1)
        grad_means = (grad_g @ wq) / _lengths(cu_seqlens)
        fill = spread_rank(num_heads) - (2 * num_heads + 1)
        grad_x = functions.spread_rows(
            torch.cat([grad_scores, weights, weights.new_ones(len(x), 1 + fill)], dim=1),
            F.pad(torch.cat([rows, grad_sums, grad_means.unsqueeze(1)], dim=1), (0, 0, 0, fill)),
            *span,
            x.dtype,
        )
        g = F.linear(means, wq, bq).unflatten(1, (num_heads, -1))
        grad_wk = torch.einsum("bhe,bhc->hec", per_head, sums)
        grad_wk += torch.einsum("bhe,bhc->hec", g * scale, grad_rows)
        grad_wq = grad_g.mT @ means
    kind = query_weight.dtype
    return (
        grad_x,
        grad_wq.to(kind),
        grad_g.sum(dim=0).to(kind),
        grad_wk.flatten(0, 1).to(kind),
        per_head.flatten(1).sum(dim=0).to(kind),
    )


def _owners(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`[T]` int64, the sequence of each token, without reading anything back to the host."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return sequences.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)


@_global_aggregation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    means: Tensor,
    rows: Tensor,
    weights: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, query_weight, query_bias, key_weight, query_bias)
    first, second, third, fourth, fifth = (p.new_empty(p.shape) for p in inputs)
    return first, second, third, fourth, fifth


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, wq, bq, wk, _, _, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    ctx.save_for_backward(x, wq, bq, wk, *output[1:], cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    gradients = torch.ops.ponet.global_aggregation_backward(
        grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend
    )
    return (*gradients, None, None, None, None)


_global_aggregation.register_autograd(_differentiate, setup_context=_save)


def global_mean(x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
    """Mean over the tokens of each sequence.

    Args:
        x: `[T, C]`, floating.
        cu_seqlens: `[B + 1]`, int32, offsets of the sequences into the tokens.
        max_seqlen: no sequence has more tokens; None: T.

    Returns:
        `[B, C]`, float32 for half-precision `x` and the dtype of `x` otherwise; zero for an empty
        sequence.
    """
    backend = active_backend(x.device)
    if backend == "reference":
        return global_mean_ref(x, cu_seqlens)
    longest = x.shape[0] if max_seqlen is None else max_seqlen
    return torch.ops.ponet.global_mean(x, cu_seqlens, longest, backend)


def global_aggregation(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
) -> Tensor:
    """g' of each sequence: its mean query attends over its keys, which are also the values.

    Args:
        x: `[T, C]`, floating, hidden states.
        query_weight, key_weight: `[E, C]`.
        query_bias, key_bias: `[E]`, all four of one dtype.
        num_heads: H, a divisor of E.
        cu_seqlens: `[B + 1]`, int32, offsets of the sequences into the tokens.
        max_seqlen: no sequence has more tokens; None: T. On a GPU a close bound saves idle
            programs.

    Returns:
        `[B, E]`, float32 for half-precision parameters and their dtype otherwise; the key bias for
        an empty sequence.

    Raises:
        ValueError: E is not a multiple of `num_heads`.
    """
    width = query_bias.shape[0]
    if width % num_heads:
        raise ValueError(
            f"global_aggregation: width {width} is not a multiple of {num_heads} heads"
        )
    parameters = (query_weight, query_bias, key_weight, key_bias)
    backend = active_backend(x.device)
    if backend == "reference":
        return global_aggregation_ref(x, *parameters, num_heads, cu_seqlens)
    longest = x.shape[0] if max_seqlen is None else max_seqlen
    return torch.ops.ponet.global_aggregation(
        x, *parameters, num_heads, cu_seqlens, longest, backend
    )[0]
