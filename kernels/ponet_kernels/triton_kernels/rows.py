"""What the kernels over rows `[T, C]` share: loads, comparisons and block sizes.

Every lane moves 16 bytes of a row at a time, so that a warp of 32 lanes moves `LINE_BYTES`. What
belongs to a whole row (ids, marks, flags) stays one-dimensional until it meets channels: Triton 3.6
loads a block `[BLOCK_T, 1]` once for every channel that a lane holds.
"""

import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.triton_kernels.launch import ceil_div, next_power_of_2

LINE_BYTES = 512
"""Bytes of 32 lanes that load 16 bytes each."""
TILE_BYTES = 8192
"""Bytes of one operand in a tile of an element-wise kernel: 16 lines, two a warp."""
TILE_PROGRAMS = 512
"""Fewer tiles than this leave multiprocessors of an H200 idle: tiles get smaller."""


@triton.jit
def widen(x):
    """x in the type that sums and comparisons run in."""
    # one return, because a kernel's function has one type
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def replaces(later, earlier):
    """Whether a maximum moves on from `earlier` to `later`: equals stay, the first NaN stays."""
    return ~(later <= earlier) & (earlier == earlier)


@triton.jit
def tile_of_program(C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows `[BLOCK_T]` and channels `[BLOCK_C]`; tiles of the same rows are neighbours."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    rows = (pid // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return rows, (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def span_of_program(cu_seqlens_ptr, num_spans, num_blocks):
    """Block of channels, span and sequence of a program; first token and length of the sequence."""
    pid = tl.program_id(0)
    pid_s = (pid // num_blocks) % num_spans
    pid_b = (pid // num_blocks // num_spans).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    return pid % num_blocks, pid_s, pid_b, start, length


@triton.jit
def load_block(ptrs, mask_rows, mask_columns):
    """A block, zero where its row or its column lies outside."""
    return tl.load(ptrs, mask=mask_rows[:, None] & mask_columns[None, :], other=0.0)


@triton.jit
def load_rows(x_ptr, rows, stride, c, T, C):
    """Rows `[BLOCK_T]` and channels `[BLOCK_C]` of x `[T, C]`, zero outside."""
    ptrs = x_ptr + rows[:, None] * stride + c[None, :]
    return load_block(ptrs, (rows >= 0) & (rows < T), c < C)


@triton.jit
def store_rows(out_ptr, rows, stride, c, values, mask, C):
    """Store `[BLOCK_T, BLOCK_C]` to the rows of a `[T, C]` where `mask` `[BLOCK_T]`."""
    mask = mask[:, None] & (c < C)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * stride + c[None, :], values, mask=mask)


@triton.jit
def load_ids(ids_ptr, rows, T):
    """Ids of the rows `[BLOCK_T]` in 32 bits, -1 outside."""
    return tl.load(ids_ptr + rows, mask=(rows >= 0) & (rows < T), other=-1).to(tl.int32)


def with_channels_adjacent(x: Tensor) -> Tensor:
    """x `[T, C]` with channel stride 1: itself where possible, with whatever row stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def channel_block(num_channels: int, itemsize: int) -> int:
    """Channels of a block: a line or the row, whichever is shorter."""
    return min(LINE_BYTES // itemsize, next_power_of_2(max(num_channels, 1)))


def tiles(
    num_rows: int, num_channels: int, itemsize: int
) -> tuple[tuple[int], dict[str, int], int]:
    """Grid, constants and warps of an element-wise kernel: one program per tile."""
    block_c = channel_block(num_channels, itemsize)
    block_t = min(TILE_BYTES // (block_c * itemsize), 256)
    columns = ceil_div(num_channels, block_c)
    while block_t > 4 and ceil_div(num_rows, block_t) * columns < TILE_PROGRAMS:
        block_t //= 2
    num_warps = max(block_t * block_c * itemsize // LINE_BYTES, 1)
    grid = (ceil_div(num_rows, block_t) * columns,)
    return grid, {"BLOCK_T": block_t, "BLOCK_C": block_c}, num_warps
