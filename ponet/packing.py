"""A batch as one stream of real tokens, and the offsets that the token mixers work with.

Rows `[B, N]` with a mask become `[T]`: padding is taken out, so nothing needs a mask later and no
work is done on padding. Everything here is computed once a forward pass, not once a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ponet.segments import starts_around, starts_of_chunks, starts_of_given
from ponet_kernels import token_marks


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """Offsets of sequences, segments and runs in a stream of T tokens."""

    cu_seqlens: Tensor
    """`[B + 1]` int32, where each sequence begins."""
    cu_segments: Tensor
    """`[S + 1]` int32, where each segment begins; a segment lies in one sequence."""
    cu_runs: Tensor
    """`[R + 1]` int32, where each run begins: tokens that local windows see as neighbours."""
    token_segments: Tensor
    """`[T]` int64, the segment of each token."""
    segment_sequences: Tensor
    """`[S]` int64, the sequence of each segment."""
    special_tokens: Tensor
    """`[X]` int64, tokens that receive global aggregation only."""
    token_marks: Tensor
    """`[T]` uint8, which neighbours a local window sees, and special tokens."""
    max_seqlen: int
    """No sequence has more tokens."""


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


def _offsets_of_starts(starts: Tensor) -> Tensor:
    # shape[0], as below, because len() of a traced tensor asks for a number that is not known yet
    places = starts.nonzero().squeeze(1)
    return torch.cat([places, places.new_full((1,), starts.shape[0])]).int()


def layout_of(
    stream: TokenStream,
    special: Tensor,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> PackedLayout:
    """Cut a stream into segments and runs.

    Args:
        stream: the tokens.
        special: `[T]` bool, tokens to be kept apart: each is a segment and a run of its own.
        segment_ids: `[T]`, integer, the caller's segments; they come before the next two rules.
        num_segments: cut rows into this many equal chunks; None: at special tokens.

    Raises:
        ValueError: `segment_ids` decrease inside a sequence.
    """
    sequence_starts = torch.ones_like(special)
    sequence_starts[1:] = stream.sequences[1:] != stream.sequences[:-1]
    apart = starts_around(special) | sequence_starts
    if segment_ids is not None:
        starts = apart | starts_of_given(segment_ids, stream.sequences)
    elif num_segments is not None:
        starts = apart | starts_of_chunks(stream.positions, stream.row_length, num_segments)
    else:
        starts = apart
    gaps = torch.zeros_like(special)
    gaps[1:] = stream.positions[1:] != stream.positions[:-1] + 1
    token_segments = starts.long().cumsum(0) - 1
    special_tokens = special.nonzero().squeeze(1)
    cu_runs = _offsets_of_starts(apart | gaps)
    return PackedLayout(
        cu_seqlens=stream.cu_seqlens,
        cu_segments=_offsets_of_starts(starts),
        cu_runs=cu_runs,
        token_segments=token_segments,
        segment_sequences=stream.sequences[starts],
        special_tokens=special_tokens,
        token_marks=token_marks(cu_runs, special.shape[0], special_tokens),
        max_seqlen=stream.row_length,
    )
