"""Multi-granularity pooling (PoNet section 3) up to its last projection, as one operator.

    g' = GA(x)      O, s, l = x projected      out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t

The arithmetic of `global_aggregation`, one product of three times the width and `fused_pooling`,
bit for bit; without autograd between them a layer takes a tenth less of the host's time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend
from ponet_kernels.fused_pooling import fused_pooling, pool, pool_backward, pool_shapes
from ponet_kernels.global_aggregation import (
    aggregate,
    aggregate_backward,
    aggregate_backward_shapes,
    aggregate_shapes,
    global_aggregation,
)
from ponet_kernels.layout import PackedLayout
from ponet_kernels.registration import register


def _compute(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    segment_weight: Tensor,
    segment_bias: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    longest: int,
    has_empty: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result and, for the backward pass, what the parts of the formula keep."""
    pooled, means, g, rows, weights, sums = aggregate(
        x,
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        num_heads,
        cu_seqlens,
        max_seqlen,
        backend,
    )
    weight = torch.cat((output_weight, segment_weight, local_weight)).to(x.dtype)
    bias = torch.cat((output_bias, segment_bias, local_bias)).to(x.dtype)
    values = F.linear(x, weight, bias)
    tables = (cu_segments, token_segments, segment_sequences, token_marks)
    flags = (True, True, longest, has_empty, with_argmax, backend)
    out, maxima, argmax = pool(pooled, values, *tables, *flags)
    return out, means, g, rows, weights, sums, weight, pooled, values, maxima, argmax


def _shapes(x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    parameters, (heads, cu_seqlens, max_seqlen, *tables) = inputs[:10], inputs[10:17]
    pooled, *kept = aggregate_shapes(x, *parameters[:4], heads, cu_seqlens, max_seqlen, "")
    weight = x.new_empty(3 * parameters[4].shape[0], x.shape[1])
    values = x.new_empty(x.shape[0], weight.shape[0])
    longest, has_empty, with_argmax, backend = inputs[17:]
    flags = (True, True, longest, has_empty, with_argmax, backend)
    out, *maxima = pool_shapes(pooled, values, *tables, *flags)
    return out, *kept, weight, pooled, values, *maxima


def _compute_backward(
    grad: Tensor,
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    means: Tensor,
    g: Tensor,
    rows: Tensor,
    weights: Tensor,
    sums: Tensor,
    weight: Tensor,
    pooled: Tensor,
    values: Tensor,
    maxima: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    max_seqlen: int,
    has_empty: bool,
    is_frozen: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, Wq, bq, Wk, bk and, unless `is_frozen`, of the other three in one."""
    tables = (cu_segments, token_segments, segment_sequences, token_marks)
    flags = (True, True, has_empty, backend)
    grad_pooled, grad_values = pool_backward(grad, pooled, values, maxima, argmax, *tables, *flags)
    kept = (query_weight, key_weight, means, g, rows, weights, sums)
    grads = aggregate_backward(grad_pooled, x, *kept, cu_seqlens, max_seqlen, backend)
    grad_x, grad_wq, grad_bq, grad_wk, grad_bk = grads
    grad_x += grad_values.mm(weight)
    if is_frozen:
        grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    else:
        dtype = query_weight.dtype
        grad_weight = grad_values.t().mm(x).to(dtype)
        grad_bias = grad_values.sum(dim=0).to(dtype)
    return grad_x, grad_wq, grad_bq, grad_wk, grad_bk, grad_weight, grad_bias


def _backward_shapes(
    grad: Tensor, x: Tensor, query_weight: Tensor, key_weight: Tensor, *saved: Any
) -> tuple[Tensor, ...]:
    weight, is_frozen = saved[5], saved[-2]
    grads = aggregate_backward_shapes(grad, x, query_weight, key_weight)
    if is_frozen:
        return *grads, weight.new_empty(0), weight.new_empty(0)
    shapes = (weight.shape, weight.shape[:1])
    return *grads, *(query_weight.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, query_weight, _, key_weight, *_ = inputs
    cu_seqlens, max_seqlen, *tables, _, has_empty, _, backend = inputs[12:]
    ctx.save_for_backward(x, query_weight, key_weight, *outputs[1:], cu_seqlens, *tables)
    is_frozen = not any(ctx.needs_input_grad[5:11])
    ctx.settings = (max_seqlen, has_empty, is_frozen, backend)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *grads, weight, bias = _backward(grad, *ctx.saved_tensors, *ctx.settings)
    others: list[Tensor | None] = [None] * 6
    if len(weight):
        others[::2], others[1::2] = weight.chunk(3), bias.chunk(3)
    return *grads, *others, *(None,) * 11


_backward = register("multi_granularity_pooling_backward", _compute_backward, _backward_shapes)
_multi_granularity_pooling = register(
    "multi_granularity_pooling", _compute, _shapes, _save, _differentiate
)


def multi_granularity_pooling(
    x: Tensor,
    projections: Sequence[tuple[Tensor, Tensor]],
    num_heads: int,
    layout: PackedLayout,
) -> Tensor:
    """Project the tokens, pool them at three granularities and fuse what was pooled.

    Args:
        x: `[T, C]`, floating, hidden states.
        projections: weight `[C, C]` and bias `[C]` of query, key, output, segment and local, in
            this order and all of one dtype.
        num_heads: H, a divisor of C.
        layout: of the stream.

    Returns:
        `[T, C]`, dtype of x.
    """
    backend = active_backend(x.device)
    parameters = [parameter for pair in projections for parameter in pair]
    if backend == "reference":
        g = global_aggregation(x, *projections[0], *projections[1], num_heads, layout)
        weight, bias = torch.cat(parameters[4::2]), torch.cat(parameters[5::2])
        return fused_pooling(g, F.linear(x, weight, bias), layout)
    needs_argmax = torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in parameters[4:])
    )
    return _multi_granularity_pooling(
        x,
        *parameters,
        num_heads,
        layout.cu_seqlens,
        layout.max_seqlen,
        layout.cu_segments,
        layout.token_segments,
        layout.segment_sequences,
        layout.token_marks,
        layout.max_segment_len,
        layout.has_empty_segments,
        needs_argmax,
        backend,
    )
