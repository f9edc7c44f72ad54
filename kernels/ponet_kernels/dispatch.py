"""Which implementation of an operator answers: the one place that decides.

Backends:
    triton: the kernels of `ponet_kernels.triton_kernels`; the choice on a GPU. With
        `TRITON_INTERPRET=1` they run on a CPU too, slowly, for tests.
    torch: `ponet_kernels.vectorised`, PyTorch operations with hand-written backward passes; the
        choice on a CPU and where Triton is not installed. Needs no compiler.
    reference: the formulas of `ponet_kernels.reference`, one segment or sequence at a time, with
        PyTorch's own differentiation; slow, readable, the ground truth of the tests.

The environment variable `PONET_KERNELS` sets the backend of a process, `use_backend` that of a
block of code. A backward pass runs on the backend of its forward pass.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

BACKENDS = ("triton", "torch", "reference")

_override: ContextVar[str | None] = ContextVar("ponet_kernels_backend", default=None)
_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Arithmetic of the operators on plain tensors: no autograd, no validation, no autocast.

    T tokens, C channels, S segments, B sequences, H rows per sequence. Sums, scores, weights and
    rows come in "acc": float32 for half-precision input and the dtype of the input otherwise.
    Tensors may be non-contiguous. Offsets and ids partition the tokens; segments and sequences may
    be empty, T, S or B zero. Arguments are those of the implementations.
    """

    segment_max_fwd: Callable[..., tuple[Tensor, Tensor | None]]
    """Maxima `[S, C]`, -inf where empty, and argmax `[S, C]`, the first maximal tokens.

    It counts from the first token of the segment; None when `argmax_dtype` is None. Without
    `has_empty` no segment is empty.
    """
    segment_max_bwd: Callable[..., None]
    """Write `out` `[T, C]`: `grad` `[S, C]` at the argmax, zero elsewhere."""
    fusion_fwd: Callable[..., Tensor]
    """`[T, C]`, dtype of `output`: (g'_{b(t)} + S_{j(t)}) * O_t + L_t, None terms left out.

    L pools `local` over the local windows; S and L count as zero at `SPECIAL` tokens.
    """
    fusion_bwd: Callable[..., tuple[Tensor | None, Tensor | None]]
    """Gradients of global vectors `[B, C]` and maxima `[S, C]` in acc, None where those are.

    Writes the gradients of `output` and `local` `[T, C]`. The gradient of S is zero for the
    segments of `SPECIAL` tokens.
    """
    sequence_totals: Callable[..., Tensor]
    """`[B, C]`: sum over the tokens of each sequence, or their mean, zero where empty."""
    token_scores: Callable[..., Tensor]
    """`[T, H]`: rows_{b(t), h} . x_t; with weights, weights_{t, h} (rows . x_t - centre_{b(t), h}).

    `rows` `[B, H, C]`, `weights` `[T, H]`, `centre` `[B, H]`.
    """
    sequence_softmax: Callable[..., Tensor]
    """`[T, H]`: softmax of `scores` `[T, H]` over the tokens of each sequence."""
    sequence_sums: Callable[..., Tensor]
    """`[B, H, C]`: sum over the tokens of weights_{t, h} x_t."""
    spread_rows: Callable[..., None]
    """Write `out` `[T, C]`: shared_{b(t)} / n_{b(t)} + sum of weights_{t, h} rows_{b(t), h}.

    The sum is over h and up to two pairs of weights `[T, H]` and rows `[B, H, C]`; `shared` is
    `[B, C]`, n the number of tokens of a sequence.
    """


def _check(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {BACKENDS}")
    return name


@cache
def _triton_is_installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found and torch.cuda.is_available():
        _log.warning("triton is not installed: the PoNet operators run as PyTorch operations")
    return found


def active_backend(device: torch.device | str = "cpu") -> str:
    """Name of the backend that operators called now on tensors of `device` will use."""
    chosen = _override.get() or os.environ.get("PONET_KERNELS")
    if chosen:
        return _check(chosen, "PONET_KERNELS")
    return "triton" if torch.device(device).type == "cuda" and _triton_is_installed() else "torch"


# under torch.compile the choice is made while tracing and stays with the compiled code; the mark is
# that of `torch.compiler.assume_constant_result`, which would import the whole compiler
active_backend._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def backend_named(name: str) -> Backend:
    """The functions of the backend "triton" or "torch", imported when first asked for."""
    module = "triton_kernels" if name == "triton" else "vectorised"
    return cast(Backend, importlib.import_module(f"ponet_kernels.{module}"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run a block of code with the backend `name`."""
    token = _override.set(_check(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)
