"""Sums and products over the tokens of each sequence: the kernels of global aggregation.

PoNet (arXiv 2110.02442) section 3, in the form that `ponet_kernels.global_aggregation` derives.
Tokens x `[T, C]`, per sequence b a few rows `[H, C]`, per token a few weights `[H]`:

    sequence_means    mean_t x_t                                  `[B, C]`
    sequence_totals   sum_t x_t                                   `[B, C]`
    token_scores      rows_bh . x_t                               `[T, H]`
    score_gradients   weights_th (rows_bh . x_t - centre_bh)      `[T, H]`
    sequence_softmax  softmax_t scores_th                         `[T, H]`
    sequence_sums     sum_t weights_th x_t                        `[B, H, C]`
    spread_rows       shared_b / n_b + sum_h weights_th rows_bh   `[T, C]`

A program owns a span of tokens of one sequence; programs past its end leave at once. Sums over
longer sequences are written span by span and added by a second kernel in a fixed order: no
atomics, two runs agree bit by bit. The slot of span s of sequence b among the written sums is
cu_seqlens[b] // SPAN + b + s, so T // SPAN + B slots suffice for lengths of any mixture.

Products run on the tensor cores in tf32, which holds half precision exactly. A float32 operand is
taken as a sum of two tf32 numbers, so with x in half precision a product costs two and is exact to
about 2^-22.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.triton_kernels.launch import ceil_div, launch, next_power_of_2
from ponet_kernels.triton_kernels.sequence_softmax import sequence_softmax

__all__ = [
    "score_gradients",
    "sequence_means",
    "sequence_softmax",
    "sequence_sums",
    "sequence_totals",
    "spread_rows",
    "token_scores",
]

PROGRAMS = 1024
"""Programs that a launch aims at: several for each of the 132 multiprocessors of an H200."""


@triton.jit
def _leading(value):
    """`value` rounded to the 11 significant bits of tf32, as float32; may lose a NaN."""
    if value.dtype == tl.float32:
        # tensor cores cut the low 13 bits off; rounding first leaves a shorter, unbiased rest
        bits = value.to(tl.int32, bitcast=True)
        leading = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        # bfloat16 and float16 have no more bits
        leading = value.to(tl.float32)
    return leading


@triton.jit
def _rounded(value):
    """float32 `value` rounded to the 11 significant bits of tf32."""
    return tl.where(value == value, _leading(value), value)


@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b; see `_precision` for the ways to multiply."""
    if PRECISION == "ieee":
        dtype = acc.dtype
        acc = tl.dot(a.to(dtype), b.to(dtype), acc, input_precision="ieee", out_dtype=dtype)
    elif PRECISION == "rounded":
        acc = tl.dot(_rounded(a), _rounded(b), acc, input_precision="tf32")
    else:
        a_high = _leading(a)
        b_high = _leading(b)
        if a.dtype == tl.float32:
            acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        if b.dtype == tl.float32:
            acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b_high, acc, input_precision="tf32")
    return acc


@triton.jit
def sequence_totals_kernel(
    x_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    stride_xt,
    C,
    num_spans,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    """Sum over each span, or its share in the mean of its sequence, `[slots, C]`."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_s = (pid // num_blocks) % num_spans
    pid_b = (pid // num_blocks // num_spans).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    # the first span of an empty sequence writes zeros
    if pid_s * SPAN >= max(length, 1):
        return
    offs_t = tl.arange(0, BLOCK_T)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x_offsets = offs_t.to(tl.int64)[:, None] * stride_xt + offs_c[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_C], sums_ptr.dtype.element_ty)
    for first in range(pid_s * SPAN, min(pid_s * SPAN + SPAN, length), BLOCK_T):
        mask_t = offs_t < length - first
        x = tl.load(
            x_ptr + (start + first) * stride_xt + x_offsets,
            mask=mask_t[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_C]
        acc += x.to(acc.dtype)
    total = tl.sum(acc, axis=0)
    if IS_MEAN:
        total /= max(length, 1)  # pyright: ignore
    slot = tl.where(num_spans == 1, pid_b, start // SPAN + pid_b + pid_s)
    tl.store(sums_ptr + slot * C + offs_c, total, mask=mask_c)


@triton.jit
def sequence_sums_kernel(
    weights_ptr,
    x_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    stride_xt,
    C,
    num_spans,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted sums over each span of tokens, `[slots, H, C]`."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_s = (pid // num_blocks) % num_spans
    pid_b = (pid // num_blocks // num_spans).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    # the first span of an empty sequence writes zeros
    if pid_s * SPAN >= max(length, 1):
        return
    offs_t = tl.arange(0, BLOCK_T)
    offs_h = tl.arange(0, BLOCK_H)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_h = offs_h < H
    mask_c = offs_c < C
    w_offsets = offs_t[None, :] * H + offs_h[:, None]
    x_offsets = offs_t.to(tl.int64)[:, None] * stride_xt + offs_c[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_C], sums_ptr.dtype.element_ty)
    for first in range(pid_s * SPAN, min(pid_s * SPAN + SPAN, length), BLOCK_T):
        mask_t = offs_t < length - first
        w = tl.load(
            weights_ptr + (start + first) * H + w_offsets,
            mask=mask_t[None, :] & mask_h[:, None],
            other=0.0,
        )  # [BLOCK_H, BLOCK_T]
        x = tl.load(
            x_ptr + (start + first) * stride_xt + x_offsets,
            mask=mask_t[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_C]
        acc = _add_product(acc, w, x, PRECISION)
    slot = tl.where(num_spans == 1, pid_b, start // SPAN + pid_b + pid_s)
    tl.store(
        sums_ptr + (slot * H + offs_h[:, None]) * C + offs_c[None, :],
        acc,
        mask=mask_h[:, None] & mask_c[None, :],
    )


@triton.jit
def combine_spans_kernel(
    spans_ptr,
    cu_seqlens_ptr,
    out_ptr,
    N,
    SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over the spans of each sequence, `[slots, N]` to `[B, N]`."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(N, BLOCK_N)
    pid_b = (pid // num_blocks).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    slot = start // SPAN + pid_b
    used = tl.cdiv(length, SPAN)
    offs_s = tl.arange(0, BLOCK_S)
    offs_n = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_S, BLOCK_N], out_ptr.dtype.element_ty)
    for first in range(0, used, BLOCK_S):
        s = first + offs_s
        acc += tl.load(
            spans_ptr + (slot + s[:, None]) * N + offs_n[None, :],
            mask=(s < used)[:, None] & mask_n[None, :],
            other=0.0,
        )
    tl.store(out_ptr + pid_b * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def token_scores_kernel(
    x_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    weights_ptr,
    centre_ptr,
    scores_ptr,
    stride_xt,
    C,
    num_tiles,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a tile of tokens with the rows of their sequence, `[T, H]`.

    With weights, from each product the centre is taken and the rest weighted.
    """
    pid = tl.program_id(0)
    pid_b = (pid // num_tiles).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    first = (pid % num_tiles) * BLOCK_T
    if first >= length:
        return
    t = first + tl.arange(0, BLOCK_T)
    offs_h = tl.arange(0, BLOCK_H)
    offs_c = tl.arange(0, BLOCK_C)
    mask_t = t < length
    mask_h = offs_h < H
    # the rows as first operand: 16 of them fill the tensor cores' narrow side, and blocks of x
    # stay as they lie in memory
    rows_ptrs = rows_ptr + (pid_b * H + offs_h)[:, None] * C
    x_ptrs = x_ptr + (start + t)[None, :] * stride_xt
    acc = tl.zeros([BLOCK_H, BLOCK_T], scores_ptr.dtype.element_ty)
    for block in range(0, tl.cdiv(C, BLOCK_C), 2):
        # two blocks fill a cache line of 128 bytes; one of twice the size takes more registers
        for half in tl.static_range(2):  # pyright: ignore
            c = (block + half) * BLOCK_C + offs_c
            mask_c = c < C
            rows = tl.load(
                rows_ptrs + c[None, :], mask=mask_h[:, None] & mask_c[None, :], other=0.0
            )  # [BLOCK_H, BLOCK_C]
            x = tl.load(
                x_ptrs + c[:, None], mask=mask_c[:, None] & mask_t[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_T]
            acc = _add_product(acc, rows, x, PRECISION)
    offsets = (start + t)[None, :] * H + offs_h[:, None]
    mask = mask_h[:, None] & mask_t[None, :]
    if weights_ptr is not None:
        centre = tl.load(centre_ptr + pid_b * H + offs_h, mask=mask_h, other=0.0)
        acc = (acc - centre[:, None]) * tl.load(weights_ptr + offsets, mask=mask, other=0.0)
    tl.store(scores_ptr + offsets, acc, mask=mask)


@triton.jit
def _load_table(rows_ptr, pid_b, offs_h, offs_c, H: tl.constexpr, C):
    """Rows of a sequence, `[BLOCK_H, BLOCK_C]`."""
    return tl.load(
        rows_ptr + (pid_b * H + offs_h[:, None]) * C + offs_c[None, :],
        mask=(offs_h < H)[:, None] & (offs_c < C)[None, :],
        other=0.0,
    )


@triton.jit
def _add_weighted(acc, weights_ptr, rows, t, mask_t, offs_h, H: tl.constexpr, P: tl.constexpr):
    """acc + the rows weighted for tokens t, `[BLOCK_T, BLOCK_C]`."""
    weights = tl.load(
        weights_ptr + t[:, None] * H + offs_h[None, :],
        mask=mask_t[:, None] & (offs_h < H)[None, :],
        other=0.0,
    )  # [BLOCK_T, BLOCK_H]
    return _add_product(acc, weights, rows, P)


@triton.jit
def spread_rows_kernel(
    shared_ptr,
    weights_ptr,
    rows_ptr,
    weights2_ptr,
    rows2_ptr,
    cu_seqlens_ptr,
    out_ptr,
    stride_ot,
    C,
    num_spans,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of the sequence, weighted, and an equal share of one more, for a span of tokens."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_s = (pid // num_blocks) % num_spans
    pid_b = (pid // num_blocks // num_spans).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    if pid_s * SPAN >= length:
        return
    offs_t = tl.arange(0, BLOCK_T)
    offs_h = tl.arange(0, BLOCK_H)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    shared = tl.load(shared_ptr + pid_b * C + offs_c, mask=mask_c, other=0.0) / length
    if rows_ptr is not None:
        rows = _load_table(rows_ptr, pid_b, offs_h, offs_c, H, C)
    if rows2_ptr is not None:
        rows2 = _load_table(rows2_ptr, pid_b, offs_h, offs_c, H, C)
    end = min(pid_s * SPAN + SPAN, length)
    # one stage: weights that stop over in shared memory would be split or rounded by every warp
    for first in tl.range(pid_s * SPAN, end, BLOCK_T, num_stages=1):  # pyright: ignore
        mask_t = offs_t < length - first
        t = start + first + offs_t
        acc = tl.zeros([BLOCK_T, BLOCK_C], shared_ptr.dtype.element_ty) + shared[None, :]
        if rows_ptr is not None:
            acc = _add_weighted(acc, weights_ptr, rows, t, mask_t, offs_h, H, PRECISION)
        if rows2_ptr is not None:
            acc = _add_weighted(acc, weights2_ptr, rows2, t, mask_t, offs_h, H, PRECISION)
        tl.store(
            out_ptr + t[:, None] * stride_ot + offs_c[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_c[None, :],
        )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _precision(operand: torch.dtype, result: torch.dtype = torch.float32) -> str:
    """How to multiply on the device at hand.

    Returns:
        "ieee", operands as they are: AMD's matrix cores take float32, and float64 is for tests;
        "split", float32 operands as two tf32 numbers each, two or three products;
        "rounded", both to tf32, one product: 11 bits that end in a result of 8.
    """
    if operand == torch.float64 or torch.version.hip:
        return "ieee"
    return "rounded" if result == torch.bfloat16 else "split"


def _max_registers(operand: torch.dtype, others: int | None = None) -> int | None:
    # left alone, the compiler spills some to make room for more warps, in float64 most of all
    return 168 if operand == torch.float64 else others


@cache
def _row_block(num_rows: int) -> int:
    # tl.dot takes blocks of at least 16
    return max(16, next_power_of_2(num_rows))


@cache
def _channel_block(num_channels: int, itemsize: int, num_bytes: int) -> int:
    """Channels a block: `num_bytes` of a token, or as many as there are."""
    return max(16, min(num_bytes // itemsize, next_power_of_2(num_channels)))


def _span(num_tokens: int, num_blocks: int) -> int:
    """Tokens a program: long spans make few partial sums, short ones enough programs."""
    share = ceil_div(num_tokens * num_blocks, PROGRAMS)
    return min(max(next_power_of_2(share), 64), 1024)


def _combined(spans: Tensor, cu_seqlens: Tensor, span: int, num_spans: int) -> Tensor:
    """`[slots, ...]` to `[B, ...]`: the sums over the spans of each sequence."""
    num_sequences = cu_seqlens.shape[0] - 1
    out = spans.new_empty(num_sequences, *spans.shape[1:])
    width = math.prod(spans.shape[1:])
    launch(
        combine_spans_kernel,
        (num_sequences * ceil_div(width, 128),),
        spans,
        cu_seqlens,
        out,
        width,
        SPAN=span,
        BLOCK_S=min(next_power_of_2(num_spans), 32),
        BLOCK_N=128,
        num_warps=4,
    )
    return out


def _slots(num_tokens: int, num_sequences: int, span: int, num_spans: int) -> int:
    return num_sequences if num_spans == 1 else num_tokens // span + num_sequences


def sequence_means(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_means`."""
    return _totals(x, cu_seqlens, max_seqlen, is_mean=True)


def sequence_totals(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_totals`."""
    return _totals(x, cu_seqlens, max_seqlen, is_mean=False)


def _totals(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, is_mean: bool) -> Tensor:
    x = _with_unit_stride(x)
    (T, C), B = x.shape, cu_seqlens.shape[0] - 1
    block_c = _channel_block(C, x.element_size(), 256)
    num_blocks = ceil_div(C, block_c)
    span = _span(T, num_blocks)
    num_spans = max(ceil_div(max_seqlen, span), 1)
    dtype = accumulation_dtype(x.dtype)
    sums = x.new_empty(_slots(T, B, span, num_spans), C, dtype=dtype)
    launch(
        sequence_totals_kernel,
        (B * num_spans * num_blocks,),
        x,
        cu_seqlens,
        sums,
        x.stride(0),
        C,
        num_spans,
        SPAN=span,
        BLOCK_T=32,
        BLOCK_C=block_c,
        IS_MEAN=is_mean,
        num_warps=4,
    )
    return sums if num_spans == 1 else _combined(sums, cu_seqlens, span, num_spans)


def token_scores(x: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.token_scores`."""
    return _scores(x, rows, None, None, cu_seqlens, max_seqlen)


def score_gradients(
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    centre: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    """As `Backend.score_gradients`."""
    return _scores(x, rows, weights.contiguous(), centre.contiguous(), cu_seqlens, max_seqlen)


def _scores(
    x: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    centre: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    x, rows = _with_unit_stride(x), rows.contiguous()
    (T, C), (B, H, _) = x.shape, rows.shape
    block_t = min(max(next_power_of_2(max_seqlen), 16), 128)
    num_tiles = ceil_div(max_seqlen, block_t)
    scores = rows.new_empty(T, H)
    launch(
        token_scores_kernel,
        (B * num_tiles,),
        x,
        rows,
        cu_seqlens,
        weights,
        centre,
        scores,
        x.stride(0),
        C,
        num_tiles,
        H=H,
        BLOCK_H=_row_block(H),
        BLOCK_T=block_t,
        BLOCK_C=_channel_block(C, x.element_size(), 64),
        PRECISION=_precision(x.dtype),
        num_warps=4,
        # four programs on a multiprocessor; told so, the compiler spills nothing
        max_registers=None if x.dtype == torch.float64 else 128,
    )
    return scores


def sequence_sums(weights: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_sums`."""
    weights, x = weights.contiguous(), _with_unit_stride(x)
    (T, C), H, B = x.shape, weights.shape[1], cu_seqlens.shape[0] - 1
    block_c = _channel_block(C, x.element_size(), 256)
    num_blocks = ceil_div(C, block_c)
    span = _span(T, num_blocks)
    num_spans = max(ceil_div(max_seqlen, span), 1)
    sums = weights.new_empty(_slots(T, B, span, num_spans), H, C)
    launch(
        sequence_sums_kernel,
        (B * num_spans * num_blocks,),
        weights,
        x,
        cu_seqlens,
        sums,
        x.stride(0),
        C,
        num_spans,
        H=H,
        SPAN=span,
        BLOCK_H=_row_block(H),
        BLOCK_T=32,
        BLOCK_C=block_c,
        PRECISION=_precision(x.dtype),
        num_warps=4,
        max_registers=_max_registers(x.dtype),
    )
    return sums if num_spans == 1 else _combined(sums, cu_seqlens, span, num_spans)


def spread_rows(
    pairs: Sequence[tuple[Tensor, Tensor]],
    shared: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
) -> None:
    """As `Backend.spread_rows`."""
    tables: list[Tensor | None] = [table.contiguous() for pair in pairs for table in pair]
    shared = shared.contiguous()
    (T, C), B = out.shape, cu_seqlens.shape[0] - 1
    H = pairs[0][1].shape[1] if pairs else 1
    # 64 channels in half precision: with 128 one program fills a multiprocessor's registers
    block_c = _channel_block(C, out.element_size(), 128 if out.element_size() == 2 else 256)
    num_blocks = ceil_div(C, block_c)
    span = _span(T, num_blocks)
    num_spans = ceil_div(max_seqlen, span)
    launch(
        spread_rows_kernel,
        (B * num_spans * num_blocks,),
        shared,
        *tables,
        *(None,) * (4 - len(tables)),
        cu_seqlens,
        out,
        out.stride(0),
        C,
        num_spans,
        H=H,
        SPAN=span,
        BLOCK_H=_row_block(H),
        BLOCK_T=64,
        BLOCK_C=block_c,
        PRECISION=_precision(shared.dtype, out.dtype),
        num_warps=8,
        max_registers=_max_registers(shared.dtype, 128),
    )
