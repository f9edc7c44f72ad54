"""Pooling fusion, PoNet section 3: out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t.

g' `[B, C]` global vectors, S `[S, C]` segment vectors, O and L `[T, C]`, output `[T, C]`.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend
from ponet_kernels.reference import pooling_fusion_ref


class GatherMultiplyFunction(torch.autograd.Function):
    """out_t = v_{j(t)} * o_t; keeps v by segment, not the copy of it by token."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, output: Tensor, token_segments: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, output, token_segments)
        return vectors.index_select(0, token_segments).mul_(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, output, token_segments = ctx.saved_tensors
        index = token_segments.unsqueeze(1).expand_as(grad)
        grad_vectors = torch.zeros_like(vectors).scatter_add_(0, index, grad * output)
        return grad_vectors, vectors.index_select(0, token_segments).mul_(grad), None


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
        local: `[T, C]`, L of each token; None leaves the term out.
        token_segments: `[T]`, int64, the segment of each token.
        segment_sequences: `[S]`, int64, the sequence of each segment.

    Returns:
        `[T, C]`, dtype of `output`.

    Raises:
        ValueError: `output` and `token_segments` differ in length.
    """
    if token_segments.shape != output.shape[:1]:
        raise ValueError(
            f"pooling_fusion: expected token_segments [{len(output)}], "
            f"found {tuple(token_segments.shape)}"
        )
    if active_backend() == "reference":
        return pooling_fusion_ref(
            global_vectors, segment_vectors, output, local, token_segments, segment_sequences
        )
    # a segment lies in one sequence, so the global vector is added once a segment, not once a token
    vectors = segment_vectors
    if global_vectors is not None:
        spread = global_vectors.index_select(0, segment_sequences)
        vectors = spread if vectors is None else vectors + spread
    if vectors is None:
        return torch.zeros_like(output) if local is None else local
    fused = GatherMultiplyFunction.apply(vectors.to(output.dtype), output, token_segments)
    return fused if local is None else fused + local
