"""Which implementation of an operator answers: the one place that decides.

Backends:
    torch: vectorised PyTorch with hand-written backward passes; fast on CPU, runs on any device.
    reference: the formulas of `ponet_kernels.reference`, one segment or sequence at a time, with
        PyTorch's own differentiation; slow, readable, the ground truth of the tests.

The environment variable `PONET_KERNELS` sets the backend of a process, `use_backend` that of a
block of code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("torch", "reference")

_override: ContextVar[str | None] = ContextVar("ponet_kernels_backend", default=None)


def _check(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {BACKENDS}")
    return name


def active_backend() -> str:
    """Name of the backend that operators called now will use.

    Raises:
        ValueError: `PONET_KERNELS` names no backend.
    """
    return _override.get() or _check(os.environ.get("PONET_KERNELS", "torch"), "PONET_KERNELS")


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
