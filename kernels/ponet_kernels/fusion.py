"""Pooling fusion (PF), PoNet section 3: out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t.

g' `[B, C]` global vectors, S `[S, C]` segment vectors, O and L `[T, C]`, output `[T, C]`. The model
uses `ponet_kernels.fused_pooling`, which pools S and L in the same operator.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.reference import pooling_fusion_ref


@torch.library.custom_op("ponet::pooling_fusion", mutates_args=())
def _pooling_fusion(
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
    backend: str,
) -> Tensor:
    return backend_named(backend).fusion_fwd(
        global_vectors, segment_vectors, output, local, token_segments, segment_sequences, None
    )


@_pooling_fusion.register_fake
def _(
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
    backend: str,
) -> Tensor:
    return output.new_empty(output.shape)


@torch.library.custom_op("ponet::pooling_fusion_backward", mutates_args=())
def _pooling_fusion_backward(
    grad: Tensor,
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.arange(len(segment_sequences) + 1, device=token_segments.device)
    cu_segments = torch.searchsorted(token_segments, numbers).int()
    grad_global, grad_segment, grad_output, _ = backend_named(backend).fusion_bwd(
        grad,
        global_vectors,
        segment_vectors,
        output,
        None,
        cu_segments,
        token_segments,
        segment_sequences,
        None,
    )
    return (
        like_input(grad_global, global_vectors, output),
        like_input(grad_segment, segment_vectors, output),
        grad_output,
    )


@_pooling_fusion_backward.register_fake
def _(
    grad: Tensor,
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_gradient(global_vectors, output),
        empty_gradient(segment_vectors, output),
        output.new_empty(output.shape),
    )


def like_input(gradient: Tensor | None, value: Tensor | None, output: Tensor) -> Tensor:
    """`gradient` in the dtype of `value`; of an absent value, a tensor without elements.

    Operators return tensors only, so that is how they say "none".
    """
    if gradient is None or value is None:
        return output.new_empty(0)
    return gradient.to(value.dtype)


def empty_gradient(value: Tensor | None, output: Tensor) -> Tensor:
    """What `like_input` returns, without the numbers."""
    return output.new_empty(0) if value is None else value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    global_vectors, segment_vectors, values, local, *places, ctx.backend = inputs
    ctx.save_for_backward(global_vectors, segment_vectors, values, *places)
    ctx.has_local = local is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    global_vectors, segment_vectors, *rest = ctx.saved_tensors
    grad_global, grad_segment, grad_output = torch.ops.ponet.pooling_fusion_backward(
        grad, global_vectors, segment_vectors, *rest, ctx.backend
    )
    return (
        None if global_vectors is None else grad_global,
        None if segment_vectors is None else grad_segment,
        grad_output,
        grad if ctx.has_local else None,
        None,
        None,
        None,
    )


_pooling_fusion.register_autograd(_differentiate, setup_context=_save)


def pooling_fusion(
    global_vectors: Tensor | None,
    segment_vectors: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
) -> Tensor:
    """Join the three poolings of a token with its output projection.

    Args:
        global_vectors: `[B, C]`, g' of each sequence; None leaves the term out.
        segment_vectors: `[S, C]`, S of each segment; None leaves the term out.
        output: `[T, C]`, O, the output projection of each token.
        local: `[T, C]`, L of each token, dtype of `output`; None leaves the term out.
        token_segments: `[T]`, int64, the segment of each token, ascending.
        segment_sequences: `[S]`, int64, the sequence of each segment, ascending.

    Returns:
        `[T, C]`, dtype of `output`.

    Raises:
        ValueError: `output` and `token_segments` differ in length, or `local` in dtype.
    """
    if token_segments.shape != output.shape[:1]:
        raise ValueError(
            f"pooling_fusion: expected token_segments [{len(output)}], "
            f"found {tuple(token_segments.shape)}"
        )
    if local is not None and local.dtype != output.dtype:
        raise ValueError(f"pooling_fusion: output is {output.dtype}, local is {local.dtype}")
    terms = (global_vectors, segment_vectors, output, local, token_segments, segment_sequences)
    backend = active_backend(output.device)
    if backend == "reference":
        return pooling_fusion_ref(*terms)
    return torch.ops.ponet.pooling_fusion(*terms, backend)
