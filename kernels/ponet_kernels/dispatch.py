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
from collections.abc import Iterator, Sequence
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

    T tokens, C channels, S segments, B sequences, H rows per sequence. "acc" is float32 for
    half-precision input and the dtype of the input otherwise. Tensors may be non-contiguous.
    Offsets and ids partition the tokens; segments and sequences may be empty, T, S or B zero.
    """

    def segment_max_fwd(
        self,
        x: Tensor,
        cu_segments: Tensor,
        token_segments: Tensor,
        argmax_dtype: torch.dtype | None,
        has_empty: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Maxima `[S, C]` (-inf where empty), argmax: the first maximal tokens `[S, C]`.

        It counts from the first token of the segment; None when `argmax_dtype` is None. Without
        `has_empty` no segment is empty.
        """
        ...

    def segment_max_bwd(
        self,
        grad: Tensor,
        argmax: Tensor,
        cu_segments: Tensor,
        token_segments: Tensor,
        out: Tensor,
    ) -> None:
        """Write `out` `[T, C]`: `grad` `[S, C]` at the argmax, zero elsewhere."""
        ...

    def fusion_fwd(
        self,
        global_vectors: Tensor | None,
        maxima: Tensor | None,
        output: Tensor,
        local: Tensor | None,
        token_segments: Tensor,
        segment_sequences: Tensor,
        token_marks: Tensor,
    ) -> Tensor:
        """`[T, C]`, dtype of `output`: (g'_{b(t)} + S_{j(t)}) * O_t + L_t, None terms left out.

        L pools `local` over the local windows; S and L count as zero at `SPECIAL` tokens.
        """
        ...

    def fusion_bwd(
        self,
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
        """Gradients of global vectors `[B, C]` and maxima `[S, C]` in acc, None where those are.

        Writes the gradients of `output` and `local` `[T, C]`. The gradient of S is zero for the
        segments of `SPECIAL` tokens.
        """
        ...

    def sequence_means(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """`[B, C]` acc: mean over the tokens of each sequence, zero where empty."""
        ...

    def sequence_totals(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """`[B, C]` acc: sum over the tokens of each sequence."""
        ...

    def token_scores(self, x: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """`[T, H]` acc: rows_{b(t), h} . x_t; `rows` `[B, H, C]` acc."""
        ...

    def score_gradients(
        self,
        x: Tensor,
        rows: Tensor,
        weights: Tensor,
        centre: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """`[T, H]` acc: weights_{t, h} (rows_{b(t), h} . x_t - centre_{b(t), h}).

        `weights` `[T, H]`, `rows` `[B, H, C]`, `centre` `[B, H]`, all acc.
        """
        ...

    def sequence_softmax(self, scores: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """`[T, H]`: softmax of `scores` `[T, H]` over the tokens of each sequence."""
        ...

    def sequence_sums(
        self, weights: Tensor, x: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """`[B, H, C]` acc: sum over tokens of weights_{t, h} x_t; `weights` `[T, H]` acc."""
        ...

    def spread_rows(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        shared: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        out: Tensor,
    ) -> None:
        """Write `out` `[T, C]`: shared_{b(t)} / n_{b(t)} + sum of weights_{t, h} rows_{b(t), h}.

        The sum is over h and up to two pairs of weights `[T, H]` and rows `[B, H, C]`; `shared` is
        `[B, C]`, n the number of tokens of a sequence. All acc.
        """
        ...


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
    """Name of the backend that operators called now on tensors of `device` will use.

    Raises:
        ValueError: `PONET_KERNELS` names no backend.
    """
    chosen = _override.get() or os.environ.get("PONET_KERNELS")
    if chosen:
        return _check(chosen, "PONET_KERNELS")
    return "triton" if torch.device(device).type == "cuda" and _triton_is_installed() else "torch"


# under torch.compile the choice is made while tracing and stays with the compiled code; the mark is
# that of `torch.compiler.assume_constant_result`, which would import the whole compiler
active_backend._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def backend_named(name: str) -> Backend:
    """The functions of the backend "triton" or "torch", imported when first asked for.

    Raises:
        ModuleNotFoundError: "triton" is asked for and not installed.
    """
    module = "triton_kernels" if name == "triton" else "vectorised"
    return cast(Backend, importlib.import_module(f"ponet_kernels.{module}"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run a block of code with the backend `name`.

    Raises:
        ValueError: `name` is no backend.
    """
    token = _override.set(_check(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)
