"""A batch on its way to the device: all its tensors in one block of memory, moved by one copy."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ponet.packing import BatchLayout

_LAYOUT = "layout."
# kernels load 16 bytes at a time from addresses that they divide
_ALIGNMENT = 16


class HostBatch:
    """Named tensors and the layout of the stream that they describe, made on the host.

    Pinned, its copy to a GPU waits for nothing and nothing waits for it. A `DataLoader` with
    `pin_memory=True` pins it, and its workers send it as one tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: BatchLayout) -> None:
        """Copy tensors of the CPU into a block."""
        parts = layout.tensors()
        # on a device they could not be looked at without a wait
        known = replace(layout, host_lengths=layout.lengths)
        self._layout = known.with_tensors(dict.fromkeys(parts, torch.empty(0)))
        named = {**tensors, **{_LAYOUT + name: tensor for name, tensor in parts.items()}}
        self._places: dict[str, tuple[torch.dtype, torch.Size, int]] = {}
        size = 0
        for name, tensor in named.items():
            self._places[name] = (tensor.dtype, tensor.shape, size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._block = torch.empty(size, dtype=torch.uint8)
        for name, view in self._views(self._block).items():
            view.copy_(named[name])

    def _views(self, block: Tensor) -> dict[str, Tensor]:
        views = {}
        for name, (dtype, shape, start) in self._places.items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = block[start : start + size].view(dtype).view(shape)
        return views

    def pin_memory(self) -> Self:
        """Move the block to page-locked memory."""
        self._block = self._block.pin_memory()
        return self

    def to(self, device: torch.device) -> dict[str, Any]:
        """The tensors on a device by name, and `layout`; on the CPU as they are, without a copy."""
        block = self._block
        if device.type != "cpu":
            pinned = block if block.is_pinned() else block.pin_memory()
            block = pinned.to(device, non_blocking=True)
        views = self._views(block)
        parts = {name: views.pop(_LAYOUT + name) for name in self._layout.tensors()}
        return {**views, "layout": self._layout.with_tensors(parts)}
