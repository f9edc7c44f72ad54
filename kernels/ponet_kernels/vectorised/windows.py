"""Local windows as maxima of shifted rows; see `ponet_kernels.fused_pooling`.

A token that does not see its left or right neighbour is put right after the plain shift: there are
few of them, two a run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL


@dataclass(frozen=True)
class Edges:
    """Tokens that lack a neighbour, places in the stream."""

    no_left: Tensor
    """`[X]` int64."""
    no_right: Tensor
    """`[X]` int64."""
    special: Tensor
    """`[X]` int64."""

    @classmethod
    def of(cls, token_marks: Tensor) -> "Edges":
        """Read them off the marks."""
        return cls(
            *(
                places.nonzero().squeeze(1)
                for places in (
                    (token_marks & SEES_LEFT) == 0,
                    (token_marks & SEES_RIGHT) == 0,
                    (token_marks & SPECIAL) != 0,
                )
            )
        )


def _left_maxima(x: Tensor, edges: Edges) -> Tensor:
    """Maximum of each token and the one before, where it sees it."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[:1] = x[:1]
    torch.maximum(x[:-1], x[1:], out=out[1:])
    out[edges.no_left] = x[edges.no_left]
    return out


def window_maxima(x: Tensor, edges: Edges) -> Tensor:
    """`[T, C]`: maximum over each token and the neighbours that it sees."""
    out = _left_maxima(x, edges)
    apart = out[edges.no_right]
    torch.maximum(out[:-1], x[1:], out=out[:-1])
    out[edges.no_right] = apart
    return out


def window_gradients(grad: Tensor, x: Tensor, edges: Edges) -> Tensor:
    """`[T, C]`: the gradient of each window goes to its first maximal token."""
    # comparisons are written as 1.0 and 0.0, because products with bool tensors are converted
    # first and cost ten times as much on CPU
    right = _left_maxima(x, edges)
    torch.gt(x[1:], right[:-1], out=right[:-1])
    right[-1:] = 0
    right[edges.no_right] = 0
    to_right = right.mul_(grad)
    rest = grad - to_right
    centre = torch.empty_like(rest)
    torch.gt(x[1:], x[:-1], out=centre[1:])
    centre[:1] = 1
    centre[edges.no_left] = 1
    total = centre.mul_(rest)
    to_left = rest.sub_(total)
    total[1:].add_(to_right[:-1])
    total[:-1].add_(to_left[1:])
    return total


def part_gradients(grad: Tensor, x: Tensor, token_marks: Tensor, part: slice) -> Tensor:
    """`window_gradients` of the tokens `part` of a stream, as a view.

    A token gets the gradients of three windows, which reach two tokens to each side of it.
    """
    wide = slice(max(part.start - 2, 0), min(part.stop + 2, len(x)))
    gradients = window_gradients(grad[wide], x[wide], Edges.of(token_marks[wide]))
    return gradients[part.start - wide.start : part.stop - wide.start]
