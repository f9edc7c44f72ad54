"""Packed streams and their layouts for tests of operators and mixers."""

from itertools import accumulate

import torch
from torch import Tensor

from ponet.packing import BatchLayout, layout_of, stream_of_packed, stream_of_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def offsets(lengths: list[int]) -> Tensor:
    """`[len(lengths) + 1]` int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def owners(lengths: list[int]) -> Tensor:
    """`[sum(lengths)]` int64, of each token the number of its sequence or segment."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(counts).to(DEVICE)


def packed(lengths: list[int]) -> BatchLayout:
    """Each sequence one segment, on the default device."""
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    stream = stream_of_packed(torch.zeros(sum(lengths), dtype=torch.long), cu_seqlens)
    return layout_of(stream, torch.zeros(sum(lengths), dtype=torch.bool))


def padded(lengths: list[int], row_length: int, left: bool = False) -> BatchLayout:
    """The same from rows with padding behind, or in front, of the tokens; on the default device."""
    columns = torch.arange(row_length).flip(0) if left else torch.arange(row_length)
    mask = columns < torch.tensor(lengths).unsqueeze(1)
    stream = stream_of_rows(torch.zeros(mask.shape, dtype=torch.long), mask)
    return layout_of(stream, torch.zeros(sum(lengths), dtype=torch.bool))
