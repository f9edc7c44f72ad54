"""Segment max-pooling, local max-pooling and pooling fusion (PoNet section 3) as one operator.

    out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t      S_j = max of s over segment j
                                                    L_t = max of l over the window of t
    out_t =  g'_{b(t)} * O_t                        at special tokens

g' `[B, C]`; s, O and l `[T, C]`, the segment, output and local projections; output `[T, C]`. For
the backward pass it keeps O, l, S and one small index a segment and channel: neither s nor L, whose
winners are found again from l. Equal maxima: the gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.dtypes import place_dtype
from ponet_kernels.fusion import empty_gradient, like_input
from ponet_kernels.reference import fused_pooling_ref


@torch.library.custom_op("ponet::fused_pooling", mutates_args=())
def _fused_pooling(
    global_vectors: Tensor | None,
    segment_values: Tensor | None,
    output: Tensor,
    local_values: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    longest: int,
    with_places: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    functions = backend_named(backend)
    maxima, places = None, None
    if segment_values is not None:
        dtype = place_dtype(longest) if with_places else None
        maxima, places = functions.segment_max_fwd(
            segment_values, cu_segments, token_segments, dtype
        )
    out = functions.fusion_fwd(
        global_vectors,
        maxima,
        output,
        local_values,
        token_segments,
        segment_sequences,
        token_marks,
    )
    return (
        out,
        output.new_empty(0) if maxima is None else maxima,
        output.new_empty(0, dtype=torch.uint8) if places is None else places,
    )


@_fused_pooling.register_fake
def _(
    global_vectors: Tensor | None,
    segment_values: Tensor | None,
    output: Tensor,
    local_values: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    longest: int,
    with_places: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = output.new_empty(output.shape)
    if segment_values is None:
        return out, output.new_empty(0), output.new_empty(0, dtype=torch.uint8)
    maxima = segment_values.new_empty(segment_sequences.shape[0], output.shape[1])
    if not with_places:
        return out, maxima, output.new_empty(0, dtype=torch.uint8)
    return out, maxima, torch.empty_like(maxima, dtype=place_dtype(longest))


@torch.library.custom_op("ponet::fused_pooling_backward", mutates_args=())
def _fused_pooling_backward(
    grad: Tensor,
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    places: Tensor,
    output: Tensor,
    local_values: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    functions = backend_named(backend)
    grad_global, sums, grad_output, grad_local = functions.fusion_bwd(
        grad,
        global_vectors,
        maxima,
        output,
        local_values,
        cu_segments,
        token_segments,
        segment_sequences,
        token_marks,
    )
    grad_segment = None
    if sums is not None and maxima is not None:
        grad_segment = functions.segment_max_bwd(
            sums, places, cu_segments, token_segments, maxima.dtype
        )
    return (
        like_input(grad_global, global_vectors, output),
        like_input(grad_segment, maxima, output),
        grad_output,
        like_input(grad_local, local_values, output),
    )


@_fused_pooling_backward.register_fake
def _(
    grad: Tensor,
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    places: Tensor,
    output: Tensor,
    local_values: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(global_vectors, output),
        output.new_empty(0) if maxima is None else maxima.new_empty(output.shape),
        output.new_empty(output.shape),
        empty_gradient(local_values, output),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    global_vectors, segment_values, factors, local_values, *layout, _, _, ctx.backend = inputs
    _, maxima, places = output
    maxima = None if segment_values is None else maxima
    ctx.save_for_backward(global_vectors, maxima, places, factors, local_values, *layout)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    gradients = torch.ops.ponet.fused_pooling_backward(grad, *saved, ctx.backend)
    # global vectors, maxima, output, local values
    terms = (*saved[:2], *saved[3:5])
    given = [
        None if term is None else gradient for term, gradient in zip(terms, gradients, strict=True)
    ]
    return (*given, *(None,) * 7)


_fused_pooling.register_autograd(_differentiate, setup_context=_save)


def fused_pooling(
    global_vectors: Tensor | None,
    segment_values: Tensor | None,
    output: Tensor,
    local_values: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    longest: int,
) -> Tensor:
    """Pool segments and windows and fuse them with the global vectors.

    Args:
        global_vectors: `[B, C]`, g' of each sequence; None leaves the term out.
        segment_values: `[T, C]`, s; None leaves S out.
        output: `[T, C]`, O.
        local_values: `[T, C]`, l, dtype of `output`; None leaves L out.
        cu_segments: `[S + 1]`, int32, offsets of the segments into the tokens.
        token_segments: `[T]`, int64, the segment of each token, ascending.
        segment_sequences: `[S]`, int64, the sequence of each segment, ascending.
        token_marks: `[T]`, uint8, from `ponet_kernels.token_marks`; a token marked special is a
            segment and a run of its own.
        longest: no segment has more tokens; the smaller, the less is kept for the backward pass.

    Returns:
        `[T, C]`, dtype of `output`.

    Raises:
        ValueError: `output`, `token_segments` and `token_marks` differ in length, or the values
            in shape or dtype.
    """
    if not token_segments.shape == token_marks.shape == output.shape[:1]:
        raise ValueError(
            f"fused_pooling: expected token_segments and token_marks [{len(output)}], found "
            f"{tuple(token_segments.shape)} and {tuple(token_marks.shape)}"
        )
    for name, values in (("segment_values", segment_values), ("local_values", local_values)):
        if values is not None and (values.shape, values.dtype) != (output.shape, output.dtype):
            raise ValueError(
                f"fused_pooling: output is {tuple(output.shape)} {output.dtype}, {name} "
                f"{tuple(values.shape)} {values.dtype}"
            )
    values = (global_vectors, segment_values, output, local_values)
    layout = (cu_segments, token_segments, segment_sequences, token_marks)
    backend = active_backend(output.device)
    if backend == "reference":
        return fused_pooling_ref(*values, *layout)
    learns = segment_values is not None and segment_values.requires_grad
    return torch.ops.ponet.fused_pooling(
        *values, *layout, longest, learns and torch.is_grad_enabled(), backend
    )[0]
