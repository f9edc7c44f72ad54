"""A batch as one stream of real tokens, and the offsets that the token mixers work with.

Rows `[B, N]` with a mask become `[T]`: padding is taken out, so nothing needs a mask later and no
work is done on padding. Everything here is computed once per batch, not once per layer: in training
by the collator on the host, otherwise by the model.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ponet.config import PoNetConfig
from ponet_kernels import PackedLayout, token_marks
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rectangle `[B, N, C]` that some mixers and poolers are defined on, real tokens first."""

    num_rows: int
    """B."""
    length: int
    """N, at least the longest sequence."""
    mask: Tensor | None
    """`[B, N]` bool, true at real tokens, and at the first place of an empty row, which is zero: a
    softmax over nothing would be NaN. None where all are real."""
    places: Tensor | None
    """`[T]` int64, where each token of the stream stands among the `B * N`; None where the stream
    is the rectangle."""

    def from_stream(self, stream: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, N, ...]`, zero at padding."""
        shape = (self.num_rows, self.length)
        if self.places is not None:
            empty = stream.new_zeros(self.num_rows * self.length, *stream.shape[1:])
            return empty.index_copy(0, self.places, stream).unflatten(0, shape)
        return stream.unflatten(0, shape)

    def to_stream(self, rows: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[T, ...]`."""
        flat = rows.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True, kw_only=True)
class BatchLayout(PackedLayout):
    """A layout, and the rectangle of its sequences."""

    @cached_property
    def rows(self) -> Rows:
        """The rectangle, made at most once per batch, without reading from a device."""
        return rows_of(self.cu_seqlens, self.token_sequences, self.max_seqlen)


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
    index: Tensor | None
    """`[T]` int64, places of the real tokens in the flattened rows; None where all are real."""
    rows: tuple[int, int] | None
    """(B, N) of the rows; None when the input came packed."""

    def pack(self, values: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[T, ...]`; already packed values pass through."""
        if self.rows is None:
            return values
        flat = values.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, values: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, N, ...]` with zeros at padding; packed input stays packed."""
        if self.rows is None:
            return values
        if self.index is None:
            return values.unflatten(0, self.rows)
        batch_size, length = self.rows
        flat = values.new_zeros(batch_size * length, *values.shape[1:])
        return flat.index_copy(0, self.index, values).unflatten(0, self.rows)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def stream_of_rows(input_ids: Tensor, attention_mask: Tensor | None) -> TokenStream:
    """Take the padding out of rows.

    A masked token is treated as absent wherever it stands: it has no part in any pooling, and the
    local window does not reach across the place it held.

    Args:
        input_ids: `[B, N]`, integer.
        attention_mask: `[B, N]`, bool or number, non-zero at real tokens; None: all are real.

    Raises:
        ValueError: the mask has another shape than the ids.
    """
    batch_size, length = input_ids.shape
    device = input_ids.device
    columns = torch.arange(length, device=device).expand(batch_size, length)
    sequences = torch.arange(batch_size, device=device).unsqueeze(1).expand(batch_size, length)
    if attention_mask is None:
        counts = torch.full((batch_size,), length, device=device)
        index, positions, sequences = None, columns.flatten(), sequences.flatten()
    else:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, "
                f"input_ids {tuple(input_ids.shape)}"
            )
        mask = attention_mask.bool()
        counts = mask.sum(dim=1)
        index = mask.flatten().nonzero().squeeze(1)
        # rows without columns have no first one
        first = mask.int().argmax(dim=1, keepdim=True) if length else counts.unsqueeze(1)
        positions = (columns - first).flatten().index_select(0, index)
        sequences = sequences.flatten().index_select(0, index)
    return TokenStream(
        cu_seqlens=_offsets(counts),
        sequences=sequences,
        positions=positions,
        row_length=length,
        index=index,
        rows=(batch_size, length),
    )


def stream_of_packed(input_ids: Tensor, cu_seqlens: Tensor) -> TokenStream:
    """Describe ids that are packed already.

    Args:
        input_ids: `[T]`, integer.
        cu_seqlens: `[B + 1]`, int32, offsets of the sequences, from 0 to T.

    Raises:
        ValueError: the offsets do not span the ids or decrease.
    """
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(input_ids) or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must ascend from 0 to {len(input_ids)}, the number of tokens, found "
            f"{cu_seqlens.tolist()}"
        )
    sequences = torch.arange(len(lengths), device=input_ids.device).repeat_interleave(lengths)
    places = torch.arange(len(input_ids), device=input_ids.device)
    return TokenStream(
        cu_seqlens=cu_seqlens.int(),
        sequences=sequences,
        positions=places - cu_seqlens.long().index_select(0, sequences),
        row_length=int(lengths.max()) if len(lengths) else 0,
        index=None,
        rows=None,
    )


def stream_of_layout(layout: PackedLayout) -> TokenStream:
    """Describe ids that are packed as a layout says; nothing is checked or read from a device."""
    sequences = layout.token_sequences
    places = torch.arange(layout.num_tokens, device=sequences.device)
    return TokenStream(
        cu_seqlens=layout.cu_seqlens,
        sequences=sequences,
        positions=places - layout.cu_seqlens.long().index_select(0, sequences),
        row_length=layout.max_seqlen,
        index=None,
        rows=None,
    )


def _offsets_of_starts(starts: Tensor) -> Tensor:
    # shape[0], as below, because len() of a traced tensor asks for a number that is not known yet
    places = starts.nonzero().squeeze(1)
    return torch.cat([places, places.new_full((1,), starts.shape[0])]).int()


def _longest(cu_segments: Tensor, bound: int) -> int:
    """Tokens of the longest segment, or the bound where looking costs a wait for the device."""
    looks = cu_segments.device.type == "cpu" and not torch.compiler.is_compiling()
    return int(cu_segments.diff().max()) if looks and cu_segments.shape[0] > 1 else bound


def rows_of(cu_seqlens: Tensor, sequences: Tensor, length: int) -> Rows:
    """The rectangle of a stream.

    Args:
        cu_seqlens: `[B + 1]` int32.
        sequences: `[T]` int64, the sequence of each token.
        length: N, at least the longest sequence.
    """
    num_rows, num_tokens = cu_seqlens.shape[0] - 1, sequences.shape[0]
    if num_tokens == num_rows * length:
        return Rows(num_rows=num_rows, length=length, mask=None, places=None)
    columns = torch.arange(num_tokens, device=sequences.device)
    columns = columns - cu_seqlens.long().index_select(0, sequences)
    shown = cu_seqlens.diff().clamp(min=1).unsqueeze(1)
    mask = torch.arange(length, device=sequences.device) < shown
    places = sequences * length + columns
    return Rows(num_rows=num_rows, length=length, mask=mask, places=places)


def _changes(ids: Tensor) -> Tensor:
    """`[T]` bool: the id differs from that of the token before; true for the first token."""
    changed = torch.ones_like(ids, dtype=torch.bool)
    changed[1:] = ids[1:] != ids[:-1]
    return changed


def _starts_around(special: Tensor) -> Tensor:
    """Every special token is a segment of its own, and so is each stretch between them.

    Args:
        special: `[T]` bool, the token is [CLS] or [SEP].

    Returns:
        `[T]` bool, a segment starts at the token (sequence starts not considered).
    """
    return torch.cat([special[:1], special[1:] | special[:-1]])


def _starts_of_given(segment_ids: Tensor, sequences: Tensor) -> Tensor:
    """A segment starts where the given id changes.

    Args:
        segment_ids: `[T]`, integer, ids as the caller numbers them, ascending in each sequence.
        sequences: `[T]`, integer, the sequence of each token.

    Returns:
        `[T]` bool, as for `_starts_around`.

    Raises:
        ValueError: ids decrease inside a sequence, so that a segment would not be one stretch.
    """
    falls = (segment_ids[1:] < segment_ids[:-1]) & (sequences[1:] == sequences[:-1])
    # a traced graph has no values to look at
    if not torch.compiler.is_compiling() and falls.any():
        t = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"segment_ids: sequence {int(sequences[t])} has id {int(segment_ids[t + 1])} after "
            f"{int(segment_ids[t])}; ids must not decrease, a segment is one stretch of tokens"
        )
    return _changes(segment_ids)


def _starts_of_chunks(positions: Tensor, row_length: int, num_segments: int) -> Tensor:
    """Equal chunks of row_length // num_segments + 1 tokens, as published for Long Range Arena.

    Args:
        positions: `[T]`, integer, place of each token in its row.
        row_length: length of a row, padding included.
        num_segments: chunks asked for; the rule gives at most that many, the last one shorter.

    Returns:
        `[T]` bool, as for `_starts_around`.
    """
    return _changes(positions // (row_length // num_segments + 1))


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
        num_segments: cut rows into this many equal chunks; None: at special tokens.

    Raises:
        ValueError: `segment_ids` decrease inside a sequence.
    """
    # a start at T, that of an empty last sequence, is none
    starts = special.new_zeros(special.shape[0] + 1)
    starts = starts.index_fill(0, stream.cu_seqlens[:-1].long(), True)[:-1]
    apart = _starts_around(special) | starts
    starts = apart
    if segment_ids is not None:
        starts = apart | _starts_of_given(segment_ids, stream.sequences)
    elif num_segments is not None:
        starts = apart | _starts_of_chunks(stream.positions, stream.row_length, num_segments)
    # where padding was taken out between two tokens, local windows end
    gaps = torch.zeros_like(special)
    gaps[1:] = stream.positions[1:] != stream.positions[:-1] + 1
    apart = apart | gaps
    cu_segments = _offsets_of_starts(starts)
    return BatchLayout(
        cu_seqlens=stream.cu_seqlens,
        cu_segments=cu_segments,
        token_segments=starts.cumsum(0).sub_(1),
        segment_sequences=stream.sequences.index_select(0, cu_segments[:-1]),
        token_marks=token_marks(apart, special),
        max_seqlen=stream.row_length,
        max_segment_len=_longest(cu_segments, stream.row_length),
    )


def layout_for(
    config: PoNetConfig, stream: TokenStream, ids: Tensor, segment_ids: Tensor | None = None
) -> BatchLayout:
    """Cut a stream as a model does: at special tokens, at given segments, or into chunks.

    Args:
        config: of the model.
        stream: the tokens.
        ids: `[T]`, integer.
        segment_ids: as for `layout_of`.

    Raises:
        ValueError: `segment_ids` decrease inside a sequence.
    """
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
