"""Local max-pooling: L_t = max of x over t-1, t, t+1 as far as the marks of t see, per channel.

PoNet (arXiv 2110.02442) section 3. Input and output `[T, C]`, marks `[T]`. Backward finds the
winners again from x: the first maximal token of each window takes the gradient, a NaN counts as
larger than any number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ponet_kernels.marks import SEES_LEFT, SEES_RIGHT
from ponet_kernels.triton_kernels.launch import launch
from ponet_kernels.triton_kernels.rows import (
    load_rows,
    replaces,
    store_rows,
    tile_blocks,
    tile_grid,
    widen,
    with_channels_adjacent,
)

_SEES_LEFT = tl.constexpr(SEES_LEFT)
_SEES_RIGHT = tl.constexpr(SEES_RIGHT)


@triton.jit
def load_marks(marks_ptr, rows, T):
    """Marks of the rows `[BLOCK_T]`; a row outside sees nobody."""
    return tl.load(marks_ptr + rows, mask=(rows >= 0) & (rows < T), other=0)


@triton.jit
def window_winners(left, centre, right, sees_left, sees_right):
    """Whether the left token is the first maximal one of a window, whether the right one is."""
    left_wins = sees_left & ~replaces(centre, left)
    best = tl.where(left_wins, left, centre)
    right_wins = sees_right & replaces(right, best)
    return left_wins & ~right_wins, right_wins


@triton.jit
def marked_winners(left, centre, right, marks):
    """`window_winners` where the owners of the windows have `marks` `[BLOCK_T]`."""
    sees_left = ((marks & _SEES_LEFT) != 0)[:, None]
    sees_right = ((marks & _SEES_RIGHT) != 0)[:, None]
    return window_winners(left, centre, right, sees_left, sees_right)


@triton.jit
def window_max(left, centre, right, marks):
    """Maxima of the windows whose owners have `marks` `[BLOCK_T]`."""
    left_wins, right_wins = marked_winners(left, centre, right, marks)
    return tl.where(right_wins, right, tl.where(left_wins, left, centre))


@triton.jit
def local_max_fwd_kernel(
    x_ptr,
    marks_ptr,
    out_ptr,
    T,
    C,
    x_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of L."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    t = (pid // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    left = widen(load_rows(x_ptr, t - 1, x_stride, offs_c, T, C))  # [BLOCK_T, BLOCK_C]
    centre = widen(load_rows(x_ptr, t, x_stride, offs_c, T, C))
    right = widen(load_rows(x_ptr, t + 1, x_stride, offs_c, T, C))
    out = window_max(left, centre, right, load_marks(marks_ptr, t, T))
    store_rows(out_ptr, t, offs_c, out, t < T, C)


@triton.jit
def local_max_bwd_kernel(
    grad_ptr,
    x_ptr,
    marks_ptr,
    dx_ptr,
    T,
    C,
    grad_stride,
    x_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of dx: what the windows of t-1, t and t+1 send to t."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(C, BLOCK_C)
    t = (pid // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_left2 = widen(load_rows(x_ptr, t - 2, x_stride, offs_c, T, C))  # [BLOCK_T, BLOCK_C]
    x_left = widen(load_rows(x_ptr, t - 1, x_stride, offs_c, T, C))
    x = widen(load_rows(x_ptr, t, x_stride, offs_c, T, C))
    x_right = widen(load_rows(x_ptr, t + 1, x_stride, offs_c, T, C))
    x_right2 = widen(load_rows(x_ptr, t + 2, x_stride, offs_c, T, C))
    _, from_left = marked_winners(x_left2, x_left, x, load_marks(marks_ptr, t - 1, T))
    lost_left, lost_right = marked_winners(x_left, x, x_right, load_marks(marks_ptr, t, T))
    from_right, _ = marked_winners(x, x_right, x_right2, load_marks(marks_ptr, t + 1, T))
    left = widen(load_rows(grad_ptr, t - 1, grad_stride, offs_c, T, C))
    centre = widen(load_rows(grad_ptr, t, grad_stride, offs_c, T, C))
    right = widen(load_rows(grad_ptr, t + 1, grad_stride, offs_c, T, C))
    dx = tl.where(from_left, left, 0.0) + tl.where(lost_left | lost_right, 0.0, centre)
    dx += tl.where(from_right, right, 0.0)
    store_rows(dx_ptr, t, offs_c, dx, t < T, C)


def local_max_fwd(x: Tensor, token_marks: Tensor) -> Tensor:
    """As `Backend.local_max_fwd`."""
    num_tokens, num_channels = x.shape
    x = with_channels_adjacent(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_t, block_c, num_warps = tile_blocks(num_tokens, num_channels, x.element_size())
    launch(
        local_max_fwd_kernel,
        tile_grid(num_tokens, num_channels, block_t, block_c),
        x,
        token_marks,
        out,
        num_tokens,
        num_channels,
        x.stride(0),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return out


def local_max_bwd(grad: Tensor, x: Tensor, token_marks: Tensor) -> Tensor:
    """As `Backend.local_max_bwd`."""
    num_tokens, num_channels = x.shape
    grad, x = with_channels_adjacent(grad), with_channels_adjacent(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_t, block_c, num_warps = tile_blocks(num_tokens, num_channels, x.element_size())
    launch(
        local_max_bwd_kernel,
        tile_grid(num_tokens, num_channels, block_t, block_c),
        grad,
        x,
        token_marks,
        dx,
        num_tokens,
        num_channels,
        grad.stride(0),
        x.stride(0),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return dx
