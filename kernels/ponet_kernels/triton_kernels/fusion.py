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
    store_rows,
    tile_blocks,
    tile_grid,
    widen,
    with_channels_adjacent,
)
from ponet_kernels.triton_kernels.segmented_reduce import (
    Partials,
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
from ponet_kernels.triton_kernels.windows import load_marks, window_max, window_winners

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
def load_sequences(segment_sequences_ptr, segments):
    """Sequences of the segments `[BLOCK]` in 32 bits, -1 for segment -1."""
    return tl.load(segment_sequences_ptr + segments, mask=segments >= 0, other=-1).to(tl.int32)


@triton.jit
def load_factor(
    global_ptr, segment_ptr, sequence, segment, special, global_stride, segment_stride, offs_c, C
):
    """g' + S of rows in these sequences and segments `[BLOCK]`; S = 0 where `special`."""
    mask_c = (offs_c < C)[None, :]
    factor = tl.zeros([1, 1], tl.float32)
    if segment_ptr is not None:
        offsets = segment.to(tl.int64)[:, None] * segment_stride + offs_c[None, :]
        mask = ((segment >= 0) & ~special)[:, None] & mask_c
        factor += widen(tl.load(segment_ptr + offsets, mask=mask, other=0.0))
    if global_ptr is not None:
        offsets = sequence.to(tl.int64)[:, None] * global_stride + offs_c[None, :]
        mask = (sequence >= 0)[:, None] & mask_c
        factor += widen(tl.load(global_ptr + offsets, mask=mask, other=0.0))
    return factor


@triton.jit
def fusion_fwd_kernel(
    global_ptr,
    segment_ptr,
    output_ptr,
    local_ptr,
    token_segments_ptr,
    segment_sequences_ptr,
    marks_ptr,
    out_ptr,
    T,
    C,
    global_stride,
    segment_stride,
    output_stride,
    local_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of the fused output."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    t = (pid // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    marks = load_marks(marks_ptr, t, T)
    special = (marks & _SPECIAL) != 0

    out = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if global_ptr is not None or segment_ptr is not None:
        segment = load_ids(token_segments_ptr, t, T)
        sequence = load_sequences(segment_sequences_ptr, segment)
        factor = load_factor(
            global_ptr,
            segment_ptr,
            sequence,
            segment,
            special,
            global_stride,
            segment_stride,
            offs_c,
            C,
        )
        out = factor * widen(load_rows(output_ptr, t, output_stride, offs_c, T, C))
    if local_ptr is not None:
        left = widen(load_rows(local_ptr, t - 1, local_stride, offs_c, T, C))
        centre = widen(load_rows(local_ptr, t, local_stride, offs_c, T, C))
        right = widen(load_rows(local_ptr, t + 1, local_stride, offs_c, T, C))
        out += tl.where(special[:, None], 0.0, window_max(left, centre, right, marks))
    store_rows(out_ptr, t, C, offs_c, out, t < T, C)


@triton.jit
def share_gradient(kept, passed, grad, left, centre, right, sees_left, sees_right):
    """`send_gradients` without the store: gradients of rows t-1, `kept` and `passed`."""
    left_wins, right_wins = window_winners(left, centre, right, sees_left, sees_right)
    complete = kept + tl.where(left_wins, grad, 0.0)
    kept = passed + tl.where(left_wins | right_wins, 0.0, grad)
    return complete, kept, tl.where(right_wins, grad, 0.0)


@triton.jit
def send_gradients(
    kept, passed, grad, left, centre, right, marks, dlocal_ptr, t, stride, is_complete, offs_c, C
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
        grad = tl.where(((marks & _SPECIAL) != 0)[:, None], 0.0, grad)
        sees_left = ((marks & _SEES_LEFT) != 0)[:, None]
        sees_right = ((marks & _SEES_RIGHT) != 0)[:, None]
        complete, kept, passed = share_gradient(
            kept, passed, grad, left, centre, right, sees_left, sees_right
        )
    else:
        complete, kept, passed = share_gradient(kept, passed, grad, left, centre, right, True, True)
    store_rows(dlocal_ptr, t - 1, stride, offs_c, complete, is_complete, C)
    return kept, passed


@triton.jit
def fusion_bwd_kernel(
    grad_ptr,
    global_ptr,
    segment_ptr,
    output_ptr,
    local_ptr,
    token_segments_ptr,
    segment_sequences_ptr,
    marks_ptr,
    dglobal_ptr,
    global_partials_ptr,
    global_partial_ids_ptr,
    dsegment_ptr,
    segment_partials_ptr,
    segment_partial_ids_ptr,
    doutput_ptr,
    dlocal_ptr,
    T,
    C,
    grad_stride,
    global_stride,
    segment_stride,
    output_stride,
    local_stride,
    doutput_stride,
    dlocal_stride,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of dO and dl in `BLOCK_W` windows; sums of the groups inside, partial sums of others."""
    HAS_FACTOR: tl.constexpr = (
        global_ptr is not None or segment_ptr is not None  # pyright: ignore
    )
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    window = (pid // num_blocks).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = window * ROWS  # [BLOCK_W]
    # rows up to the end of the stream, in 32 bits
    limit = tl.minimum(T - first, 2 * ROWS).to(tl.int32)

    before = load_ids(token_segments_ptr, first - 1, T)
    segment = load_step_ids(token_segments_ptr, first, 0, limit)
    segment_begun = before != segment
    sequence = load_sequences(segment_sequences_ptr, segment)
    sequence_begun = load_sequences(segment_sequences_ptr, before) != sequence

    marks = load_marks(marks_ptr, first, T)
    zeros = widen(tl.zeros([BLOCK_W, BLOCK_C], doutput_ptr.dtype.element_ty))
    sums = zeros
    sequence_sums = zeros
    factor = zeros
    kept = zeros
    passed = zeros
    left = zeros
    centre = zeros
    if HAS_FACTOR:
        factor = load_factor(
            global_ptr,
            segment_ptr,
            sequence,
            segment,
            (marks & _SPECIAL) != 0,
            global_stride,
            segment_stride,
            offs_c,
            C,
        )
    if dlocal_ptr is not None:
        left = load_rows(local_ptr, first - 2, local_stride, offs_c, T, C)
        centre = load_rows(local_ptr, first - 1, local_stride, offs_c, T, C)
        right = load_step(local_ptr, first, 0, local_stride, offs_c, limit, C)
        kept, passed = send_gradients(
            zeros,
            zeros,
            load_rows(grad_ptr, first - 1, grad_stride, offs_c, T, C),
            left,
            centre,
            right,
            load_marks(marks_ptr, first - 1, T),
            dlocal_ptr,
            first - 1,
            dlocal_stride,
            first < 0,
            offs_c,
            C,
        )
        left = centre
        centre = right

    # the compiler keeps the rows of the next steps in flight
    for start in tl.range(0, ROWS, 2, num_stages=3):  # pyright: ignore
        # two rows, because a loop that hands a row on twice is not pipelined
        for offset in tl.static_range(2):  # pyright: ignore
            step = tl.zeros([BLOCK_W], tl.int32) + start + offset
            grad = load_step(grad_ptr, first, step, grad_stride, offs_c, limit, C)
            segment1 = load_step_ids(token_segments_ptr, first, step + 1, limit)
            doutput = widen(grad) * factor
            store_rows(doutput_ptr, first + step, doutput_stride, offs_c, doutput, step < limit, C)
            marks1 = tl.load(marks_ptr + first + step + 1, mask=step + 1 < limit, other=0)
            if dlocal_ptr is not None:
                right = load_step(local_ptr, first, step + 1, local_stride, offs_c, limit, C)
                kept, passed = send_gradients(
                    kept,
                    passed,
                    grad,
                    left,
                    centre,
                    right,
                    marks,
                    dlocal_ptr,
                    first + step,
                    dlocal_stride,
                    (step > 0) & (step <= limit),
                    offs_c,
                    C,
                )
                left = centre
                centre = right
            if HAS_FACTOR:
                output = load_step(output_ptr, first, step, output_stride, offs_c, limit, C)
                sums += widen(grad) * widen(output)
                ends = (segment >= 0) & (segment1 != segment)
                if is_any(ends):
                    if segment_ptr is not None:
                        # a special token is a segment of its own
                        store_group(
                            dsegment_ptr,
                            segment_partials_ptr,
                            tl.where(((marks & _SPECIAL) != 0)[:, None], 0.0, sums),
                            ends,
                            segment_begun,
                            segment,
                            window,
                            offs_c,
                            C,
                        )
                        segment_begun = segment_begun | ends
                    sequence1 = load_sequences(segment_sequences_ptr, segment1)
                    if global_ptr is not None:
                        sequence_sums += tl.where(ends[:, None], sums, 0.0)
                        sequence_ends = ends & (sequence1 != sequence)
                        store_group(
                            dglobal_ptr,
                            global_partials_ptr,
                            sequence_sums,
                            sequence_ends,
                            sequence_begun,
                            sequence,
                            window,
                            offs_c,
                            C,
                        )
                        sequence_sums = tl.where(sequence_ends[:, None], 0.0, sequence_sums)
                        sequence_begun = sequence_begun | sequence_ends
                        sequence = tl.where(ends, sequence1, sequence)
                    sums = tl.where(ends[:, None], 0.0, sums)
                    next_factor = load_factor(
                        global_ptr,
                        segment_ptr,
                        sequence1,
                        segment1,
                        (marks1 & _SPECIAL) != 0,
                        global_stride,
                        segment_stride,
                        offs_c,
                        C,
                    )
                    factor = tl.where(ends[:, None], next_factor, factor)
            segment = segment1
            marks = marks1

    if dlocal_ptr is not None:
        send_gradients(
            kept,
            passed,
            load_step(grad_ptr, first, ROWS, grad_stride, offs_c, limit, C),
            left,
            centre,
            load_step(local_ptr, first, ROWS + 1, local_stride, offs_c, limit, C),
            marks,
            dlocal_ptr,
            first + ROWS,
            dlocal_stride,
            first + ROWS <= T,
            offs_c,
            C,
        )
    # loaded again, because registers are short in the loop
    before = load_ids(token_segments_ptr, first - 1, T)
    segment = load_ids(token_segments_ptr, first, T)
    last = load_ids(token_segments_ptr, first + ROWS - 1, T)
    after = load_ids(token_segments_ptr, first + ROWS, T)
    if segment_ptr is not None:
        goes_on = name_partials(
            segment_partial_ids_ptr, window, segment_begun, before, segment, last, after
        )
        store_rest(segment_partials_ptr, sums, goes_on, segment_begun, window, offs_c, C)
    if global_ptr is not None:
        goes_on = name_partials(
            global_partial_ids_ptr,
            window,
            sequence_begun,
            load_sequences(segment_sequences_ptr, before),
            load_sequences(segment_sequences_ptr, segment),
            load_sequences(segment_sequences_ptr, last),
            load_sequences(segment_sequences_ptr, after),
        )
        sequence_sums += sums
        store_rest(global_partials_ptr, sequence_sums, goes_on, sequence_begun, window, offs_c, C)


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x with channel stride 1, and its row stride."""
    if x is None:
        return None, 0
    x = with_channels_adjacent(x)
    return x, x.stride(0)


def _pointers(partials: Partials | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if partials is None else (partials.values, partials.ids)


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
    num_tokens, num_channels = output.shape
    global_vectors, global_stride = _rows(global_vectors)
    maxima, segment_stride = _rows(maxima)
    local, local_stride = _rows(local)
    output = with_channels_adjacent(output)
    out = torch.empty_like(output, memory_format=torch.contiguous_format)
    block_t, block_c, num_warps = tile_blocks(num_tokens, num_channels, output.element_size())
    launch(
        fusion_fwd_kernel,
        tile_grid(num_tokens, num_channels, block_t, block_c),
        global_vectors,
        maxima,
        output,
        local,
        token_segments,
        segment_sequences,
        token_marks,
        out,
        num_tokens,
        num_channels,
        global_stride,
        segment_stride,
        output.stride(0),
        local_stride,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
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
    num_tokens, num_channels = output.shape
    acc_dtype = accumulation_dtype(output.dtype)
    windows = cut_rows(num_tokens, num_channels, output.element_size(), MIN_PROGRAMS)
    grad, output = with_channels_adjacent(grad), with_channels_adjacent(output)
    global_vectors, global_stride = _rows(global_vectors)
    maxima, segment_stride = _rows(maxima)
    local, local_stride = _rows(local)
    dglobal, global_partials = None, None
    if global_vectors is not None:
        # the segments do not tell which sequences are empty
        dglobal = output.new_zeros(global_vectors.shape, dtype=acc_dtype)
        global_partials = new_partials(windows, dglobal)
    dsegment, segment_partials = None, None
    if maxima is not None:
        dsegment = output.new_empty(maxima.shape, dtype=acc_dtype)
        if has_empty:
            fill_empty(dsegment, None, cu_segments, 0.0)
        segment_partials = new_partials(windows, dsegment)
    launch(
        fusion_bwd_kernel,
        windows.grid,
        grad,
        global_vectors,
        maxima,
        output,
        local,
        token_segments,
        segment_sequences,
        token_marks,
        dglobal,
        *_pointers(global_partials),
        dsegment,
        *_pointers(segment_partials),
        grad_output,
        grad_local,
        num_tokens,
        num_channels,
        grad.stride(0),
        global_stride,
        segment_stride,
        output.stride(0),
        local_stride,
        grad_output.stride(0),
        0 if grad_local is None else grad_local.stride(0),
        ROWS=windows.rows,
        BLOCK_W=windows.block_w,
        BLOCK_C=windows.block_c,
        num_warps=1,
        max_registers=MAX_REGISTERS[output.element_size()],
    )
    if dglobal is not None and global_partials is not None:
        combine(global_partials, dglobal, None, is_max=False)
    if dsegment is not None and segment_partials is not None:
        combine(segment_partials, dsegment, None, is_max=False)
    return dglobal, dsegment
