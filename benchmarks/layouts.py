"""Batches of a benchmark: where sequences and segments lie, in our form and the published one."""

from dataclasses import dataclass

import torch
from public_block import Rows
from torch import Tensor

from ponet.packing import BatchLayout, layout_of, stream_of_packed

SHAPES = {
    "text": "10 to 40 tokens, uniform",
    "ones": "1 token",
    "chunks2": "2 tokens",
    "documents": "one a sequence",
}
"""Segment shapes by name; special tokens are segments of their own in each."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, and how their tokens are to be represented."""

    batch_size: int
    seq_len: int
    width: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    segments: str
    layout: BatchLayout
    rows: Rows

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.batch_size * self.seq_len

    def as_rows(self, x: Tensor) -> Tensor:
        """`[T, C]` -> `[B, N, C]`."""
        return x.view(self.batch_size, self.seq_len, -1)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _segment_ids(shape: str, length: int, generator: torch.Generator) -> Tensor:
    if shape == "ones":
        return torch.arange(length)
    if shape == "chunks2":
        return torch.arange(length) // 2
    ids = torch.zeros(length, dtype=torch.long)
    if shape == "text":
        ends = torch.randint(10, 41, (length // 10 + 1,), generator=generator).cumsum(0)
        ids[ends[ends < length]] = 1
    return ids.cumsum(0)


def _special(shape: str, length: int) -> Tensor:
    """[CLS] and [SEP] at the ends; text is a pair, with a [SEP] in the middle."""
    special = torch.zeros(length, dtype=torch.bool)
    special[[0, length - 1]] = True
    special[length // 2] |= shape == "text"
    return special


def make_layout(
    shape: str, lengths: list[int], device: torch.device, generator: torch.Generator
) -> BatchLayout:
    """A stream of sequences with segments of a shape.

    Args:
        shape: a key of `SHAPES`.
        lengths: tokens of each sequence, at least 3.
        device: where the offsets go.
        generator: source of segment lengths, on the CPU.
    """
    ids = torch.cat([_segment_ids(shape, length, generator) for length in lengths])
    special = torch.cat([_special(shape, length) for length in lengths])
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = layout_of(stream_of_packed(ids, offsets), special, ids)
    return layout.with_tensors({name: x.to(device) for name, x in layout.tensors().items()})


def make_batch(
    shape: str,
    batch_size: int,
    seq_len: int,
    *,
    width: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Batch:
    """Sequences of equal length without padding."""
    generator = torch.Generator().manual_seed(seed)
    layout = make_layout(shape, [seq_len] * batch_size, device, generator)
    segments = layout.token_segments.view(batch_size, seq_len)
    special = layout.special.view(batch_size, seq_len)
    rows = Rows(segments - segments[:, :1], special, torch.zeros_like(special))
    return Batch(batch_size, seq_len, width, num_heads, dtype, device, shape, layout, rows)


def without_ties(x: Tensor, layout: BatchLayout) -> Tensor:
    """`x` `[T, C]`, changed in its last bits so that no segment and no window has tied maxima.

    Equal maxima are common in half precision, and the published code splits their gradient where
    ours gives it to the first: only without ties are the two comparable.
    """
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
    # three tokens in a row differ in the last two bits
    places = torch.arange(len(x), device=x.device).remainder(4).unsqueeze(1)
    x = ((bits & ~3) | places.to(bits.dtype)).view(x.dtype)
    # the first maximum of each segment becomes the next larger number with the same last bits
    starts = layout.cu_segments[:-1].long()
    index = layout.token_segments.unsqueeze(1).expand_as(x)
    maxima = x.new_full((len(starts), x.shape[1]), -torch.inf)
    maxima.scatter_reduce_(0, index, x, "amax")
    ranks = torch.arange(len(x), device=x.device).unsqueeze(1).expand_as(x)
    ranks = torch.where(x == maxima.index_select(0, layout.token_segments), ranks, len(x))
    first = ranks.new_full(maxima.shape, len(x)).scatter_reduce_(0, index, ranks, "amin")
    bits = x.view(bits.dtype).clone()
    winners = bits.gather(0, first)
    return bits.scatter_(0, first, winners + torch.where(winners < 0, -4, 4).to(bits.dtype)).view(
        x.dtype
    )
