"""Multi-granularity pooling (PoNet section 3) up to its last projection.

    g' = GA(x)      O, s, l = x projected      out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t

Where nobody watches, the arithmetic of `global_aggregation`, one product of three times the width
and `fused_pooling` run as one function of autograd, bit for bit the same: a layer takes a tenth
less of the host's time. Compilers, exporters and dispatch modes are shown the parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend
from ponet_kernels.fused_pooling import fused_pooling, pool, pool_backward
from ponet_kernels.global_aggregation import aggregate, aggregate_backward, global_aggregation
from ponet_kernels.layout import PackedLayout
from ponet_kernels.registration import alone, differentiable, is_watched


def _tables(layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        layout.cu_segments,
        layout.token_segments,
        layout.segment_sequences,
        layout.token_marks,
    )


def _compute(x: Tensor, _: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The result and, for the backward pass, what the parts of the formula keep."""
    parameters, (num_heads, layout, with_argmax, backend) = inputs[:10], inputs[10:]
    span = (layout.cu_seqlens, layout.max_seqlen)
    pooled, *kept = aggregate(*[x, *parameters[:4], num_heads, *span, backend])
    weight = torch.cat(parameters[4::2]).to(x.dtype)
    values = F.linear(x, weight, torch.cat(parameters[5::2]).to(x.dtype))
    sizes = (layout.max_segment_len, layout.has_empty_segments)
    tables = _tables(layout)
    out, *maxima = pool(pooled, values, *tables, True, True, *sizes, with_argmax, backend)
    return out, *kept, weight, pooled, values, *maxima


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, _, query_weight, _, key_weight, *_ = inputs
    ctx.save_for_backward(x, query_weight, key_weight, *outputs[1:])
    *_, layout, _, backend = inputs
    ctx.settings = (layout, not any(ctx.needs_input_grad[6:12]), backend)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 4


@alone
def _backward(grad: Tensor, x: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    *kept, weight, pooled, values, maxima, argmax, layout, is_frozen, backend = saved
    of_pool = (grad, pooled, values, maxima, argmax, *_tables(layout))
    has_empty = layout.has_empty_segments
    grad_pooled, grad_values = pool_backward(*of_pool, True, True, has_empty, backend)
    span = (layout.cu_seqlens, layout.max_seqlen)
    grad_x, *grads = aggregate_backward(*[grad_pooled, x, *kept, *span, backend])
    others: list[Tensor | None] = [None] * 6
    if not is_frozen:
        dtype = kept[0].dtype
        others[::2] = grad_values.t().mm(x).to(dtype).chunk(3)
        others[1::2] = grad_values.sum(dim=0).to(dtype).chunk(3)
    return grad_values.mm(weight), grad_x, *grads, *others


_direct = differentiable("multi_granularity_pooling", alone(_compute), _save, _differentiate)


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
    if backend == "reference" or is_watched():
        g = global_aggregation(x, *projections[0], *projections[1], num_heads, layout)
        weight, bias = torch.cat(parameters[4::2]), torch.cat(parameters[5::2])
        return fused_pooling(g, F.linear(x, weight, bias), layout)
    needs_argmax = torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in parameters[4:])
    )
    return _direct(
        # twice: as of the parts, the gradient of each use joins that of the residual path by itself
        x,
        x,
        *parameters,
        num_heads,
        layout,
        needs_argmax,
        backend,
    )
