"""One door for every kernel launch, so that launches can be listed without a device.

`record_launches` makes `launch` note kernel, arguments and options instead of running anything.
Host functions called inside it with tensors of PyTorch's "meta" device yield exactly the launches
that real tensors of that shape and dtype would get: `ponet_kernels.compile_report` compiles them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel, its grid and what it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: Sequence[Any]
    constants: dict[str, Any]
    """`tl.constexpr` arguments by name."""
    num_warps: int
    max_registers: int | None
    """Of a thread on Hopper; see `register_limit`."""


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
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    constants: dict[str, Any],
    num_warps: int,
    max_registers: int | None = None,
) -> None:
    """Run `kernel` on `grid` on the device of its tensors; no programs are no launch.

    Args:
        args: tensors, sizes and strides in the kernel's order.
        constants: its `tl.constexpr` arguments.
        max_registers: of a thread on Hopper, where the compiler would take so many that few warps
            fit, or so few that it spills.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Launch(kernel, grid, args, constants, num_warps, max_registers))
        return
    options = {"num_warps": num_warps}
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type != "cuda":
        kernel[grid](*args, **constants, **options)
        return
    limit = None if max_registers is None else _limit_on(device, max_registers)
    if limit is not None:
        options["maxnreg"] = limit
    # Triton launches on the current device, whatever its arguments lie on
    if device.index == torch.cuda.current_device():
        kernel[grid](*args, **constants, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)


def register_limit(max_registers: int, capability: int | None) -> int | None:
    """The limit told to the compiler for a GPU of this capability, such as 90; None for AMD's."""
    if capability is None:
        return None
    # before Hopper the same code needs some more
    return max_registers if capability >= 90 else max_registers + 16


@cache
def _limit_on(device: torch.device, max_registers: int) -> int | None:
    major, minor = torch.cuda.get_device_capability(device)
    return register_limit(max_registers, None if torch.version.hip else 10 * major + minor)


def ceil_div(number: int, divisor: int) -> int:
    """Quotient of positive numbers, rounded up; `triton.cdiv` takes microseconds on the host."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The power of two that is at least `number`, a positive one."""
    return 1 << (number - 1).bit_length()
