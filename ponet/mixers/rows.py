"""From a packed stream to the rectangle `[B, N, C]` that some mixers are defined on, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ponet.packing import PackedLayout


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A rectangle with one row a sequence, as long as the longest, real tokens first."""

    num_rows: int
    """B."""
    length: int
    """N."""
    mask: Tensor | None
    """`[B, N]` bool, true at real tokens; None where all are real."""

    @classmethod
    def of(cls, layout: PackedLayout) -> "Rows":
        """Shape of a layout; a batch of one length needs no mask and moves no token."""
        num_rows = layout.cu_seqlens.shape[0] - 1
        length = layout.max_seqlen
        if layout.token_segments.shape[0] == num_rows * length:
            return cls(num_rows=num_rows, length=length, mask=None)
        columns = torch.arange(length, device=layout.cu_seqlens.device)
        mask = columns < layout.cu_seqlens.diff().unsqueeze(1)
        return cls(num_rows=num_rows, length=length, mask=mask)

    def from_stream(self, stream: Tensor) -> Tensor:
        """`[T, C]` -> `[B, N, C]`, zero at padding."""
        if self.mask is None:
            return stream.unflatten(0, (self.num_rows, self.length))
        rows = stream.new_zeros(*self.mask.shape, stream.shape[1])
        return rows.masked_scatter(self.mask.unsqueeze(-1), stream)

    def to_stream(self, rows: Tensor) -> Tensor:
        """`[B, N, C]` -> `[T, C]`."""
        return rows.flatten(0, 1) if self.mask is None else rows[self.mask]
