"""Offsets of packed streams for tests of the operators."""

from itertools import accumulate

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def offsets(lengths: list[int]) -> Tensor:
    """`[len(lengths) + 1]` int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def owners(lengths: list[int]) -> Tensor:
    """`[sum(lengths)]` int64, of each token the number of its sequence or segment."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(counts).to(DEVICE)
