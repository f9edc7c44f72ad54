"""A batch as one stream of real tokens, and the offsets that the token mixers work with.

Rows `[B, N]` with a mask become `[T]`: padding is taken out, so nothing needs a mask later and no
work is done on padding. Everything here is computed once per batch, not once per layer: in training
by the collator on the host, otherwise by the model.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ponet.config import PoNetConfig
from ponet_kernels import PackedLayout, token_marks
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rectangle `[B, N, C]` of a stream."""

    num_rows: int
    length: int
    """N, at least the longest sequence."""
    mask: Tensor | None
    """`[B, N]` bool, true at real tokens, and in a layout at the first place of an empty row, which
    is zero: a softmax over nothing would be NaN. None where all are real."""
    places: Tensor | None
    """`[T]` int64, where each token of the stream stands among the `B * N`; None where the stream
    is the rectangle."""

    def from_stream(self, stream: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, N, ...]`, zero at padding."""
        if self.places is not None:
            empty = stream.new_zeros(self.num_rows * self.length, *stream.shape[1:])
            stream = empty.index_copy(0, self.places, stream)
        return stream.unflatten(0, (self.num_rows, self.length))

    def to_stream(self, rows: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[T, ...]`."""
        flat = rows.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True, kw_only=True)
class BatchLayout(PackedLayout):
    """A layout, and the rectangle that some mixers and poolers are defined on."""

    host_lengths: tuple[int, ...] | None = None
    """Tokens of each sequence, for a layout on a device; None: to be read from `cu_seqlens`."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; waits for a device where the layout was made there."""
        if self.host_lengths is not None:
            return self.host_lengths
        return tuple(self.cu_seqlens.diff().tolist())

    @cached_property
    def rows(self) -> Rows:
        """Real tokens first in each row; made once per batch, without reading from a device."""
        num_rows, length = self.num_sequences, self.max_seqlen
        if self.num_tokens == num_rows * length:
            return Rows(num_rows=num_rows, length=length, mask=None, places=None)
        sequences = self.token_sequences
        shown = self.cu_seqlens.diff().clamp(min=1).unsqueeze(1)
        return Rows(
            num_rows=num_rows,
            length=length,
            mask=torch.arange(length, device=sequences.device) < shown,
            places=sequences * length + _columns(self.cu_seqlens, sequences),
        )


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """Tokens of a batch back to back, before their segments are known."""

    cu_seqlens: Tensor
    """`[B + 1]` int32."""
    sequences: Tensor
    """`[T]` int64, the sequence of each token."""
    positions: Tensor
    """`[T]` int64, place in the row counted from the first real token."""
    row_length: int
    """N, or the longest sequence when the input came packed."""
    rows: Rows | None = None
    """The rows that the input came in, padding anywhere; None when it came packed."""

    def pack(self, values: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[T, ...]`; already packed values pass through."""
        return values if self.rows is None else self.rows.to_stream(values)

    def unpack(self, values: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, N, ...]` with zeros at padding; packed input stays packed."""
        return values if self.rows is None else self.rows.from_stream(values)


def _columns(cu_seqlens: Tensor, sequences: Tensor) -> Tensor:
    """`[T]` int64, the place of each token in its sequence."""
    # shape[0] because len() of a traced tensor asks for a number that is not known yet
    places = torch.arange(sequences.shape[0], device=sequences.device)
    return places - cu_seqlens.long().index_select(0, sequences)


def stream_of_rows(input_ids: Tensor, attention_mask: Tensor | None) -> TokenStream:
    """Take the padding out of rows `[B, N]`, which is where the mask of their shape is zero.

    A masked token is treated as absent wherever it stands: it has no part in any pooling, and the
    local window does not reach across the place it held.
    """
    num_rows, length = input_ids.shape
    device = input_ids.device
    rows = Rows(num_rows=num_rows, length=length, mask=None, places=None)
    counts = torch.full((num_rows,), length, device=device)
    columns = torch.arange(length, device=device).expand(num_rows, length)
    numbers = torch.arange(num_rows, device=device).unsqueeze(1).expand(num_rows, length)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, "
                f"input_ids {tuple(input_ids.shape)}"
            )
        mask = attention_mask.bool()
        rows = replace(rows, mask=mask, places=mask.flatten().nonzero().squeeze(1))
        counts = mask.sum(dim=1)
        # rows without columns have no first one
        columns = columns - mask.int().argmax(dim=1, keepdim=True) if length else columns
    return TokenStream(
        cu_seqlens=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        sequences=rows.to_stream(numbers),
        positions=rows.to_stream(columns),
        row_length=length,
        rows=rows,
    )


def stream_of_packed(input_ids: Tensor, cu_seqlens: Tensor) -> TokenStream:
    """Describe ids `[T]` that are packed already, by the offsets `[B + 1]` of their sequences."""
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(input_ids) or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must ascend from 0 to {len(input_ids)}, found {cu_seqlens.tolist()}"
        )
    sequences = torch.arange(len(lengths), device=input_ids.device).repeat_interleave(lengths)
    return TokenStream(
        cu_seqlens=cu_seqlens.int(),
        sequences=sequences,
        positions=_columns(cu_seqlens, sequences),
        row_length=int(lengths.max()) if len(lengths) else 0,
    )


def stream_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: BatchLayout | None,
) -> TokenStream:
    """Describe the input of a model, whose arguments these are."""
    if layout is not None:
        others = (attention_mask, segment_ids, cu_seqlens)
        if input_ids.shape != (layout.num_tokens,) or any(x is not None for x in others):
            raise ValueError(
                f"with layout, input_ids must be [{layout.num_tokens}] and attention_mask, "
                f"segment_ids and cu_seqlens None, found input_ids {tuple(input_ids.shape)}"
            )
        # as it is trusted, nothing is read from a device
        sequences = layout.token_sequences
        return TokenStream(
            cu_seqlens=layout.cu_seqlens,
            sequences=sequences,
            positions=_columns(layout.cu_seqlens, sequences),
            row_length=layout.max_seqlen,
        )
    if cu_seqlens is not None:
        if input_ids.ndim != 1 or attention_mask is not None:
            raise ValueError(
                "with cu_seqlens, input_ids must be [T] and attention_mask None, found "
                f"input_ids {tuple(input_ids.shape)}"
            )
        return stream_of_packed(input_ids, cu_seqlens)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, N] rows, found {tuple(input_ids.shape)}")
    return stream_of_rows(input_ids, attention_mask)


def _changes(ids: Tensor) -> Tensor:
    """`[T]` bool: the id differs from that of the token before; true for the first token."""
    changed = torch.ones_like(ids, dtype=torch.bool)
    changed[1:] = ids[1:] != ids[:-1]
    return changed


def _require_ascending(segment_ids: Tensor, sequences: Tensor) -> None:
    falls = (segment_ids[1:] < segment_ids[:-1]) & (sequences[1:] == sequences[:-1])
    # a traced graph has no values to look at
    if not torch.compiler.is_compiling() and falls.any():
        t = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"segment_ids: sequence {int(sequences[t])} has id {int(segment_ids[t + 1])} after "
            f"{int(segment_ids[t])}; ids must not decrease, a segment is one stretch of tokens"
        )


def layout_of(
    stream: TokenStream,
    special: Tensor,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> BatchLayout:
    """Cut a stream into segments and runs.

    Args:
        stream: the tokens.
        special: `[T]` bool, tokens to be kept apart: each is a segment and a run of its own.
        segment_ids: `[T]`, integer, the caller's segments; they come before the next two rules.
        num_segments: cut rows of N columns into chunks of `N // num_segments + 1`, as published for
            Long Range Arena; None: at special tokens.
    """
    # a start at T, that of an empty last sequence, is none
    begins = special.new_zeros(special.shape[0] + 1)
    begins = begins.index_fill(0, stream.cu_seqlens[:-1].long(), True)[:-1]
    apart = begins | torch.cat([special[:1], special[1:] | special[:-1]])
    starts = apart
    if segment_ids is not None:
        _require_ascending(segment_ids, stream.sequences)
        starts = apart | _changes(segment_ids)
    elif num_segments is not None:
        starts = apart | _changes(stream.positions // (stream.row_length // num_segments + 1))
    # where padding was taken out between two tokens, local windows end
    gaps = torch.zeros_like(special)
    gaps[1:] = stream.positions[1:] != stream.positions[:-1] + 1
    places = starts.nonzero().squeeze(1)
    cu_segments = torch.cat([places, places.new_full((1,), starts.shape[0])]).int()
    longest = stream.row_length
    # on another device looking costs a wait
    if special.device.type == "cpu" and not torch.compiler.is_compiling() and len(places):
        longest = int(cu_segments.diff().max())
    return BatchLayout(
        cu_seqlens=stream.cu_seqlens,
        cu_segments=cu_segments,
        token_segments=starts.cumsum(0).sub_(1),
        segment_sequences=stream.sequences.index_select(0, cu_segments[:-1]),
        token_marks=token_marks(apart | gaps, special),
        max_seqlen=stream.row_length,
        max_segment_len=longest,
    )


def layout_for(
    config: PoNetConfig, stream: TokenStream, ids: Tensor, segment_ids: Tensor | None = None
) -> BatchLayout:
    """Cut a stream of ids `[T]` as a model does; segment ids as for `layout_of`."""
    special = torch.zeros_like(ids, dtype=torch.bool)
    if config.separate_special_tokens:
        special = (ids == config.cls_token_id) | (ids == config.sep_token_id)
    return layout_of(stream, special, segment_ids, config.num_segments)


def layout_of_segments(
    cu_seqlens: np.ndarray, cu_segments: np.ndarray, special: np.ndarray
) -> BatchLayout:
    """What `layout_of` makes of sequences without gaps, several times as fast on the host.

    Args:
        cu_seqlens: `[B + 1]`, offsets of the sequences, none of them empty.
        cu_segments: `[S + 1]`, offsets of the segments, each in one sequence.
        special: `[X]`, places of the special tokens, each a segment of its own.
    """
    lengths, num_tokens = np.diff(cu_segments), int(cu_seqlens[-1])
    sequences = np.searchsorted(cu_seqlens, cu_segments[:-1], side="right") - 1
    marks = np.full(num_tokens, SEES_LEFT | SEES_RIGHT, dtype=np.uint8)
    # local windows end before these tokens
    ends = np.concatenate([cu_seqlens, special, special + 1])
    marks[ends[ends < num_tokens]] &= SEES_RIGHT
    marks[ends[ends > 0] - 1] &= SEES_LEFT
    marks[special] = SPECIAL
    return BatchLayout(
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        cu_segments=torch.from_numpy(cu_segments.astype(np.int32)),
        token_segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        segment_sequences=torch.from_numpy(sequences),
        token_marks=torch.from_numpy(marks),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        max_segment_len=int(lengths.max()),
    )
