"""The published protocol in fixed shapes, on data that lie on the device: what a capture needs.

A batch of S rows of N columns is a stream of S N tokens whatever is in it. In each row the real
tokens come first, in order; behind them are the absent ones, as a sequence of their own, a "ghost".
So there are 2 S sequences, real and ghost in turn, either of which may be empty, and one segment
for each chunk of columns and one for the ghost of each row. Ghosts are computed for nothing; what
comes out of them is not used, and their gradients are zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.cache import Split, TaskData
from lra.protocol import MIXERS_WITHOUT_MASK, ModelInputs, segment_columns
from lra.settings import RunSettings
from lra.tasks import Task
from ponet.packing import BatchLayout, Rows
from ponet_kernels import token_marks

RESIDENT_MIXERS = (
    *("ponet", "attention", "attention_naive", "fnet"),
    *("linear", "linformer", "performer", "longformer"),
)
"""Those that work on the stream or on masked rows; the others ask for the length of each row."""


def obstacle(settings: RunSettings, data: TaskData, device: torch.device) -> str | None:
    """Why the steps of a run cannot be captured; None when they can."""
    if settings.protocol != "published":
        return f"shapes differ from step to step in the protocol {settings.protocol}"
    if settings.model not in RESIDENT_MIXERS:
        return f"mixer {settings.model} asks for the length of each row"
    if settings.compile:
        return "--compile was given"
    size = data.train.stream.nbytes
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2:
        return f"the data take {size / 2**20:,.0f} MiB, more than half of the free memory"
    return None


class ResidentExamples:
    """A split on a device."""

    def __init__(self, split: Split, seq_len: int, stream: Tensor) -> None:
        """Take the split.

        Args:
            split: which.
            seq_len: N, length of rows.
            stream: as `resident_stream` made it of the split, on the device.
        """
        device = stream.device
        self.labels = torch.from_numpy(split.labels).to(device)
        """`[examples]` int64."""
        self._stream = stream
        self._starts = torch.from_numpy(split.starts).to(device)
        self._lengths = torch.from_numpy(split.lengths).to(device)
        self._columns = torch.arange(seq_len, device=device)

    def rows(self, indices: Tensor) -> Tensor:
        """Ids of examples `[B]`, zero at padding: `[num_inputs * B, N]` int64.

        All first inputs come before all second ones.
        """
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


def resident_inputs(rows: Tensor, *, task: Task, mixer: str, num_segments: int) -> ModelInputs:
    """What `lra.protocol.model_inputs` makes for the published protocol, in fixed shapes.

    Args:
        rows: `[S, N]` int64, zero at what is absent.
        task: of the rows.
        mixer: one of `RESIDENT_MIXERS`.
        num_segments: as there.

    Returns:
        Tensors on the device of `rows`; nothing is read from it.
    """
    size = segment_columns(task, num_segments)
    num_rows, length = rows.shape
    columns = torch.arange(length, device=rows.device).expand(num_rows, -1)
    real = rows != 0
    # FNet sees whole rows
    mixes = mixer in MIXERS_WITHOUT_MASK
    inside = torch.ones_like(real) if mixes else real
    passed = inside.cumsum(1)  # [S, N], real tokens up to and with the column
    counts = passed[:, -1:]
    places = torch.where(inside, passed - 1, counts + columns - passed)
    order = torch.empty_like(rows).scatter(1, places, columns)
    layout = _layout(order, passed, size)
    return ModelInputs(
        input_ids=rows.gather(1, order).flatten(),
        position_ids=order.flatten(),
        layout=layout,
        counted=real.flatten() if mixes else None,
        scale=counts.squeeze(1) / length,
        has_ghosts=True,
    )


def _layout(order: Tensor, passed: Tensor, size: int) -> BatchLayout:
    """The layout of rows.

    Args:
        order: `[S, N]`, the column of each token, real ones first.
        passed: `[S, N]`, real tokens up to and with each column.
        size: columns of a segment.
    """
    num_rows, length = order.shape
    counts = passed[:, -1:]
    numbers = torch.arange(num_rows, device=order.device).unsqueeze(1)
    places = torch.arange(length, device=order.device)
    real = places < counts

    # where each chunk begins in its row, then the ghost
    starts = torch.cat([F.pad(passed, (1, 0))[:, :length:size], counts], dim=1)
    num_segments = starts.shape[1]
    of_row = torch.arange(num_segments, device=order.device)
    segments = (order // size).masked_fill(~real, num_segments - 1) + numbers * num_segments
    # windows end where a column is missing
    breaks = F.pad(order.diff(dim=1) != 1, (1, 0), value=True) | (places == counts)
    return BatchLayout(
        cu_seqlens=_offsets(torch.cat([counts * 0, counts], dim=1), length),
        cu_segments=_offsets(starts, length),
        token_segments=segments.flatten(),
        segment_sequences=(2 * numbers + (of_row == num_segments - 1)).flatten(),
        token_marks=token_marks(breaks.flatten()),
        max_seqlen=length,
        max_segment_len=length,
        has_empty_segments=True,
        # in a row of nothing but ghosts one is shown, or softmax would find nothing to be over
        rows=Rows(num_rows=num_rows, length=length, mask=places < counts.clamp(min=1), places=None),
    )


def _offsets(starts: Tensor, length: int) -> Tensor:
    """Starts in each row `[S, K]` -> `[S K + 1]` int32 in the stream."""
    rows = torch.arange(len(starts), device=starts.device).unsqueeze(1) * length
    return F.pad((starts + rows).flatten(), (0, 1), value=len(starts) * length).int()
