"""Local max-pooling (LMP), PoNet section 3: max over a window of 3 tokens, stride 1, per channel.

Input and output `[T, C]`. The window never leaves the run of its token: runs end where a sequence
ends, where padding was taken out, and at special tokens that are kept apart. Equal maxima: the
gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels.dispatch import active_backend
from ponet_kernels.reference import local_max_ref

_WINDOW, _STRIDE, _PADDING = (3, 1), (1, 1), (1, 0)


def _as_image(x: Tensor) -> Tensor:
    # the channels-last view of [T, C]; PyTorch pools this layout without a copy
    return x.view(1, x.shape[0], 1, x.shape[1]).permute(0, 3, 1, 2)


def _as_stream(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1])


def _pool_run_ends(x: Tensor, cu_runs: Tensor, out: Tensor, winners: Tensor) -> None:
    """Redo the first and last token of each run, whose plain windows look into other runs."""
    bounds = cu_runs.long()
    starts, ends = bounds[:-1], bounds[1:] - 1
    starts, ends = starts[starts <= ends], ends[starts <= ends]
    rows = torch.cat([starts, ends])
    left = torch.cat([starts, torch.maximum(ends - 1, starts)])
    right = torch.cat([torch.minimum(starts + 1, ends), ends])
    left_values, right_values = x.index_select(0, left), x.index_select(0, right)
    right_wins = right_values > left_values
    out[rows] = torch.where(right_wins, right_values, left_values)
    winners[rows] = torch.where(right_wins, right.unsqueeze(1), left.unsqueeze(1))


class LocalMaxFunction(torch.autograd.Function):
    """PyTorch's pooling over the whole stream, with the few windows at run ends redone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_runs: Tensor) -> Tensor:
        x = x.contiguous()
        image, places = F.max_pool2d_with_indices(_as_image(x), _WINDOW, _STRIDE, _PADDING)
        out, winners = _as_stream(image), _as_stream(places)
        _pool_run_ends(x, cu_runs, out, winners)
        ctx.save_for_backward(x, winners)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, winners = ctx.saved_tensors
        image = torch.ops.aten.max_pool2d_with_indices_backward(
            _as_image(grad.contiguous()),
            _as_image(x),
            _WINDOW,
            _STRIDE,
            _PADDING,
            dilation=(1, 1),
            ceil_mode=False,
            indices=_as_image(winners),
        )
        return _as_stream(image), None


def local_max(x: Tensor, cu_runs: Tensor) -> Tensor:
    """Element-wise maximum over each token and its two neighbours in the same run.

    Args:
        x: `[T, C]`, floating.
        cu_runs: `[R + 1]`, int32, offsets of the runs into the tokens, ascending, from 0 to T.

    Returns:
        `[T, C]`, dtype of `x`.

    Raises:
        ValueError: `x` is not `[T, C]`.
    """
    if x.ndim != 2:
        raise ValueError(f"local_max: expected x [T, C], found {tuple(x.shape)}")
    if active_backend() == "reference":
        return local_max_ref(x, cu_runs)
    if not len(x):
        return x
    return LocalMaxFunction.apply(x, cu_runs)
