"""The published protocol in fixed shapes, on data that lie on the device: what a capture needs.

The real tokens of a batch of R rows of N columns are a stream, as ever. So that every batch has the
same number T of tokens, the most that any has, "ghosts" follow: tokens of id 0 in G sequences of
their own, each of at most N tokens and one segment. A real sequence has one segment for each chunk
of columns, which may be empty. Ghosts are computed for nothing: what comes out of them is not used,
and their gradients are zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.model import MIXERS_WITHOUT_MASK, ModelInputs, keep_columns, segment_columns
from lra.settings import ArenaSettings
from lra.store import ArenaData, Split
from lra.tasks import ArenaTask
from ponet.packing import BatchLayout
from ponet_kernels import token_marks

# one looks at its layout, the other keeps the state of the random generator
NOT_CAPTURED = ("ponet_published", "attention_checkpointed")
# T is a multiple of it, which suits matrix products
_TILE = 64


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Of all batches of a set."""

    num_tokens: int
    """T, at least the real tokens of any batch."""
    num_ghosts: int
    """G, sequences that take what is left of T in any batch."""


def obstacle(settings: ArenaSettings, data: ArenaData, device: torch.device) -> str | None:
    """Why the steps of a run cannot be captured; None when they can."""
    if settings.protocol != "published":
        return f"shapes differ from step to step in the protocol {settings.protocol}"
    if settings.mixer in NOT_CAPTURED:
        return f"mixer {settings.mixer} reads from the device"
    if settings.compile:
        return "--compile was given"
    size = data.train.stream.nbytes
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2:
        return f"the data take {size / 2**20:,.0f} MiB, more than half of the free memory"
    return None


class ResidentExamples:
    """A split on a device."""

    def __init__(self, split: Split, task: ArenaTask, mixer: str, stream: Tensor) -> None:
        """Take a split whose sequences `resident_stream` put on the device."""
        device = stream.device
        self.labels = torch.from_numpy(split.labels).to(device)
        """`[examples]` int64."""
        self._length = task.seq_len
        self._counts = np.full(len(split), task.seq_len * task.num_inputs)
        if mixer not in MIXERS_WITHOUT_MASK:
            examples = map(split.ids, range(len(split)))
            self._counts = np.array([sum(map(np.count_nonzero, inputs)) for inputs in examples])
        self._stream = stream
        self._starts = torch.from_numpy(split.starts).to(device)
        self._lengths = torch.from_numpy(split.lengths).to(device)
        self._columns = torch.arange(task.seq_len, device=device)

    def shape(self, batches: Iterable[np.ndarray]) -> BatchShape:
        """The shape that holds each of the batches."""
        counts = [int(self._counts[batch].sum()) for batch in batches]
        num_tokens = -(-max(counts) // _TILE) * _TILE
        missing = num_tokens - min(counts)
        return BatchShape(num_tokens=num_tokens, num_ghosts=-(-missing // self._length))

    def rows(self, indices: Tensor) -> Tensor:
        """Padded ids of examples `[B]`: `[num_inputs * B, N]` int64, all first inputs first."""
        starts, lengths = (
            values.index_select(0, indices).T.reshape(-1, 1)
            for values in (self._starts, self._lengths)
        )
        places = (starts + self._columns).clamp(max=self._stream.shape[0] - 1)
        ids = self._stream.index_select(0, places.flatten()).view(places.shape).long()
        return ids.masked_fill(self._columns >= lengths, 0)


def resident_stream(split: Split, device: torch.device) -> Tensor:
    """The sequences of a split and of the others of its task on a device, uint8 or int16."""
    # no id needs the sign
    ids = split.stream if split.stream.itemsize == 1 else split.stream.view("int16")
    return torch.tensor(ids, device=device)


def resident_inputs(
    rows: Tensor, shape: BatchShape, *, task: ArenaTask, mixer: str, num_segments: int
) -> ModelInputs:
    """What `lra.model.model_inputs` makes for the published protocol, in a fixed shape.

    Rows are `[R, N]` int64, zero at what is absent; nothing is read from their device.
    """
    num_rows, length = rows.shape
    sees_all = mixer in MIXERS_WITHOUT_MASK
    real = rows != 0
    seen = (torch.ones_like(real) if sees_all else real).flatten()
    passed = seen.cumsum(0)  # [R N], seen tokens up to and with the place
    # the place in the rows of each token of the stream; R N for ghosts, as if in one more row
    slots = (passed - 1).masked_fill(~seen, shape.num_tokens)
    places = torch.arange(len(seen), device=rows.device)
    order = places.new_full((shape.num_tokens + 1,), len(seen)).scatter(0, slots, places)[:-1]
    before = (passed - seen.long()).view(num_rows, length)
    layout = _layout(order, before, passed[-1:], shape, segment_columns(task, num_segments))
    ids, counted = F.pad(rows.flatten(), (0, 1)), None
    if sees_all:
        ghosts = range(shape.num_tokens - rows.numel(), 0, -length)
        lengths = (*[length] * num_rows, *(min(rest, length) for rest in ghosts))
        unused = (0,) * (num_rows + shape.num_ghosts - len(lengths))
        layout = replace(layout, host_lengths=lengths + unused)
        counted = F.pad(real.flatten(), (0, 1)).index_select(0, order)
    return ModelInputs(
        input_ids=ids.index_select(0, order),
        position_ids=order % length,
        layout=keep_columns(layout, mixer, order, num_rows),
        counted=counted,
        scale=layout.cu_seqlens.diff()[:num_rows] / length,
    )


def _layout(
    order: Tensor, before: Tensor, total: Tensor, shape: BatchShape, size: int
) -> BatchLayout:
    """The layout of a stream with segments of `size` columns.

    `order` is `[T]`, the place of each token among the R N, ascending, R N for ghosts; `before`
    `[R, N]` counts the seen tokens before each place, `total` `[1]` all.
    """
    num_rows, length = before.shape
    device = order.device
    tokens = torch.arange(shape.num_tokens, device=device)
    ghost = order == num_rows * length
    rank = tokens - total  # among the ghosts

    steps = torch.arange(1, shape.num_ghosts + 1, device=device) * length
    ends = (total + steps).clamp(max=shape.num_tokens)
    ghosts = torch.cat([total, ends])  # where they begin, and the end
    cu_seqlens = torch.cat([before[:, 0], ghosts])
    chunks = before[:, ::size]
    num_chunks, num_real = chunks.shape[1], chunks.numel()
    segments = torch.arange(num_real + shape.num_ghosts, device=device)
    columns, rows = order % length, order // length
    breaks = (columns == 0) | ghost | F.pad(order.diff() != 1, (1, 0), value=True)

    return BatchLayout(
        cu_seqlens=cu_seqlens.int(),
        cu_segments=torch.cat([chunks.flatten(), ghosts]).int(),
        token_segments=torch.where(
            ghost, num_real + rank // length, rows * num_chunks + columns // size
        ),
        segment_sequences=torch.where(
            segments < num_real, segments // num_chunks, segments - num_real + num_rows
        ),
        token_marks=token_marks(breaks),
        max_seqlen=length,
        max_segment_len=length if shape.num_ghosts else size,
        has_empty_segments=True,
    )
