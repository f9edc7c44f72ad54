"""Pooling fusion: out_t = (g'_{b(t)} + S_{j(t)}) * O_t + L_t, terms that are None left out.

PoNet (arXiv 2110.02442) section 3. g' `[B, C]`, S `[S, C]`, O `[T, C]`, output `[T, C]`; L is
pooled here from the values l `[T, C]` over local windows. Special tokens have S = L = 0.

Backward is one pass over the tokens:

    dO_t  = dout_t * (g' + S)               dl_t: dout of each window whose first maximum is l_t
    dS_j  = sum of dout_t * O_t over segment j          dg'_b = the same over sequence b

with the two sums as `segmented_reduce` describes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.dtypes import accumulation_dtype
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL
from ponet_kernels.triton_kernels.launch import launch
from ponet_kernels.triton_kernels.rows import (
    load_ids,
    load_rows,
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

MIN_PROGRAMS = 4096
"""Programs of the backward pass: it needs more registers, so fewer of them run at a time."""

MAX_REGISTERS = {2: 168, 4: 128, 8: 168}
"""Of a thread of the backward pass on Hopper, by the bytes of an element: 12, 16 and 12 warps on a
multiprocessor. Left alone, Triton 3.6 takes 209 in half precision, which leaves 9 warps, and spills
two registers in float32 to have 20."""

_SEES_LEFT = tl.constexpr(SEES_LEFT)
_SEES_RIGHT = tl.constexpr(SEES_RIGHT)
_SPECIAL = tl.constexpr(SPECIAL)
_ORDINARY = tl.constexpr(SEES_LEFT | SEES_RIGHT)


@triton.jit
def load_marks(marks_ptr, rows, T):
    """Marks of the rows `[BLOCK]`; a row outside sees nobody."""
    return tl.load(marks_ptr + rows, mask=(rows >= 0) & (rows < T), other=0)


@triton.jit
def has(marks, mark):
    """Whether the rows `[BLOCK]` have the mark, `[BLOCK, 1]`."""
    return ((marks & mark) != 0)[:, None]


@triton.jit
def window_winners(left, centre, right, sees_left, sees_right):
    """Whether the left token is the first maximal one of a window, whether the right one is."""
    left_wins = sees_left & ~replaces(centre, left)
    best = tl.where(left_wins, left, centre)
    right_wins = sees_right & replaces(right, best)
    return left_wins & ~right_wins, right_wins


@triton.jit
def load_sequences(segment_sequences_ptr, segments):
    """Sequences of the segments `[BLOCK]` in 32 bits, -1 for segment -1."""
    return tl.load(segment_sequences_ptr + segments, mask=segments >= 0, other=-1).to(tl.int32)


@triton.jit
def load_factor(g_ptr, s_ptr, sequence, segment, marks, g_stride, s_stride, c, C):
    """g' + S of rows in these sequences and segments `[BLOCK]`; S = 0 where marked as special."""
    mask_c = (c < C)[None, :]
    factor = tl.zeros([1, 1], tl.float32)
    if s_ptr is not None:
        offsets = segment.to(tl.int64)[:, None] * s_stride + c[None, :]
        mask = ((segment >= 0) & ((marks & _SPECIAL) == 0))[:, None] & mask_c
        factor += widen(tl.load(s_ptr + offsets, mask=mask, other=0.0))
    if g_ptr is not None:
        offsets = sequence.to(tl.int64)[:, None] * g_stride + c[None, :]
        mask = (sequence >= 0)[:, None] & mask_c
        factor += widen(tl.load(g_ptr + offsets, mask=mask, other=0.0))
    return factor


@triton.jit
def fusion_fwd_kernel(
    g_ptr,
    s_ptr,
    o_ptr,
    l_ptr,
    token_segments_ptr,
    segment_sequences_ptr,
    marks_ptr,
    out_ptr,
    T,
    C,
    g_stride,
    s_stride,
    o_stride,
    l_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of the fused output."""
    t, c = tile_of_program(C, BLOCK_T, BLOCK_C)
    marks = load_marks(marks_ptr, t, T)
    out = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if g_ptr is not None or s_ptr is not None:
        segment = load_ids(token_segments_ptr, t, T)
        sequence = load_sequences(segment_sequences_ptr, segment)
        factor = load_factor(g_ptr, s_ptr, sequence, segment, marks, g_stride, s_stride, c, C)
        out = factor * widen(load_rows(o_ptr, t, o_stride, c, T, C))
    if l_ptr is not None:
        left = widen(load_rows(l_ptr, t - 1, l_stride, c, T, C))
        centre = widen(load_rows(l_ptr, t, l_stride, c, T, C))
        right = widen(load_rows(l_ptr, t + 1, l_stride, c, T, C))
        left_wins, right_wins = window_winners(
            left, centre, right, has(marks, _SEES_LEFT), has(marks, _SEES_RIGHT)
        )
        pooled = tl.where(right_wins, right, tl.where(left_wins, left, centre))
        out += tl.where(has(marks, _SPECIAL), 0.0, pooled)
    store_rows(out_ptr, t, C, c, out, t < T, C)


@triton.jit
def share_gradient(kept, passed, grad, left, centre, right, sees_left, sees_right):
    """`send_gradients` without the store: gradients of rows t-1, `kept` and `passed`."""
    left_wins, right_wins = window_winners(left, centre, right, sees_left, sees_right)
    complete = kept + tl.where(left_wins, grad, 0.0)
    kept = passed + tl.where(left_wins | right_wins, 0.0, grad)
    return complete, kept, tl.where(right_wins, grad, 0.0)


@triton.jit
def send_gradients(
    kept, passed, grad, left, centre, right, marks, dl_ptr, t, stride, is_complete, c, C
):
    """Give the gradients of the windows of t `[BLOCK_W]` to their winners.

    After that rows t-1 have all their gradients; they are stored where `is_complete`.

    Args:
        kept: what rows t-1 have so far.
        passed: what rows t have from the windows of t-1.

    Returns:
        `kept` and `passed` of the next rows.
    """
    grad, left, centre, right = widen(grad), widen(left), widen(centre), widen(right)
    # few rows end a run, the others do without marks
    if is_any(marks != _ORDINARY):
        grad = tl.where(has(marks, _SPECIAL), 0.0, grad)
        sees_left = has(marks, _SEES_LEFT)
        sees_right = has(marks, _SEES_RIGHT)
        complete, kept, passed = share_gradient(
            kept, passed, grad, left, centre, right, sees_left, sees_right
        )
    else:
        complete, kept, passed = share_gradient(kept, passed, grad, left, centre, right, True, True)
    store_rows(dl_ptr, t - 1, stride, c, complete, is_complete, C)
    return kept, passed


@triton.jit
def fusion_bwd_kernel(
    grad_ptr,
    g_ptr,
    s_ptr,
    o_ptr,
    l_ptr,
    token_segments_ptr,
    segment_sequences_ptr,
    marks_ptr,
    dg_ptr,
    g_partials_ptr,
    g_partial_ids_ptr,
    ds_ptr,
    s_partials_ptr,
    s_partial_ids_ptr,
    do_ptr,
    dl_ptr,
    T,
    C,
    grad_stride,
    g_stride,
    s_stride,
    o_stride,
    l_stride,
    do_stride,
    dl_stride,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of dO and dl in `BLOCK_W` windows; sums of the groups inside, partial sums of others."""
    HAS_FACTOR: tl.constexpr = g_ptr is not None or s_ptr is not None  # pyright: ignore
    window, c = tile_of_program(C, BLOCK_W, BLOCK_C)
    first = window * ROWS  # [BLOCK_W]
    # rows up to the end of the stream, in 32 bits
    limit = tl.minimum(T - first, 2 * ROWS).to(tl.int32)

    before = load_ids(token_segments_ptr, first - 1, T)
    segment = load_step_ids(token_segments_ptr, first, 0, limit)
    s_begun = before != segment
    sequence = load_sequences(segment_sequences_ptr, segment)
    g_begun = load_sequences(segment_sequences_ptr, before) != sequence

    marks = load_marks(marks_ptr, first, T)
    zero = widen(tl.zeros([BLOCK_W, BLOCK_C], do_ptr.dtype.element_ty))
    sums = zero
    g_sums = zero
    factor = zero
    kept = zero
    passed = zero
    left = zero
    centre = zero
    if HAS_FACTOR:
        factor = load_factor(g_ptr, s_ptr, sequence, segment, marks, g_stride, s_stride, c, C)
    if dl_ptr is not None:
        t0 = first - 1
        grad0 = load_rows(grad_ptr, t0, grad_stride, c, T, C)
        left = load_rows(l_ptr, t0 - 1, l_stride, c, T, C)
        centre = load_rows(l_ptr, t0, l_stride, c, T, C)
        right = load_step(l_ptr, first, 0, l_stride, c, limit, C)
        marks0 = load_marks(marks_ptr, t0, T)
        kept, passed = send_gradients(
            zero, zero, grad0, left, centre, right, marks0, dl_ptr, t0, dl_stride, first < 0, c, C
        )
        left = centre
        centre = right

    # the compiler keeps the rows of the next steps in flight
    for start in tl.range(0, ROWS, 2, num_stages=3):  # pyright: ignore
        # two rows, because a loop that hands a row on twice is not pipelined
        for offset in tl.static_range(2):  # pyright: ignore
            step = tl.zeros([BLOCK_W], tl.int32) + start + offset
            t = first + step
            grad = load_step(grad_ptr, first, step, grad_stride, c, limit, C)
            segment1 = load_step_ids(token_segments_ptr, first, step + 1, limit)
            doutput = widen(grad) * factor
            store_rows(do_ptr, t, do_stride, c, doutput, step < limit, C)
            marks1 = tl.load(marks_ptr + first + step + 1, mask=step + 1 < limit, other=0)
            if dl_ptr is not None:
                right = load_step(l_ptr, first, step + 1, l_stride, c, limit, C)
                done = (step > 0) & (step <= limit)
                kept, passed = send_gradients(
                    kept, passed, grad, left, centre, right, marks, dl_ptr, t, dl_stride, done, c, C
                )
                left = centre
                centre = right
            if HAS_FACTOR:
                output = load_step(o_ptr, first, step, o_stride, c, limit, C)
                sums += widen(grad) * widen(output)
                ends = (segment >= 0) & (segment1 != segment)
                if is_any(ends):
                    if s_ptr is not None:
                        # a special token is a segment of its own
                        total = tl.where(has(marks, _SPECIAL), 0.0, sums)
                        store_group(
                            ds_ptr, s_partials_ptr, total, ends, s_begun, segment, window, c, C
                        )
                        s_begun = s_begun | ends
                    sequence1 = load_sequences(segment_sequences_ptr, segment1)
                    if g_ptr is not None:
                        g_sums += tl.where(ends[:, None], sums, 0.0)
                        g_ends = ends & (sequence1 != sequence)
                        store_group(
                            dg_ptr, g_partials_ptr, g_sums, g_ends, g_begun, sequence, window, c, C
                        )
                        g_sums = tl.where(g_ends[:, None], 0.0, g_sums)
                        g_begun = g_begun | g_ends
                        sequence = tl.where(ends, sequence1, sequence)
                    sums = tl.where(ends[:, None], 0.0, sums)
                    next_factor = load_factor(
                        g_ptr, s_ptr, sequence1, segment1, marks1, g_stride, s_stride, c, C
                    )
                    factor = tl.where(ends[:, None], next_factor, factor)
            segment = segment1
            marks = marks1

    if dl_ptr is not None:
        t = first + ROWS
        grad = load_step(grad_ptr, first, ROWS, grad_stride, c, limit, C)
        right = load_step(l_ptr, first, ROWS + 1, l_stride, c, limit, C)
        send_gradients(
            kept, passed, grad, left, centre, right, marks, dl_ptr, t, dl_stride, t <= T, c, C
        )
    # loaded again, because registers are short in the loop
    before = load_ids(token_segments_ptr, first - 1, T)
    segment = load_ids(token_segments_ptr, first, T)
    last = load_ids(token_segments_ptr, first + ROWS - 1, T)
    after = load_ids(token_segments_ptr, first + ROWS, T)
    if s_ptr is not None:
        goes_on = name_partials(s_partial_ids_ptr, window, s_begun, before, segment, last, after)
        store_rest(s_partials_ptr, sums, goes_on, s_begun, window, c, C)
    if g_ptr is not None:
        goes_on = name_partials(
            g_partial_ids_ptr,
            window,
            g_begun,
            load_sequences(segment_sequences_ptr, before),
            load_sequences(segment_sequences_ptr, segment),
            load_sequences(segment_sequences_ptr, last),
            load_sequences(segment_sequences_ptr, after),
        )
        g_sums += sums
        store_rest(g_partials_ptr, g_sums, goes_on, g_begun, window, c, C)


def _rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """The tensors with channel stride 1, and their row strides."""
    rows, strides = [], []
    for x in tensors:
        x = None if x is None else with_channels_adjacent(x)
        rows.append(x)
        strides.append(0 if x is None else x.stride(0))
    return rows, strides


def fusion_fwd(
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
) -> Tensor:
    """As `Backend.fusion_fwd`."""
    T, C = output.shape
    values, strides = _rows(global_vectors, maxima, output, local)
    out = torch.empty_like(output, memory_format=torch.contiguous_format)
    grid, constants, num_warps = tiles(T, C, output.element_size())
    tables = (token_segments, segment_sequences, token_marks)
    operands = (*values, *tables, out, T, C, *strides)
    launch(fusion_fwd_kernel, grid, operands, constants, num_warps)
    return out


def fusion_bwd(
    grad: Tensor,
    global_vectors: Tensor | None,
    maxima: Tensor | None,
    output: Tensor,
    local: Tensor | None,
    cu_segments: Tensor,
    token_segments: Tensor,
    segment_sequences: Tensor,
    token_marks: Tensor,
    grad_output: Tensor,
    grad_local: Tensor | None,
    has_empty: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `Backend.fusion_bwd`."""
    itemsize, acc = output.element_size(), accumulation_dtype(output.dtype)
    grid, num_windows, constants = cut_rows(*output.shape, itemsize, MIN_PROGRAMS)
    values, strides = _rows(grad, global_vectors, maxima, output, local)
    dg, g_partials = None, (None, None)
    if global_vectors is not None:
        # the segments do not tell which sequences are empty
        dg = output.new_zeros(global_vectors.shape, dtype=acc)
        g_partials = new_partials(num_windows, dg)
    ds, s_partials = None, (None, None)
    if maxima is not None:
        ds = output.new_empty(maxima.shape, dtype=acc)
        if has_empty:
            fill_empty(ds, None, cu_segments, 0.0)
        s_partials = new_partials(num_windows, ds)
    tables = (token_segments, segment_sequences, token_marks)
    results = (dg, *g_partials, ds, *s_partials, grad_output, grad_local)
    strides += [grad_output.stride(0), 0 if grad_local is None else grad_local.stride(0)]
    operands = (*values, *tables, *results, *output.shape, *strides)
    launch(fusion_bwd_kernel, grid, operands, constants, 1, MAX_REGISTERS[itemsize])
    if dg is not None:
        combine(*g_partials, None, dg, None, is_max=False)
    if ds is not None:
        combine(*s_partials, None, ds, None, is_max=False)
    return dg, ds
