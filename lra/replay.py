"""Work on a device that is recorded once and then started by one call, as a CUDA graph."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

# the first calls choose algorithms and allocate what a graph must find in place
_WARM_UP = 3


class Replay:
    """A function that reads and writes tensors which stay where they are, of fixed shapes.

    On a GPU its first call records it, and every call replays the record; elsewhere it is called.
    Random numbers follow from the seed that PyTorch's generator has at each call, as they would
    without a record: before a replay PyTorch hands the generator's seed and offset to the graph.
    """

    def __init__(
        self,
        work: Callable[[], Tensor],
        device: torch.device,
        keep: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        """Take the function.

        Args:
            work: its result is a tensor that the next call overwrites.
            device: where it works; the current one, if a GPU.
            keep: notes what `work` changes, and returns what undoes the changes; None: nothing.
        """
        self._work = work
        self._device = device
        self._keep = keep
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """Do the work once."""
        if self._device.type != "cuda":
            return self._work()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return cast(Tensor, self._result)

    def _record(self) -> torch.cuda.CUDAGraph:
        undo = None if self._keep is None else self._keep()
        # not on the default stream, which capture does not allow either
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if undo is not None:
            undo()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._work()
        return graph
