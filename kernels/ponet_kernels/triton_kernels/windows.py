"""Local windows: which of a token and its two neighbours is the first maximal one.

PoNet (arXiv 2110.02442) section 3, L_t = max of l over t-1, t, t+1 as far as the marks of t see. A
NaN counts as larger than any number.
"""

import triton
import triton.language as tl

from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT
from ponet_kernels.triton_kernels.rows import replaces

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
def window_max(left, centre, right, marks):
    """Maxima of the windows whose owners have `marks` `[BLOCK_T]`."""
    sees_left = ((marks & _SEES_LEFT) != 0)[:, None]
    sees_right = ((marks & _SEES_RIGHT) != 0)[:, None]
    left_wins, right_wins = window_winners(left, centre, right, sees_left, sees_right)
    return tl.where(right_wins, right, tl.where(left_wins, left, centre))
