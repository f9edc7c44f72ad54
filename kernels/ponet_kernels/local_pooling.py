"""Local pooling over windows of any odd size; the published three-token maxima are faster fused.

    W(t) = the tokens u of the run of t with |u - t| <= window // 2
    L_t  = max or mean of x_u over u in W(t)                        L_t = 0 at special tokens

Input and output `[T, C]`. LMP of PoNet, section 3, has max and window 3. Equal maxima: the gradient
goes to the first maximal token. Windows are symmetric, so the backward pass walks over the same:

    max:   dx_u = sum of dL_t over the t in W(u) whose first maximal token is u
    mean:  dx_u = sum of dL_t / |W(t)| over the t in W(u)

PyTorch operations, for every device, in as many passes over the stream as the window has tokens.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend
from ponet_kernels.dtypes import accumulation_dtype, argmax_dtype
from ponet_kernels.layout import SEES_LEFT, SPECIAL, PackedLayout
from ponet_kernels.reference import local_pooling_ref
from ponet_kernels.registration import register
from ponet_kernels.vectorised.chunks import chunks


def _neighbours(token_marks: Tensor, window: int) -> Tensor:
    """`[W, T]` int64, the tokens of each window in ascending order; T where there is none."""
    num_tokens = token_marks.shape[0]
    runs = ((token_marks & SEES_LEFT) == 0).cumsum(0)
    first = torch.searchsorted(runs, runs)
    behind = torch.searchsorted(runs, runs, right=True)
    tokens = torch.arange(num_tokens, device=runs.device)
    tokens = tokens + (torch.arange(window, device=runs.device) - window // 2).unsqueeze(1)
    return torch.where((tokens >= first) & (tokens < behind), tokens, num_tokens)


def _padded(x: Tensor, value: float) -> Tensor:
    """`[T + 1, C]`: a row of `value` for neighbours that are absent."""
    return torch.cat([x, x.new_full((1, x.shape[1]), value)])


def _special(token_marks: Tensor) -> Tensor:
    return ((token_marks & SPECIAL) != 0).unsqueeze(1)


def _counts(neighbours: Tensor) -> Tensor:
    """`[T, 1]`, the tokens of each window."""
    return (neighbours < neighbours.shape[1]).sum(dim=0).unsqueeze(1)


def _compute(
    x: Tensor, token_marks: Tensor, window: int, average: bool, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    out, argmax = _shapes(x, token_marks, window, average, with_argmax)
    neighbours = _neighbours(token_marks, window)
    if average:
        _sum_windows(x, neighbours, out, _counts(neighbours))
    else:
        _max_windows(x, neighbours, out, argmax)
    return out.masked_fill_(_special(token_marks), 0.0), argmax


def _max_windows(x: Tensor, neighbours: Tensor, out: Tensor, argmax: Tensor) -> None:
    """Write maxima, and into an `argmax` `[T, C]` the place of each in its window."""
    padded = _padded(x, float("-inf"))
    for part in chunks(x):
        last = len(neighbours) - 1
        best = padded.index_select(0, neighbours[last, part])
        places = argmax[part].fill_(last) if argmax.ndim == 2 else None
        for place in reversed(range(last)):
            values = padded.index_select(0, neighbours[place, part])
            if places is not None:
                places.masked_fill_(values >= best, place)
            torch.maximum(best, values, out=best)
        out[part] = best


def _sum_windows(
    x: Tensor,
    neighbours: Tensor,
    out: Tensor,
    divisors: Tensor | None = None,
    argmax: Tensor | None = None,
) -> None:
    """Write sums over windows, divided; with `argmax`, of those tokens that the centre won."""
    padded = _padded(x, 0.0)
    places = None if argmax is None else _padded(argmax, 0)
    for part in chunks(x):
        total = torch.zeros_like(out[part], dtype=accumulation_dtype(out.dtype))
        # a token is the first of the window whose centre is the last of its own
        for place, tokens in enumerate(reversed(neighbours[:, part])):
            values = padded.index_select(0, tokens)
            if places is not None:
                values.masked_fill_(places.index_select(0, tokens) != place, 0.0)
            total += values
        out[part] = total if divisors is None else total.div_(divisors[part])


def _shapes(
    x: Tensor, token_marks: Tensor, window: int, average: bool, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    has_argmax = with_argmax and not average
    argmax = x.new_empty(x.shape if has_argmax else (0,), dtype=argmax_dtype(window))
    return x.new_empty(x.shape), argmax


def _compute_backward(
    grad: Tensor, argmax: Tensor, token_marks: Tensor, window: int, average: bool
) -> Tensor:
    out, neighbours = grad.new_empty(grad.shape), _neighbours(token_marks, window)
    grad = grad.masked_fill(_special(token_marks), 0.0)
    if average:
        shares = grad.to(accumulation_dtype(grad.dtype)).div_(_counts(neighbours))
        _sum_windows(shares, neighbours, out)
    else:
        _sum_windows(grad, neighbours, out, argmax=argmax)
    return out


def _backward_shapes(grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    _, token_marks, *ctx.settings, _ = inputs
    ctx.save_for_backward(outputs[1], token_marks)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 4


_backward = register("local_pooling_backward", _compute_backward, _backward_shapes)
_local_pooling = register("local_pooling", _compute, _shapes, _save, _differentiate)


def local_pooling(
    x: Tensor, layout: PackedLayout, window: int = 3, *, average: bool = False
) -> Tensor:
    """Pool the window around each token, `[T, C]`; zero at special tokens.

    Args:
        x: `[T, C]`, floating; the mean of half precision is taken in float32.
        window: tokens that a window spans, odd: it ends at the ends of runs, where it has fewer.
        average: the mean over the tokens that are there in place of their maximum.
    """
    if x.ndim != 2 or x.shape[0] != layout.num_tokens:
        raise ValueError(
            f"local_pooling: expected x [{layout.num_tokens}, C], found {tuple(x.shape)}"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"local_pooling: window must be odd and at least 1, found {window}")
    if active_backend(x.device) == "reference":
        return local_pooling_ref(x, layout.token_marks, window, average)
    with_argmax = not average and x.requires_grad and torch.is_grad_enabled()
    return _local_pooling(x, layout.token_marks, window, average, with_argmax)
