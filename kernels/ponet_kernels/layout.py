"""Where sequences, segments and local windows lie in a packed stream: what every operator takes.

A packed stream holds the tokens of all sequences of a batch back to back, without padding. Offsets
into it are int32 tensors of length "count + 1", as in `cu_seqlens` of variable-length attention.
A layout is made once per batch, best on the host: nothing here reads from a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

SEES_LEFT = 1
"""The local window of a token sees the token before."""
SEES_RIGHT = 2
"""The local window of a token sees the token after."""
SPECIAL = 4
"""The token receives global aggregation only; it is a segment and a window of its own."""


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """B sequences and S segments in a stream of T tokens; a segment lies in one sequence."""

    cu_seqlens: Tensor
    """`[B + 1]` int32, where each sequence begins."""
    cu_segments: Tensor
    """`[S + 1]` int32, where each segment begins."""
    token_segments: Tensor
    """`[T]` int64, the segment of each token, ascending."""
    segment_sequences: Tensor
    """`[S]` int64, the sequence of each segment, ascending."""
    token_marks: Tensor
    """`[T]` uint8, sums of `SEES_LEFT`, `SEES_RIGHT` and `SPECIAL`."""
    max_seqlen: int
    """No sequence has more tokens. A close bound saves idle programs on a GPU."""
    max_segment_len: int
    """No segment has more tokens. Up to 256, an argmax is kept in a byte."""
    has_empty_segments: bool = False
    """Some segment may have no token."""

    @classmethod
    def of_sequences(
        cls, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None = None
    ) -> "PackedLayout":
        """Each sequence is one segment; sequences may be empty.

        Args:
            cu_seqlens: `[B + 1]` int32, from 0 to T, which is `num_tokens`.
            max_seqlen: no sequence has more tokens; None: T.
        """
        numbers = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        sequences = numbers.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
        starts = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
        starts = starts.index_fill(0, cu_seqlens.long(), True)
        longest = num_tokens if max_seqlen is None else max_seqlen
        return PackedLayout(
            cu_seqlens=cu_seqlens,
            cu_segments=cu_seqlens,
            token_segments=sequences,
            segment_sequences=numbers,
            token_marks=token_marks(starts[:-1]),
            max_seqlen=longest,
            max_segment_len=longest,
            has_empty_segments=True,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_segments.shape[0]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def special(self) -> Tensor:
        """`[T]` bool, the tokens that receive global aggregation only."""
        return (self.token_marks & SPECIAL) != 0

    @property
    def token_sequences(self) -> Tensor:
        """`[T]` int64, the sequence of each token."""
        return self.segment_sequences.index_select(0, self.token_segments)

    @cached_property
    def by_segment(self) -> "PackedLayout":
        """The same with segments for sequences: global operators work on segments then."""
        owners = self.segment_sequences
        return replace(
            self,
            cu_seqlens=self.cu_segments,
            segment_sequences=torch.arange(owners.shape[0], device=owners.device),
            max_seqlen=self.max_segment_len,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same layout with other tensors, such as copies on a device."""
        return replace(self, **tensors)


def token_marks(starts: Tensor, special: Tensor | None = None) -> Tensor:
    """Marks of a stream, as `PackedLayout` takes them.

    Args:
        starts: `[T]` bool, local windows do not reach from this token to the one before.
        special: `[T]` bool, special tokens; `starts` is true there and right after.
    """
    reach = (~starts).to(torch.uint8)
    marks = reach * SEES_LEFT
    marks[:-1] += reach[1:] * SEES_RIGHT
    return marks if special is None else marks + special.to(torch.uint8) * SPECIAL
