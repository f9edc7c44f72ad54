"""The PoNet mixer as published: five projections of every token, rectangles, masks.

The readable reference of `ponet.mixers.pooling` and the baseline of the benchmarks. Same
parameters, same function.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ponet.mixers.pooling import PoNetMixer
from ponet.packing import PackedLayout


class EagerPoNetMixer(PoNetMixer):
    """Eager PyTorch on rows `[B, N, C]`, made from the stream and turned back into it."""

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """As `PoNetMixer.forward`.

        Raises:
            ValueError: padding was taken out between two tokens, where rows cannot keep a gap.
        """
        lengths = layout.cu_seqlens.diff().long()
        longest = int(lengths.max()) if len(lengths) else 0
        columns = torch.arange(longest, device=hidden.device)
        real = columns < lengths.unsqueeze(1)
        rows = _to_rows(hidden, real)

        mixed = torch.zeros_like(rows)
        if self.config.use_global:
            mixed = mixed + self._global(rows, real)
        if self.config.use_segment:
            mixed = mixed + self._segment(rows, real, layout)
        mixed = mixed * self.output(rows)
        if self.config.use_local:
            mixed = mixed + self._local(rows, real, layout)
        return self.dense(mixed[real])

    def _global(self, rows: Tensor, real: Tensor) -> Tensor:
        queries = self.query(rows).masked_fill(~real.unsqueeze(-1), 0.0)
        g = queries.sum(dim=1, keepdim=True) / real.sum(dim=1).clamp(min=1).view(-1, 1, 1)
        if not self.config.use_global_second_stage:
            return g
        heads = self.config.num_attention_heads
        keys = rearrange(self.key(rows), "b n (h e) -> b h n e", h=heads)
        g = rearrange(g, "b n (h e) -> b h n e", h=heads)
        logits = g @ keys.mT / keys.shape[-1] ** 0.5
        logits = logits.masked_fill(~real[:, None, None, :], torch.finfo(logits.dtype).min)
        return rearrange(logits.softmax(dim=-1) @ keys, "b h n e -> b n (h e)")

    def _segment(self, rows: Tensor, real: Tensor, layout: PackedLayout) -> Tensor:
        values = self.segment(rows).masked_fill(~real.unsqueeze(-1), -torch.inf)
        first = layout.token_segments[layout.cu_seqlens[:-1].clamp(max=_last(layout)).long()]
        ids = layout.token_segments - first[_sequences(layout)]
        index = _to_rows(ids.unsqueeze(1), real).expand_as(values)
        count = int(ids.max()) + 1 if len(ids) else 1
        maxima = values.new_full((len(rows), count, values.shape[-1]), -torch.inf)
        maxima = maxima.scatter_reduce(1, index, values, "amax")
        return maxima.gather(1, index).masked_fill(self._apart(real, layout), 0.0)

    def _local(self, rows: Tensor, real: Tensor, layout: PackedLayout) -> Tensor:
        _refuse_gaps(layout)
        values = self.local(rows).masked_fill(self._apart(real, layout), -torch.inf)
        pooled = F.max_pool1d(values.mT, kernel_size=3, stride=1, padding=1).mT
        return pooled.masked_fill(self._apart(real, layout), 0.0)

    def _apart(self, real: Tensor, layout: PackedLayout) -> Tensor:
        special = torch.zeros_like(layout.token_segments, dtype=torch.bool)
        special[layout.special_tokens] = True
        return ~real.unsqueeze(-1) | _to_rows(special.unsqueeze(1), real)


def _to_rows(values: Tensor, real: Tensor) -> Tensor:
    rows = values.new_zeros(*real.shape, values.shape[1])
    return rows.masked_scatter(real.unsqueeze(-1), values)


def _sequences(layout: PackedLayout) -> Tensor:
    return layout.segment_sequences[layout.token_segments]


def _last(layout: PackedLayout) -> int:
    return max(len(layout.token_segments) - 1, 0)


def _refuse_gaps(layout: PackedLayout) -> None:
    starts = torch.zeros_like(layout.token_segments, dtype=torch.bool)
    starts[layout.special_tokens] = True
    starts[1:] |= starts[:-1].clone()
    starts[layout.cu_seqlens[:-1].clamp(max=_last(layout)).long()] = True
    if len(layout.cu_runs) - 1 > int(starts.sum()):
        raise ValueError("mixer ponet_eager: attention_mask has padding between real tokens")
