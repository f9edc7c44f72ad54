"""Segment max-pooling, local max-pooling and pooling fusion (PoNet section 3) as one operator.

    out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t      S_j = max of s over segment j
                                                    L_t = max of l over the window of t
    out_t =  g'_{b(t)} * O_t                        at special tokens

g' `[B, C]`; O, s and l `[T, C]`, the output, segment and local projections, side by side in one
tensor as one product makes them; output `[T, C]`. For the backward pass it keeps that tensor, S
and one small index per segment and channel: not L, whose winners are found again from l. Equal
maxima: the gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import argmax_dtype
from ponet_kernels.layout import PackedLayout
from ponet_kernels.reference import fused_pooling_ref
from ponet_kernels.registration import register


def _columns(
    values: Tensor, has_segment: bool, has_local: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """O, s and l of `[T, (1 + has_segment + has_local) C]`, as views; None where absent."""
    output, *others = values.chunk(1 + has_segment + has_local, dim=1)
    local = others.pop() if has_local else None
    return output, others[0] if has_segment else None, local


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Operators return tensors only; this one says "none"."""
    return x.new_empty(0, dtype=dtype)


def pool(
    global_vectors: Tensor | None,
    values: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    has_segment: bool,
    has_local: bool,
    longest: int,
    has_empty: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    functions = backend_named(backend)
    output, segment, local = _columns(values, has_segment, has_local)
    maxima, argmax = None, None
    if segment is not None:
        dtype = argmax_dtype(longest) if with_argmax else None
        maxima, argmax = functions.segment_max_fwd(
            segment, cu_segments, token_segments, dtype, has_empty
        )
    layout = (token_segments, segment_sequences, token_marks)
    out = functions.fusion_fwd(global_vectors, maxima, output, local, *layout)
    maxima = _nothing(values) if maxima is None else maxima
    return out, maxima, _nothing(values, torch.uint8) if argmax is None else argmax


def _shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, values, _, _, segment_sequences, _, has_segment, has_local, longest = inputs[:9]
    with_argmax = inputs[10]
    num_channels = values.shape[1] // (1 + has_segment + has_local)
    out = values.new_empty(values.shape[0], num_channels)
    if not has_segment:
        return out, _nothing(values), _nothing(values, torch.uint8)
    maxima = values.new_empty(segment_sequences.shape[0], num_channels)
    if not with_argmax:
        return out, maxima, _nothing(values, torch.uint8)
    return out, maxima, torch.empty_like(maxima, dtype=argmax_dtype(longest))


def pool_backward(
    grad: Tensor,
    global_vectors: Tensor | None,
    values: Tensor,
    maxima: Tensor,
    argmax: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    has_segment: bool,
    has_local: bool,
    has_empty: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    functions = backend_named(backend)
    output, _, local = _columns(values, has_segment, has_local)
    grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
    grad_output, grad_segment, grad_local = _columns(grad_values, has_segment, has_local)
    grad_global, sums = functions.fusion_bwd(
        grad,
        global_vectors,
        maxima if has_segment else None,
        output,
        local,
        cu_segments,
        token_segments,
        segment_sequences,
        token_marks,
        grad_output,
        grad_local,
        has_empty,
    )
    # without argmax only the global vectors are to be differentiated
    if grad_segment is not None and sums is not None and argmax.ndim == 2:
        functions.segment_max_bwd(sums, argmax, cu_segments, token_segments, grad_segment)
    if grad_global is None or global_vectors is None:
        return _nothing(values), grad_values
    return grad_global.to(global_vectors.dtype), grad_values


def _backward_shapes(
    grad: Tensor, global_vectors: Tensor | None, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    g = _nothing(values) if global_vectors is None else global_vectors
    return g.new_empty(g.shape), values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    global_vectors, values, *layout, has_segment, has_local, _, has_empty, _, backend = inputs
    ctx.save_for_backward(global_vectors, values, *outputs[1:], *layout)
    ctx.settings = (has_segment, has_local, has_empty, backend)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_global, grad_values = _backward(grad, *saved, *ctx.settings)
    return None if saved[0] is None else grad_global, grad_values, *(None,) * 10


_backward = register("fused_pooling_backward", pool_backward, _backward_shapes)
_fused_pooling = register("fused_pooling", pool, _shapes, _save, _differentiate)


def fused_pooling(
    global_vectors: Tensor | None,
    values: Tensor,
    layout: PackedLayout,
    *,
    use_segment: bool = True,
    use_local: bool = True,
) -> Tensor:
    """Pool segments and windows and fuse them with the global vectors: `[T, C]`.

    Args:
        global_vectors: `[B, C]`, g' of each sequence; None leaves the term out.
        values: `[T, 3 C]`, O, s and l side by side; `[T, 2 C]` or `[T, C]` where the flags leave
            s or l out.
        use_segment, use_local: without them the terms S and L are left out.
    """
    count = 1 + use_segment + use_local
    if values.ndim != 2 or values.shape[0] != layout.num_tokens or values.shape[1] % count:
        raise ValueError(
            f"fused_pooling: expected values [{layout.num_tokens}, {count} C], found "
            f"{tuple(values.shape)}"
        )
    expected = (layout.num_sequences, values.shape[1] // count)
    if global_vectors is not None and global_vectors.shape != expected:
        raise ValueError(
            f"fused_pooling: expected global_vectors {expected}, found "
            f"{tuple(global_vectors.shape)}"
        )
    backend = active_backend(values.device)
    if backend == "reference":
        return fused_pooling_ref(global_vectors, *_columns(values, use_segment, use_local), layout)
    return _fused_pooling(
        global_vectors,
        values,
        layout.cu_segments,
        layout.token_segments,
        layout.segment_sequences,
        layout.token_marks,
        use_segment,
        use_local,
        layout.max_segment_len,
        layout.has_empty_segments,
        use_segment and values.requires_grad and torch.is_grad_enabled(),
        backend,
    )
