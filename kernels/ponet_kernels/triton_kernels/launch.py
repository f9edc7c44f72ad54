"""One door for every kernel launch, so that launches can be listed without a device.

`record_launches` makes `launch` note kernel, arguments and options instead of running anything.
Host functions called inside it with tensors of PyTorch's "meta" device yield exactly the launches
that real tensors of that shape and dtype would get: `ponet_kernels.compile_report` compiles them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and what it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    """`tl.constexpr` arguments by name."""
    num_warps: int


_recorder: ContextVar[list[Launch] | None] = ContextVar("ponet_kernels_launches", default=None)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of a block of code instead of running them."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any
) -> None:
    """Run `kernel` on `grid`; a grid without programs is no launch.

    Args:
        args: tensors, sizes and strides in the kernel's order.
        num_warps: warps (of 32 or 64 threads) a program.
        constants: its `tl.constexpr` arguments.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is None:
        kernel[grid](*args, num_warps=num_warps, **constants)
    else:
        recorder.append(Launch(kernel, grid, args, constants, num_warps))
