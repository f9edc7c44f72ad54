"""Packed streams, their layouts and values for tests of operators and mixers."""

from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ponet.packing import BatchLayout, layout_of, stream_of_packed, stream_of_rows
from ponet_kernels import PackedLayout, token_marks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIEWS = {
    "columns": lambda x: torch.cat([x, x], dim=-1)[..., x.shape[-1] :],
    "rows": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def ties(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(DEVICE, dtype)


def huge(path: Path, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """More than 2**31 elements; on a CPU in a sparse file, where only pages in use exist."""
    size = num_rows * num_columns
    assert size - num_columns > 2**31
    if DEVICE == "cuda":
        memory = torch.empty(size, dtype=dtype, device=DEVICE)
    else:
        memory = torch.from_file(str(path / "sparse"), shared=True, size=size, dtype=dtype)
    return memory.view(num_rows, num_columns)


class Columns:
    """The last columns of a wider tensor, which a kernel writes, and nothing else of it."""

    def __init__(self, like: Tensor) -> None:
        shape = (len(like), 2 * like.shape[1] + 3)
        self.all = torch.full(shape, 7.0, dtype=like.dtype, device=DEVICE)
        self.written = self.all[:, -like.shape[1] :].fill_(torch.nan)

    def check(self) -> Tensor:
        """What was written: each element, and none beside."""
        assert (self.all[:, : -self.written.shape[1]] == 7.0).all()
        return self.written


def offsets(lengths: list[int]) -> Tensor:
    """`[len(lengths) + 1]` int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def owners(lengths: list[int]) -> Tensor:
    """`[sum(lengths)]` int64, of each token the number of its sequence or segment."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(counts).to(DEVICE)


def segmented(sequences: list[list[int]], seed: int | None = None) -> PackedLayout:
    """Segments of some lengths in each sequence.

    Args:
        seed: marks some of the one-token segments as special, and ends runs at a few places as if
            padding were taken out there; None: neither.
    """
    segments, lengths = [*chain(*sequences)], [sum(sequence) for sequence in sequences]
    token_segments, total = owners(segments), sum(segments)
    starts = torch.zeros(total + 1, dtype=torch.bool, device=DEVICE)
    special = torch.zeros(total, dtype=torch.bool, device=DEVICE)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        alone = torch.tensor([n == 1 for n in segments], dtype=torch.bool)
        alone &= torch.rand(len(segments), generator=generator) < 0.5
        special = alone.to(DEVICE)[token_segments]
        starts |= (torch.rand(total + 1, generator=generator) < 0.2).to(DEVICE)
        starts[:-1] |= special
        starts[1:] |= special
    starts[offsets(lengths).long()] = True
    return PackedLayout(
        cu_seqlens=offsets(lengths),
        cu_segments=offsets(segments),
        token_segments=token_segments,
        segment_sequences=owners([len(sequence) for sequence in sequences]),
        token_marks=token_marks(starts[:-1], special),
        max_seqlen=max(lengths),
        max_segment_len=max(segments, default=0),
        has_empty_segments=0 in segments,
    )


def packed(lengths: list[int], special: Tensor | None = None) -> BatchLayout:
    """Each sequence one segment, but for special tokens, on the default device."""
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    stream = stream_of_packed(torch.zeros(sum(lengths), dtype=torch.long), cu_seqlens)
    return layout_of(stream, torch.zeros(sum(lengths)).bool() if special is None else special)


def padded(
    lengths: list[int], row_length: int, special: Tensor | None = None, left: bool = False
) -> BatchLayout:
    """The same from rows with padding behind, or in front, of the tokens; on the default device."""
    columns = torch.arange(row_length).flip(0) if left else torch.arange(row_length)
    mask = columns < torch.tensor(lengths).unsqueeze(1)
    stream = stream_of_rows(torch.zeros(mask.shape, dtype=torch.long), mask)
    return layout_of(stream, torch.zeros(sum(lengths)).bool() if special is None else special)
