"""Reduction of consecutive rows with the same id in two levels: what segment sums and maxima share.

Rows `[T, C]` with ascending ids `[T]` reduce to one row an id (segments and sequences of PoNet,
arXiv 2110.02442, section 3). Groups have one row or all of them, so work is not cut along groups:

1. Rows are cut into windows of `ROWS` rows. A program walks `BLOCK_W` windows, one row of each at
   a step, with the running reductions in registers, and writes each group that ends to its output
   row. A group that crosses windows leaves one partial row in each: the *tail* of the window that
   it begins in and the *head* of every later one.
2. `combine_kernel` joins each tail with the heads that follow.

Partial rows are `[num_windows, 2, C]`, head before tail; `partial_ids` `[num_windows, 2]` names
their groups, -1 where there is none. Time depends little on the groups, and nothing is added
atomically: two runs agree bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.triton_kernels.launch import ceil_div, launch
from ponet_kernels.triton_kernels.rows import (
    LINE_BYTES,
    channel_block,
    load_block,
    replaces,
    store_rows,
    tile_of_program,
    tiles,
    widen,
)

WINDOW_ROWS = (64, 32, 16)
"""Rows of a window, the best first: a window costs up to two partial rows."""
COMBINE_WINDOWS = 16
"""Windows whose tails one program joins."""
COMBINE_PARTIALS = 64
"""Partial rows of a long group that are read at once, because steps wait for each other."""
COMBINE_CHANNELS = 128
"""Channels of a program that joins."""

_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def name_partials(partial_ids_ptr, window, begun, before, first, last, after):
    """Name the head and tail of the windows `[BLOCK_W]`.

    Args:
        begun: whether the last group of a window began in it.
        before, first, last, after: ids of the row before a window, of its first and last row and of
            the row after it, -1 outside.

    Returns:
        Whether the last group goes on after the window.
    """
    goes_on = (last >= 0) & (after == last)
    heads = tl.where(before == first, first, -1)
    tails = tl.where(goes_on & begun, last, -1)
    tl.store(partial_ids_ptr + 2 * window, heads, mask=first >= 0)
    tl.store(partial_ids_ptr + 2 * window + 1, tails, mask=first >= 0)
    return goes_on


@triton.jit
def load_step(x_ptr, first, step, stride, c, limit, C):
    """Row `step` of the windows that begin at rows `first` `[BLOCK_W]`, zero from `limit` on."""
    return load_block(x_ptr + (first + step)[:, None] * stride + c[None, :], step < limit, c < C)


@triton.jit
def load_step_ids(ids_ptr, first, step, limit):
    """Ids of these rows in 32 bits, -1 from `limit` on."""
    return tl.load(ids_ptr + first + step, mask=step < limit, other=-1).to(tl.int32)


@triton.jit
def is_any(flags):
    """Whether any flag is set, over the first dimension; of windows, a scalar to branch on."""
    return tl.max(flags.to(tl.int32), axis=0) > 0  # pyright: ignore


@triton.jit
def store_group(out_ptr, partials_ptr, values, ends, begun, group, window, c, C):
    """Store rows of groups that end here: output rows, or heads where a group began earlier."""
    store_rows(out_ptr, group, C, c, values, ends & begun, C)
    store_rows(partials_ptr, 2 * window, C, c, values, ends & ~begun, C)


@triton.jit
def store_rest(partials_ptr, values, goes_on, begun, window, c, C):
    """Store what a window has of the groups that go on after it."""
    store_rows(partials_ptr, 2 * window + begun.to(tl.int64), C, c, values, goes_on, C)


@triton.jit
def join(values, rows, later, later_rows, IS_MAX: tl.constexpr):
    """Two reductions of a group in one, `later` over later rows; maxima know their partial row."""
    if IS_MAX:
        moves = replaces(later, values)
        values = tl.where(moves, later, values)
        rows = tl.where(moves, later_rows, rows)
    else:
        values += later
    return values, rows


@triton.jit
def join_lines(values, rows, IS_MAX: tl.constexpr):
    """Reductions `[BLOCK_P, BLOCK_C]` of one group in one and the rows of maxima, `[BLOCK_C]`."""
    if IS_MAX:
        is_nan = values != values
        has_nan = is_any(is_nan)
        best = tl.max(tl.where(is_nan, float("-inf"), values), axis=0)
        winners = tl.where(has_nan[None, :], is_nan, values == best[None, :])  # pyright: ignore
        rows = tl.where(winners, rows, _NO_ROW)
        value = tl.where(has_nan, float("nan"), best)
    else:
        value = tl.sum(values, axis=0)
    return value, tl.min(rows, axis=0)


@triton.jit
def load_partials(partials_ptr, rows, mask, c, C, NEUTRAL: tl.constexpr):
    """Partial rows `[BLOCK]`, `NEUTRAL` where not `mask`."""
    offsets = rows.to(tl.int64)[:, None] * C + c[None, :]
    mask = mask[:, None] & (c < C)[None, :]
    return widen(tl.load(partials_ptr + offsets, mask=mask, other=NEUTRAL))


@triton.jit
def end_of_group(partial_ids_ptr, group, window, num_windows, BLOCK: tl.constexpr):
    """The window after the last head of a group that begins in `window`."""
    end = window + 1
    num_found = BLOCK
    while num_found == BLOCK:
        position = end + tl.arange(0, BLOCK)
        heads = tl.load(partial_ids_ptr + 2 * position, mask=position < num_windows, other=-1)
        num_found = tl.sum((heads == group).to(tl.int32), axis=0)
        end += num_found
    return end


@triton.jit
def join_long_group(
    partials_ptr,
    window,
    end,
    c,
    C,
    IS_MAX: tl.constexpr,
    NEUTRAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`join_lines` of a group that begins in `window`, `BLOCK_P` partial rows at a time."""
    values = widen(tl.full([BLOCK_P, BLOCK_C], NEUTRAL, partials_ptr.dtype.element_ty))
    tail = 2 * window + 1
    rows = tl.zeros([BLOCK_P, BLOCK_C], tl.int32) + tail
    for start in range(window, end, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        # the tail of the first window, the heads of the others
        later_rows = tl.maximum(2 * position, tail)
        later = load_partials(partials_ptr, later_rows, position < end, c, C, NEUTRAL)
        values, rows = join(values, rows, later, later_rows[:, None], IS_MAX)
    return join_lines(values, rows, IS_MAX)


@triton.jit
def combine_kernel(
    partials_ptr,
    partial_ids_ptr,
    partial_argmax_ptr,
    out_ptr,
    argmax_ptr,
    num_windows,
    C,
    IS_MAX: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output rows of the groups that begin in `BLOCK_W` windows and go on after them."""
    NEUTRAL: tl.constexpr = float("-inf") if IS_MAX else 0.0  # pyright: ignore
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    first_window = (pid // num_blocks) * BLOCK_W
    c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)

    # groups of one tail and one head, all at once
    window = first_window + tl.arange(0, BLOCK_W)
    ids = tl.load(partial_ids_ptr + 2 * window + 1, mask=window < num_windows, other=-1)
    ids_after = tl.load(partial_ids_ptr + 2 * window + 4, mask=window + 2 < num_windows, other=-1)
    is_short = (ids >= 0) & (ids_after != ids)
    tails = 2 * window + 1  # [BLOCK_W]
    values = load_partials(partials_ptr, tails, is_short, c, C, NEUTRAL)
    later = load_partials(partials_ptr, tails + 1, is_short, c, C, NEUTRAL)
    values, rows = join(values, tails[:, None], later, tails[:, None] + 1, IS_MAX)
    store_rows(out_ptr, ids, C, c, values, is_short, C)
    if argmax_ptr is not None:
        offsets = rows.to(tl.int64) * C + c[None, :]
        mask = is_short[:, None] & (c < C)[None, :]
        argmax = tl.load(partial_argmax_ptr + offsets, mask=mask, other=0)
        store_rows(argmax_ptr, ids, C, c, argmax, is_short, C)

    # longer groups, one after the other
    if is_any((ids >= 0) & (ids_after == ids)):
        for w in range(first_window, tl.minimum(first_window + BLOCK_W, num_windows - 2)):
            group = tl.load(partial_ids_ptr + 2 * w + 1)
            if (group >= 0) & (tl.load(partial_ids_ptr + 2 * w + 4) == group):
                end = end_of_group(partial_ids_ptr, group, w, num_windows, 1024)  # pyright: ignore
                value, row = join_long_group(
                    partials_ptr, w, end, c, C, IS_MAX, NEUTRAL, BLOCK_P, BLOCK_C
                )
                tl.store(out_ptr + group * C + c, value, mask=c < C)
                if argmax_ptr is not None:
                    place = tl.load(partial_argmax_ptr + row.to(tl.int64) * C + c, mask=c < C)
                    tl.store(argmax_ptr + group * C + c, place, mask=c < C)


@triton.jit
def fill_empty_kernel(
    out_ptr,
    argmax_ptr,
    cu_segments_ptr,
    S,
    C,
    FILL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of segments without tokens: `FILL`, argmax 0."""
    segment, c = tile_of_program(C, BLOCK_T, BLOCK_C)
    start = tl.load(cu_segments_ptr + segment, mask=segment < S, other=0)
    end = tl.load(cu_segments_ptr + segment + 1, mask=segment < S, other=1)
    is_empty = start == end
    fill = tl.full([BLOCK_T, BLOCK_C], FILL, out_ptr.dtype.element_ty)
    store_rows(out_ptr, segment, C, c, fill, is_empty, C)
    if argmax_ptr is not None:
        argmax = tl.zeros([BLOCK_T, BLOCK_C], argmax_ptr.dtype.element_ty)
        store_rows(argmax_ptr, segment, C, c, argmax, is_empty, C)


def cut_rows(
    num_rows: int, num_channels: int, itemsize: int, min_programs: int
) -> tuple[tuple[int], int, dict[str, int]]:
    """The longest windows that still give `min_programs` programs of one warp.

    Returns:
        Grid, number of windows, constants of the kernel.
    """
    block_c = channel_block(num_channels, itemsize)
    # half a line where rows are short: flags of several windows need registers, too
    block_w = min(max(LINE_BYTES // (2 * block_c * itemsize), 1), 32)
    columns = ceil_div(num_channels, block_c)
    rows = WINDOW_ROWS[-1]
    for longer in WINDOW_ROWS:
        if ceil_div(num_rows, longer * block_w) * columns >= min_programs:
            rows = longer
            break
    num_windows = ceil_div(num_rows, rows)
    constants = {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_C": block_c}
    return (ceil_div(num_windows, block_w) * columns,), num_windows, constants


def new_partials(num_windows: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the partial rows of `out` `[G, C]` and for their ids."""
    ids = out.new_empty(num_windows, 2, dtype=torch.int64)
    return out.new_empty(num_windows, 2, out.shape[1]), ids


def combine(
    partials: Tensor,
    partial_ids: Tensor,
    partial_argmax: Tensor | None,
    out: Tensor,
    argmax: Tensor | None,
    is_max: bool,
) -> None:
    """Write the rows of `out` `[G, C]`, and of its `argmax`, whose groups cross windows.

    Args:
        is_max: maxima, sums otherwise.
    """
    num_windows, _, num_channels = partials.shape
    if num_windows < 2:
        return
    columns = ceil_div(num_channels, COMBINE_CHANNELS)
    launch(
        combine_kernel,
        (ceil_div(num_windows, COMBINE_WINDOWS) * columns,),
        (partials, partial_ids, partial_argmax, out, argmax, num_windows, num_channels),
        {
            "IS_MAX": is_max,
            "BLOCK_W": COMBINE_WINDOWS,
            "BLOCK_P": COMBINE_PARTIALS,
            "BLOCK_C": COMBINE_CHANNELS,
        },
        # 32 values per lane, or 16 with the numbers of their rows
        num_warps=16 if is_max else 8,
        # left alone, the compiler spills one in float64
        max_registers=None if is_max or partials.element_size() < 8 else 168,
    )


def fill_empty(out: Tensor, argmax: Tensor | None, cu_segments: Tensor, fill: float) -> None:
    """Write `fill`, and argmax 0, to the rows of `out` `[S, C]` whose segments are empty."""
    grid, constants, num_warps = tiles(*out.shape, out.element_size())
    operands = (out, argmax, cu_segments, *out.shape)
    launch(fill_empty_kernel, grid, operands, {"FILL": fill, **constants}, num_warps)
