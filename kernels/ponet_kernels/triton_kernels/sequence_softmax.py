"""Softmax over the tokens of each sequence: p_th = exp(a_th) / sum of exp(a_sh) over its tokens s.

The weights of global aggregation, PoNet (arXiv 2110.02442) section 3; scores and result `[T, H]`.
One kernel finds maximum and sum of exponentials of every span of tokens. In a second one each
program joins those of its sequence and divides; where sequences are one span, it does without the
first. The scores are small beside the tokens, so both find them in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.triton_kernels.launch import ceil_div, launch, next_power_of_2
from ponet_kernels.triton_kernels.rows import load_block, span_of_program

SPAN = 512
"""Tokens a program. Shorter spans would have to join too many of their like in long sequences."""

LOWEST = tl.constexpr(-3.4e38)
"""Stands for the maximum of no scores; minus infinity would make NaN of unused columns."""


@triton.jit
def _join(highest, total, maxima, sums):
    """Maxima `[BLOCK_H]` and sums relative to them, joined with more of them `[BLOCK, BLOCK_H]`."""
    higher = tl.maximum(highest, tl.max(maxima, axis=0))
    total = total * tl.exp(highest - higher)
    total += tl.sum(sums * tl.exp(maxima - higher[None, :]), axis=0)
    return higher, total


@triton.jit
def _span_statistics(
    scores_ptr, begin, end, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Maxima of the scores of tokens, and sums of the exponentials relative to them, `[BLOCK_H]`.

    Args:
        scores_ptr: of the first token of the sequence.
        begin, end: of the span in the sequence.
    """
    h = tl.arange(0, BLOCK_H)
    highest = tl.full([BLOCK_H], LOWEST, scores_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_H], scores_ptr.dtype.element_ty)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & (h < H)[None, :]  # [BLOCK_T, BLOCK_H]
        scores_ptrs = scores_ptr + t[:, None] * H + h[None, :]
        scores = tl.load(scores_ptrs, mask=mask, other=float("-inf"))
        highest, total = _join(highest, total, scores, 1.0)
    return highest, total


@triton.jit
def span_softmax_kernel(
    scores_ptr,
    cu_seqlens_ptr,
    maxima_ptr,
    sums_ptr,
    num_spans,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Maximum of a span of tokens and sum of the exponentials relative to it, `[slots, H]`."""
    _, pid_s, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_spans, 1)
    begin = pid_s * SPAN
    if begin >= length:
        return
    h = tl.arange(0, BLOCK_H)
    end = min(begin + SPAN, length)
    highest, total = _span_statistics(scores_ptr + start * H, begin, end, H, BLOCK_H, BLOCK_T)
    slot = start // SPAN + pid_b + pid_s
    tl.store(maxima_ptr + slot * H + h, highest, mask=h < H)
    tl.store(sums_ptr + slot * H + h, total, mask=h < H)


@triton.jit
def sequence_softmax_kernel(
    scores_ptr,
    cu_seqlens_ptr,
    maxima_ptr,
    sums_ptr,
    out_ptr,
    num_spans,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Softmax of a span of tokens, given maxima and sums of all spans, `[T, H]`."""
    _, pid_s, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_spans, 1)
    if pid_s * SPAN >= length:
        return
    h = tl.arange(0, BLOCK_H)
    if maxima_ptr is None:
        highest, total = _span_statistics(scores_ptr + start * H, 0, length, H, BLOCK_H, BLOCK_T)
    else:
        slot = start // SPAN + pid_b
        used = tl.cdiv(length, SPAN)
        highest = tl.full([BLOCK_H], LOWEST, scores_ptr.dtype.element_ty)
        total = tl.zeros([BLOCK_H], scores_ptr.dtype.element_ty)
        for first in range(0, used, BLOCK_S):
            s = first + tl.arange(0, BLOCK_S)
            offsets = (slot + s)[:, None] * H + h[None, :]
            mask = (s < used)[:, None] & (h < H)[None, :]
            maxima = tl.load(maxima_ptr + offsets, mask=mask, other=float("-inf"))
            sums = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
            highest, total = _join(highest, total, maxima, sums)
    for first in range(pid_s * SPAN, min(pid_s * SPAN + SPAN, length), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        offsets = (start + t)[:, None] * H + h[None, :]  # [BLOCK_T, BLOCK_H]
        scores = load_block(scores_ptr + offsets, t < length, h < H)
        weights = tl.exp(scores - highest[None, :]) / total[None, :]
        tl.store(out_ptr + offsets, weights, mask=(t < length)[:, None] & (h < H)[None, :])


def sequence_softmax(scores: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_softmax`."""
    scores = scores.contiguous()
    (T, H), B = scores.shape, cu_seqlens.shape[0] - 1
    num_spans = ceil_div(max_seqlen, SPAN)
    out = torch.empty_like(scores)
    block_h = next_power_of_2(H)
    # 16 float32 registers a thread
    block_t = min(4096 // block_h, SPAN)
    constants = {"H": H, "SPAN": SPAN, "BLOCK_H": block_h, "BLOCK_T": block_t}
    grid = (B * num_spans,)
    statistics = (None, None)
    if num_spans > 1:
        maxima = scores.new_empty(T // SPAN + B, H)
        statistics = (maxima, torch.empty_like(maxima))
        operands = (scores, cu_seqlens, *statistics, num_spans)
        launch(span_softmax_kernel, grid, operands, constants, num_warps=8)
    operands = (scores, cu_seqlens, *statistics, out, num_spans)
    constants = {**constants, "BLOCK_S": min(next_power_of_2(num_spans), 32)}
    launch(sequence_softmax_kernel, grid, operands, constants, num_warps=8)
    return out
