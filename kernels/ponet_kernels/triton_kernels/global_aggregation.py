"""Sums and products over the tokens of each sequence: the kernels of global aggregation.

PoNet (arXiv 2110.02442) section 3, in the form that `ponet_kernels.global_aggregation` derives.
Tokens x `[T, C]`, per sequence b a few rows `[H, C]`, per token a few weights `[H]`:

    sequence_totals   sum_t x_t, or mean_t x_t                   `[B, C]`
    token_scores      rows_bh . x_t, or                          `[T, H]`
                      weights_th (rows_bh . x_t - centre_bh)
    sequence_sums     sum_t weights_th x_t                       `[B, H, C]`
    spread_rows       shared_b / n_b + sum_h weights_th rows_bh  `[T, C]`

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.triton_kernels.launch import ceil_div, launch, next_power_of_2
from ponet_kernels.triton_kernels.rows import load_block, span_of_program, with_channels_adjacent

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
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_c, pid_s, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_spans, num_blocks)
    # the first span of an empty sequence writes zeros
    if pid_s * SPAN >= max(length, 1):
        return
    offs_t = tl.arange(0, BLOCK_T)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    x_offsets = offs_t.to(tl.int64)[:, None] * stride_xt + c[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_C], sums_ptr.dtype.element_ty)
    for first in range(pid_s * SPAN, min(pid_s * SPAN + SPAN, length), BLOCK_T):
        x_ptrs = x_ptr + (start + first) * stride_xt + x_offsets
        acc += load_block(x_ptrs, offs_t < length - first, c < C).to(acc.dtype)
    total = tl.sum(acc, axis=0)
    if IS_MEAN:
        total /= max(length, 1)  # pyright: ignore
    slot = tl.where(num_spans == 1, pid_b, start // SPAN + pid_b + pid_s)
    tl.store(sums_ptr + slot * C + c, total, mask=c < C)


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
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_c, pid_s, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_spans, num_blocks)
    # the first span of an empty sequence writes zeros
    if pid_s * SPAN >= max(length, 1):
        return
    offs_t = tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w_offsets = offs_t[None, :] * H + h[:, None]
    x_offsets = offs_t.to(tl.int64)[:, None] * stride_xt + c[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_C], sums_ptr.dtype.element_ty)
    for first in range(pid_s * SPAN, min(pid_s * SPAN + SPAN, length), BLOCK_T):
        mask_t = offs_t < length - first
        # [BLOCK_H, BLOCK_T], [BLOCK_T, BLOCK_C]
        w = load_block(weights_ptr + (start + first) * H + w_offsets, h < H, mask_t)
        x = load_block(x_ptr + (start + first) * stride_xt + x_offsets, mask_t, c < C)
        acc = _add_product(acc, w, x, PRECISION)
    slot = tl.where(num_spans == 1, pid_b, start // SPAN + pid_b + pid_s)
    sums_ptrs = sums_ptr + (slot * H + h[:, None]) * C + c[None, :]
    tl.store(sums_ptrs, acc, mask=(h < H)[:, None] & (c < C)[None, :])


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
    pid_n, _, pid_b, start, length = span_of_program(cu_seqlens_ptr, 1, tl.cdiv(N, BLOCK_N))
    slot = start // SPAN + pid_b
    used = tl.cdiv(length, SPAN)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_S, BLOCK_N], out_ptr.dtype.element_ty)
    for first in range(0, used, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        acc += load_block(spans_ptr + (slot + s[:, None]) * N + n[None, :], s < used, n < N)
    tl.store(out_ptr + pid_b * N + n, tl.sum(acc, axis=0), mask=n < N)


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
    _, pid_t, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_tiles, 1)
    first = pid_t * BLOCK_T
    if first >= length:
        return
    t = first + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    # the rows as first operand: 16 of them fill the tensor cores' narrow side, and blocks of x
    # stay as they lie in memory
    rows_ptrs = rows_ptr + (pid_b * H + h)[:, None] * C
    x_ptrs = x_ptr + (start + t)[None, :] * stride_xt
    acc = tl.zeros([BLOCK_H, BLOCK_T], scores_ptr.dtype.element_ty)
    for block in range(0, tl.cdiv(C, BLOCK_C), 2):
        # two blocks fill a cache line of 128 bytes; one of twice the size takes more registers
        for half in tl.static_range(2):  # pyright: ignore
            c = (block + half) * BLOCK_C + tl.arange(0, BLOCK_C)
            # [BLOCK_H, BLOCK_C], [BLOCK_C, BLOCK_T]
            rows = load_block(rows_ptrs + c[None, :], h < H, c < C)
            x = load_block(x_ptrs + c[:, None], c < C, t < length)
            acc = _add_product(acc, rows, x, PRECISION)
    offsets = (start + t)[None, :] * H + h[:, None]
    if weights_ptr is not None:
        centre = tl.load(centre_ptr + pid_b * H + h, mask=h < H, other=0.0)
        acc = (acc - centre[:, None]) * load_block(weights_ptr + offsets, h < H, t < length)
    tl.store(scores_ptr + offsets, acc, mask=(h < H)[:, None] & (t < length)[None, :])


@triton.jit
def _add_weighted(acc, weights_ptr, rows, t, mask_t, h, H: tl.constexpr, P: tl.constexpr):
    """acc + the rows weighted for tokens t, `[BLOCK_T, BLOCK_C]`."""
    weights = load_block(weights_ptr + t[:, None] * H + h[None, :], mask_t, h < H)
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
    num_blocks = tl.cdiv(C, BLOCK_C)
    pid_c, pid_s, pid_b, start, length = span_of_program(cu_seqlens_ptr, num_spans, num_blocks)
    if pid_s * SPAN >= length:
        return
    offs_t = tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    shared = tl.load(shared_ptr + pid_b * C + c, mask=c < C, other=0.0) / length
    table = (pid_b * H + h[:, None]) * C + c[None, :]  # [BLOCK_H, BLOCK_C]
    if rows_ptr is not None:
        rows = load_block(rows_ptr + table, h < H, c < C)
    if rows2_ptr is not None:
        rows2 = load_block(rows2_ptr + table, h < H, c < C)
    end = min(pid_s * SPAN + SPAN, length)
    # one stage: weights that stop over in shared memory would be split or rounded by every warp
    for first in tl.range(pid_s * SPAN, end, BLOCK_T, num_stages=1):  # pyright: ignore
        mask_t = offs_t < length - first
        t = start + first + offs_t
        acc = tl.zeros([BLOCK_T, BLOCK_C], shared_ptr.dtype.element_ty) + shared[None, :]
        if rows_ptr is not None:
            acc = _add_weighted(acc, weights_ptr, rows, t, mask_t, h, H, PRECISION)
        if rows2_ptr is not None:
            acc = _add_weighted(acc, weights2_ptr, rows2, t, mask_t, h, H, PRECISION)
        out_ptrs = out_ptr + t[:, None] * stride_ot + c[None, :]
        mask = mask_t[:, None] & (c < C)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


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


def _row_block(num_rows: int) -> int:
    # tl.dot takes blocks of at least 16
    return max(16, next_power_of_2(num_rows))


def _channel_block(num_channels: int, itemsize: int, num_bytes: int) -> int:
    """Channels a block: `num_bytes` of a token, or as many as there are."""
    return max(16, min(num_bytes // itemsize, next_power_of_2(num_channels)))


def _cut(x: Tensor, max_seqlen: int, num_bytes: int = 256) -> tuple[int, int, int, int]:
    """`BLOCK_C` and blocks, `SPAN` and spans: few partial sums, but enough programs."""
    num_tokens, num_channels = x.shape
    block_c = _channel_block(num_channels, x.element_size(), num_bytes)
    num_blocks = ceil_div(num_channels, block_c)
    share = ceil_div(num_tokens * num_blocks, PROGRAMS)
    span = min(max(next_power_of_2(share), 64), 1024)
    return block_c, num_blocks, span, max(ceil_div(max_seqlen, span), 1)


def _combined(spans: Tensor, cu_seqlens: Tensor, span: int, num_spans: int) -> Tensor:
    """`[slots, ...]` to `[B, ...]`: the sums over the spans of each sequence."""
    num_sequences = cu_seqlens.shape[0] - 1
    out = spans.new_empty(num_sequences, *spans.shape[1:])
    width = math.prod(spans.shape[1:])
    grid = (num_sequences * ceil_div(width, 128),)
    launch(
        combine_spans_kernel,
        grid,
        (spans, cu_seqlens, out, width),
        {"SPAN": span, "BLOCK_S": min(next_power_of_2(num_spans), 32), "BLOCK_N": 128},
        num_warps=4,
    )
    return out


def sequence_totals(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, mean: bool = False) -> Tensor:
    """As `Backend.sequence_totals`."""
    x = with_channels_adjacent(x)
    (T, C), B = x.shape, cu_seqlens.shape[0] - 1
    block_c, num_blocks, span, num_spans = _cut(x, max_seqlen)
    num_slots = B if num_spans == 1 else T // span + B
    sums = x.new_empty(num_slots, C, dtype=accumulation_dtype(x.dtype))
    launch(
        sequence_totals_kernel,
        (B * num_spans * num_blocks,),
        (x, cu_seqlens, sums, x.stride(0), C, num_spans),
        {"SPAN": span, "BLOCK_T": 32, "BLOCK_C": block_c, "IS_MEAN": mean},
        num_warps=4,
    )
    return sums if num_spans == 1 else _combined(sums, cu_seqlens, span, num_spans)


def token_scores(
    x: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """As `Backend.token_scores`."""
    x, rows = with_channels_adjacent(x), rows.contiguous()
    (T, C), (B, H, _) = x.shape, rows.shape
    block_t = min(max(next_power_of_2(max_seqlen), 16), 128)
    num_tiles = ceil_div(max_seqlen, block_t)
    scores = rows.new_empty(T, H)
    weights = None if weights is None else weights.contiguous()
    centre = None if centre is None else centre.contiguous()
    launch(
        token_scores_kernel,
        (B * num_tiles,),
        (x, rows, cu_seqlens, weights, centre, scores, x.stride(0), C, num_tiles),
        {
            "H": H,
            "BLOCK_H": _row_block(H),
            "BLOCK_T": block_t,
            "BLOCK_C": _channel_block(C, x.element_size(), 64),
            "PRECISION": _precision(x.dtype),
        },
        num_warps=4,
        # four programs on a multiprocessor; told so, the compiler spills nothing
        max_registers=None if x.dtype == torch.float64 else 128,
    )
    return scores


def sequence_sums(weights: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """As `Backend.sequence_sums`."""
    weights, x = weights.contiguous(), with_channels_adjacent(x)
    (T, C), H, B = x.shape, weights.shape[1], cu_seqlens.shape[0] - 1
    block_c, num_blocks, span, num_spans = _cut(x, max_seqlen)
    sums = weights.new_empty(B if num_spans == 1 else T // span + B, H, C)
    launch(
        sequence_sums_kernel,
        (B * num_spans * num_blocks,),
        (weights, x, cu_seqlens, sums, x.stride(0), C, num_spans),
        {
            "H": H,
            "SPAN": span,
            "BLOCK_H": _row_block(H),
            "BLOCK_T": 32,
            "BLOCK_C": block_c,
            "PRECISION": _precision(x.dtype),
        },
        num_warps=4,
        # left alone, the compiler spills some to make room for more warps
        max_registers=168 if x.dtype == torch.float64 else None,
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
    tables = [table.contiguous() for pair in pairs for table in pair]
    tables += [None] * (4 - len(tables))
    shared = shared.contiguous()
    H = pairs[0][1].shape[1] if pairs else 1
    # 64 channels in half precision: with 128 one program fills a multiprocessor's registers
    num_bytes = 128 if out.element_size() == 2 else 256
    block_c, num_blocks, span, num_spans = _cut(out, max_seqlen, num_bytes)
    launch(
        spread_rows_kernel,
        ((cu_seqlens.shape[0] - 1) * num_spans * num_blocks,),
        (shared, *tables, cu_seqlens, out, out.stride(0), out.shape[1], num_spans),
        {
            "H": H,
            "SPAN": span,
            "BLOCK_H": _row_block(H),
            "BLOCK_T": 64,
            "BLOCK_C": block_c,
            "PRECISION": _precision(shared.dtype, out.dtype),
        },
        num_warps=8,
        max_registers=168 if shared.dtype == torch.float64 else 128,
    )
