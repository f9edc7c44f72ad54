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

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lra.tasks import Task

Protocol = Literal["published", "clean"]

_MIXERS_WITHOUT_MASK = ("fnet",)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Sequences as the encoder takes them: rows `[S, N]`, or a stream `[T]` with offsets."""

    input_ids: Tensor
    """`[S, N]` or `[T]`, int64."""
    position_ids: Tensor
    """Like `input_ids`, the column of each token."""
    segment_ids: Tensor
    """Like `input_ids`."""
    real: Tensor
    """Like `input_ids`, bool: the token counts."""
    cu_seqlens: Tensor | None
    """`[S + 1]` int32, offsets of a stream; None: rows."""
    scale: Tensor
    """`[S]`, by which the mean over what the encoder saw is multiplied."""
    mixes_padding: bool
    """The encoder sees the whole rows, and the states of what does not count are dropped."""

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments of `PoNetModel.encode`."""
        masked = self.cu_seqlens is None and not self.mixes_padding
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "segment_ids": self.segment_ids,
            "attention_mask": self.real if masked else None,
            "cu_seqlens": self.cu_seqlens,
        }


def model_inputs(
    ids: Tensor, lengths: Tensor, *, protocol: Protocol, task: Task, mixer: str, num_segments: int
) -> ModelInputs:
    """Bring sequences into the form of a protocol.

    Args:
        ids: `[T]` int64, all sequences end to end.
        lengths: `[S]` int64, tokens of each.
        protocol: see the module.
        task: decides the length of rows.
        mixer: key of `ponet.mixers.MIXERS`.
        num_segments: a segment has `seq_len // num_segments + 1` columns.

    Returns:
        Tensors on the device of `ids`.
    """
    size = task.seq_len // num_segments + 1
    mixes_padding = mixer in _MIXERS_WITHOUT_MASK
    if protocol == "clean" and not mixes_padding:
        return _stream(ids, lengths, size)
    columns = torch.arange(task.seq_len, device=ids.device).expand(len(lengths), -1)
    filled = columns < lengths.unsqueeze(1)
    rows = ids.new_zeros(filled.shape).masked_scatter(filled, ids)
    real = rows != 0 if protocol == "published" else filled
    counted = real.sum(dim=1)
    seen = torch.full_like(counted, task.seq_len) if mixes_padding else counted
    divisor = torch.full_like(counted, task.seq_len) if protocol == "published" else counted
    return ModelInputs(
        input_ids=rows,
        position_ids=columns,
        segment_ids=columns // size,
        real=real,
        cu_seqlens=None,
        scale=seen / divisor,
        mixes_padding=mixes_padding,
    )


def _stream(ids: Tensor, lengths: Tensor, segment_size: int) -> ModelInputs:
    ends = lengths.cumsum(0)
    columns = torch.arange(len(ids), device=ids.device)
    columns = columns - (ends - lengths).repeat_interleave(lengths)
    return ModelInputs(
        input_ids=ids,
        position_ids=columns,
        segment_ids=columns // segment_size,
        real=torch.ones_like(ids, dtype=torch.bool),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).int(),
        scale=torch.ones(len(lengths), device=ids.device),
        mixes_padding=False,
    )
