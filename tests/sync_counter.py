"""Which operations of a block of code would make the host wait for a GPU; no GPU is needed to tell.

    with as_on_a_gpu() as found:
        step(0)
    assert found == []

Operators of `torch.ops.ponet` are looked into. Only `tolist()` and what the dispatcher sees count:
not the inside of PyTorch's own kernels, and not `numpy()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ponet import PoNetModel
from ponet_kernels import use_backend
from ponet_kernels.triton_kernels.launch import record_launches

_ALWAYS = {
    # item, float(x), bool(x); an answer with a bool of Python
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    # the size of the result depends on values
    *("nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    # no wait, but a prefix sum in int64 over the expanded mask
    *("masked_scatter", "masked_scatter_"),
    # torch.tensor and new_tensor, on a GPU a blocking copy of memory that is not pinned;
    # x[i] = 1.0 counts too, although it is none: write x[i].fill_(1.0)
    "lift_fresh",
}
# a boolean index is turned into places by nonzero
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_MASKS = (torch.bool, torch.uint8)


class _Counter(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "ponet":
            # the implementation itself, under this mode
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        if what := _what_waits(func, args, kwargs):
            self._found.append(what)
        return func(*args, **kwargs)


def _what_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    name = func.overloadpacket.__name__
    if name in _INDEXING and any(x is not None and x.dtype in _MASKS for x in args[1]):
        return f"{name} with a mask"
    # without output_size it reads the sum of the repeats
    sums = name == "repeat_interleave" and kwargs.get("output_size") is None
    return name if sums or name in _ALWAYS or _is_blocking_copy(name, args, kwargs) else None


def _is_blocking_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from one kind of device to another and blocks."""
    if name == "_to_copy":
        ends = args[0].device, kwargs.get("device") or args[0].device
    elif name == "copy_" and isinstance(args[1], Tensor):
        ends = args[1].device, args[0].device
    else:
        return False
    non_blocking = kwargs.get("non_blocking", args[2:] == (True,))
    return not non_blocking and ends[0].type != torch.device(ends[1]).type


@contextmanager
def count_synchronising() -> Iterator[list[str]]:
    """Collect, in order, the names of operations that would wait; see the module."""
    found: list[str] = []
    plain = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        # what the host does by itself is done without modes
        if torch._C._len_torch_dispatch_stack():
            found.append("tolist")
        return plain(tensor)

    with patch.object(Tensor, "tolist", tolist), _Counter(found):
        yield found


@contextmanager
def as_on_a_gpu() -> Iterator[list[str]]:
    """The same with the kernels' operators, without their kernels or a CPU's look at ids."""
    spared = patch.object(PoNetModel, "_check_ids")
    with spared, use_backend("triton"), record_launches(), count_synchronising() as found:
        yield found
