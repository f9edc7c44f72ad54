"""Local max-pooling (LMP), PoNet section 3: max over a window of 3 tokens, stride 1, per channel.

Input and output `[T, C]`. The window never leaves the run of its token: runs end where a sequence
ends, where padding was taken out, and at special tokens that are kept apart. Equal maxima: the
gradient goes to the first maximal token.
"""

from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import active_backend, backend_named
from ponet_kernels.marks import token_marks
from ponet_kernels.reference import local_max_ref


@torch.library.custom_op("ponet::local_max", mutates_args=())
def _local_max(x: Tensor, marks: Tensor, backend: str) -> Tensor:
    return backend_named(backend).local_max_fwd(x, marks)


@_local_max.register_fake
def _(x: Tensor, marks: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ponet::local_max_backward", mutates_args=())
def _local_max_backward(grad: Tensor, x: Tensor, marks: Tensor, backend: str) -> Tensor:
    return backend_named(backend).local_max_bwd(grad, x, marks)


@_local_max_backward.register_fake
def _(grad: Tensor, x: Tensor, marks: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, marks, ctx.backend = inputs
    ctx.save_for_backward(x, marks)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    grad_x = torch.ops.ponet.local_max_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, None, None


_local_max.register_autograd(_differentiate, setup_context=_save)


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
    backend = active_backend(x.device)
    if backend == "reference":
        return local_max_ref(x, cu_runs)
    return torch.ops.ponet.local_max(x, token_marks(cu_runs, x.shape[0]), backend)
