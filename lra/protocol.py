"""How sequences of ids reach the model and what its mean is taken over, in two protocols.

published   As in the code behind the published comparison. A row has the model's full length; id 0
            is absent, whether it is padding or a black pixel, so black pixels take no part in
            anything; the states of the other tokens are summed and divided by the full length.
clean       All that is in an example and nothing else: no padding, black pixels are tokens, and
            the mean is over the tokens. What a sequence becomes does not depend on its batch.

Tokens keep their column as position, and segments are chunks of the same number of columns, in
both. FNet knows no mask: in both protocols it mixes rows of full length, padding included, and
what comes out at absent tokens is dropped, as published.

The mixers of `ponet.mixers` never see an absent token. For PoNet, softmax, linear and Performer
attention this equals the published masking; the others (windows, blocks, hashes, landmarks,
Linformer) count what is left, and so differ from a masked rectangle where black pixels are absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lra.tasks import Task
from ponet.batch import HostBatch
from ponet.packing import BatchLayout, TokenStream, layout_of, stream_of_rows

Protocol = Literal["published", "clean"]

MIXERS_WITHOUT_MASK = ("fnet",)
"""They see whole rows."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Sequences as the encoder takes them: a stream `[T]` with its layout."""

    input_ids: Tensor
    """`[T]` int64."""
    position_ids: Tensor
    """`[T]` int64, the column of each token."""
    layout: BatchLayout
    """Of the stream."""
    counted: Tensor | None
    """`[T]` bool, the tokens whose states count; None: all."""
    scale: Tensor
    """`[S]`, by which the mean over what the encoder saw is multiplied."""
    num_ghosts: int = 0
    """Sequences behind those of the batch that do not count."""

    def to(
        self, device: torch.device, beside: Mapping[str, Tensor]
    ) -> "tuple[ModelInputs, dict[str, Tensor]]":
        """Move from the host by one copy that nothing waits for.

        Args:
            device: where to.
            beside: other tensors of the batch.

        Returns:
            Both on the device.
        """
        names = ("input_ids", "position_ids", "counted", "scale")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        moved = HostBatch({**own, **beside}, self.layout).to(device)
        others = {name: moved.pop(name) for name in beside}
        return replace(self, **moved), others


def segment_columns(task: Task, num_segments: int) -> int:
    """Columns of a segment, the last of a row excepted."""
    return task.seq_len // num_segments + 1


def model_inputs(
    ids: Tensor, lengths: Tensor, *, protocol: Protocol, task: Task, mixer: str, num_segments: int
) -> ModelInputs:
    """Bring sequences into the form of a protocol; on the host, sizes depend on the values.

    Args:
        ids: `[T]` int64, all sequences end to end.
        lengths: `[S]` int64, tokens of each.
        protocol: see the module.
        task: decides the length of rows.
        mixer: key of `ponet.mixers.MIXERS`.
        num_segments: a segment has `seq_len // num_segments + 1` columns.
    """
    size = segment_columns(task, num_segments)
    if mixer in MIXERS_WITHOUT_MASK:
        return _whole_rows(ids, lengths, protocol, task, size)
    sequences = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=len(ids))
    columns = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths).index_select(0, sequences)
    row_length, scale = int(lengths.max()), torch.ones(len(lengths))
    if protocol == "published":
        present = ids.nonzero().squeeze(1)
        ids, sequences, columns = (x.index_select(0, present) for x in (ids, sequences, columns))
        lengths = sequences.bincount(minlength=len(lengths))
        row_length, scale = task.seq_len, lengths / task.seq_len
    stream = TokenStream(
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        sequences=sequences,
        positions=columns,
        row_length=row_length,
        index=None,
        rows=None,
    )
    return ModelInputs(
        input_ids=ids,
        position_ids=columns,
        layout=_cut(stream, size),
        counted=None,
        scale=scale,
    )


def _whole_rows(
    ids: Tensor, lengths: Tensor, protocol: Protocol, task: Task, size: int
) -> ModelInputs:
    filled = torch.arange(task.seq_len) < lengths.unsqueeze(1)
    rows = ids.new_zeros(filled.shape).masked_scatter(filled, ids)
    counted = rows != 0 if protocol == "published" else filled
    stream = stream_of_rows(rows, None)
    divisor = task.seq_len if protocol == "published" else lengths
    return ModelInputs(
        input_ids=rows.flatten(),
        position_ids=stream.positions,
        layout=_cut(stream, size),
        counted=counted.flatten(),
        scale=torch.full((len(lengths),), task.seq_len) / divisor,
    )


def _cut(stream: TokenStream, size: int) -> BatchLayout:
    special = torch.zeros_like(stream.positions, dtype=torch.bool)
    return layout_of(stream, special, stream.positions // size)
