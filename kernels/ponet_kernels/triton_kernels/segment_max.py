"""Segment max-pooling: S_j = max of x over the tokens of segment j, per channel.

PoNet (arXiv 2110.02442) section 3. Input `[T, C]`, output `[S, C]` with the argmax, the first
maximal token of each segment and channel, counted from the first token of the segment: the token
that the gradient goes to. A NaN counts as larger than any number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.triton_kernels.launch import launch
from ponet_kernels.triton_kernels.rows import (
    load_ids,
    replaces,
    store_rows,
    tile_of_program,
    tiles,
    widen,
    with_channels_adjacent,
)
from ponet_kernels.triton_kernels.segmented_reduce import (
    combine,
    cut_rows,
    fill_empty,
    is_any,
    load_step,
    load_step_ids,
    name_partials,
    new_partials,
    store_group,
    store_rest,
)

MIN_PROGRAMS = 2048
"""Programs of one warp that keep enough rows in flight on the 132 multiprocessors of an H200."""


@triton.jit
def segment_max_fwd_kernel(
    x_ptr,
    cu_segments_ptr,
    token_segments_ptr,
    out_ptr,
    argmax_ptr,
    partials_ptr,
    partial_ids_ptr,
    partial_argmax_ptr,
    T,
    C,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima and argmax of the segments inside `BLOCK_W` windows, partial ones of the others."""
    window, c = tile_of_program(C, BLOCK_W, BLOCK_C)
    first = window * ROWS  # [BLOCK_W]
    # rows up to the end of the stream, in 32 bits
    limit = tl.minimum(T - first, 2 * ROWS).to(tl.int32)
    before = load_ids(token_segments_ptr, first - 1, T)
    segment = load_step_ids(token_segments_ptr, first, 0, limit)
    begun = before != segment

    # the place of the first row of the window in its segment, then of later rows
    place = tl.load(cu_segments_ptr + segment, mask=segment >= 0, other=0)
    place = (first - place).to(tl.int32)
    argmax = tl.zeros([BLOCK_W, BLOCK_C], tl.int32) + place[:, None]
    best = widen(tl.full([BLOCK_W, BLOCK_C], float("-inf"), x_ptr.dtype.element_ty))
    # the compiler keeps the rows of the next steps in flight
    for start in tl.range(0, ROWS, 4, num_stages=3):  # pyright: ignore
        for offset in tl.static_range(4):  # pyright: ignore
            step = start + offset
            values = widen(load_step(x_ptr, first, step, x_stride, c, limit, C))
            segment1 = load_step_ids(token_segments_ptr, first, step + 1, limit)
            moves = replaces(values, best)
            best = tl.where(moves, values, best)
            if argmax_ptr is not None:
                argmax = tl.where(moves, place[:, None], argmax)
            place += 1
            ends = (segment >= 0) & (segment1 != segment)
            if is_any(ends):
                store_group(out_ptr, partials_ptr, best, ends, begun, segment, window, c, C)
                best = tl.where(ends[:, None], float("-inf"), best)
                if argmax_ptr is not None:
                    store_group(
                        argmax_ptr, partial_argmax_ptr, argmax, ends, begun, segment, window, c, C
                    )
                    argmax = tl.where(ends[:, None], 0, argmax)
                place = tl.where(ends, 0, place)
                begun = begun | ends
            segment = segment1
    goes_on = name_partials(
        partial_ids_ptr,
        window,
        begun,
        load_ids(token_segments_ptr, first - 1, T),
        load_step_ids(token_segments_ptr, first, 0, limit),
        load_step_ids(token_segments_ptr, first, ROWS - 1, limit),
        load_step_ids(token_segments_ptr, first, ROWS, limit),
    )
    store_rest(partials_ptr, best, goes_on, begun, window, c, C)
    if argmax_ptr is not None:
        store_rest(partial_argmax_ptr, argmax, goes_on, begun, window, c, C)


@triton.jit
def segment_max_bwd_kernel(
    grad_ptr,
    argmax_ptr,
    cu_segments_ptr,
    token_segments_ptr,
    dx_ptr,
    T,
    C,
    grad_stride,
    argmax_stride,
    dx_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of dx: the gradient of the segment where its place is this token."""
    t, c = tile_of_program(C, BLOCK_T, BLOCK_C)
    segment = load_ids(token_segments_ptr, t, T).to(tl.int64)
    place = (t - tl.load(cu_segments_ptr + segment, mask=t < T, other=0)).to(tl.int32)
    mask = (t < T)[:, None] & (c < C)[None, :]  # [BLOCK_T, BLOCK_C]
    argmax = segment[:, None] * argmax_stride + c[None, :]
    argmax = tl.load(argmax_ptr + argmax, mask=mask, other=0).to(tl.int32)
    grad = segment[:, None] * grad_stride + c[None, :]
    grad = widen(tl.load(grad_ptr + grad, mask=mask, other=0.0))
    dx = tl.where(argmax == place[:, None], grad, 0.0)
    store_rows(dx_ptr, t, dx_stride, c, dx, t < T, C)


def segment_max_fwd(
    x: Tensor,
    cu_segments: Tensor,
    token_segments: Tensor,
    argmax_dtype: torch.dtype | None,
    has_empty: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `Backend.segment_max_fwd`."""
    x = with_channels_adjacent(x)
    out = x.new_empty(cu_segments.shape[0] - 1, x.shape[1])
    grid, num_windows, constants = cut_rows(*x.shape, x.element_size(), MIN_PROGRAMS)
    partials, argmax, partial_argmax = new_partials(num_windows, out), None, None
    if argmax_dtype is not None:
        argmax = torch.empty_like(out, dtype=argmax_dtype)
        partial_argmax = torch.empty_like(partials[0], dtype=argmax_dtype)
    if has_empty:
        fill_empty(out, argmax, cu_segments, float("-inf"))
    results = (out, argmax, *partials, partial_argmax)
    operands = (x, cu_segments, token_segments, *results, *x.shape, x.stride(0))
    launch(segment_max_fwd_kernel, grid, operands, constants, num_warps=1)
    combine(*partials, partial_argmax, out, argmax, is_max=True)
    return out, argmax


def segment_max_bwd(
    grad: Tensor, argmax: Tensor, cu_segments: Tensor, token_segments: Tensor, out: Tensor
) -> None:
    """As `Backend.segment_max_bwd`."""
    grad, argmax = with_channels_adjacent(grad), with_channels_adjacent(argmax)
    T, C = out.shape
    grid, constants, num_warps = tiles(T, C, out.element_size())
    strides = (grad.stride(0), argmax.stride(0), out.stride(0))
    operands = (grad, argmax, cu_segments, token_segments, out, T, C, *strides)
    launch(segment_max_bwd_kernel, grid, operands, constants, num_warps)
