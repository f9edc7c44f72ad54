"""The PoNet mixer as published: five projections of every token, rectangles, masks.

The readable reference of `ponet.mixers.pooling` and the baseline of the benchmarks. Same
parameters, same function.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ponet.mixers.pooling import PoNetMixer
from ponet.packing import BatchLayout
from ponet_kernels.layout import SEES_LEFT


class PublishedPoNetMixer(PoNetMixer):
    """Eager PyTorch on rows `[B, N, C]`, made from the stream and turned back into it."""

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """As `PoNetMixer.forward`.

        Raises:
            ValueError: padding was taken out between two tokens, where rows cannot keep a gap.
        """
        rows, real = layout.rows.from_stream(hidden), layout.rows.mask
        if real is None:
            real = rows.new_ones(rows.shape[:2], dtype=torch.bool)

        mixed = torch.zeros_like(rows)
        if self.config.use_global:
            mixed = mixed + self._global(rows, real)
        if self.config.use_segment:
            mixed = mixed + self._segment(rows, real, layout)
        mixed = mixed * self.output(rows)
        if self.config.use_local:
            mixed = mixed + self._local(rows, real, layout)
        return self.dense(layout.rows.to_stream(mixed))

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

    def _segment(self, rows: Tensor, real: Tensor, layout: BatchLayout) -> Tensor:
        values = self.segment(rows).masked_fill(~real.unsqueeze(-1), -torch.inf)
        # numbers of the segments in their own sequence
        sequences = torch.arange(layout.num_sequences, device=values.device)
        first = torch.searchsorted(layout.segment_sequences, sequences)
        numbers = layout.token_segments - first.index_select(0, layout.token_sequences)
        index = layout.rows.from_stream(numbers.unsqueeze(1)).expand_as(values)
        count = int(numbers.max()) + 1 if len(numbers) else 1
        maxima = values.new_full((len(rows), count, values.shape[-1]), -torch.inf)
        maxima = maxima.scatter_reduce(1, index, values, "amax")
        return maxima.gather(1, index).masked_fill(self._apart(real, layout), 0.0)

    def _local(self, rows: Tensor, real: Tensor, layout: BatchLayout) -> Tensor:
        _refuse_gaps(layout)
        values = self.local(rows).masked_fill(self._apart(real, layout), -torch.inf)
        pooled = F.max_pool1d(values.mT, kernel_size=3, stride=1, padding=1).mT
        return pooled.masked_fill(self._apart(real, layout), 0.0)

    def _apart(self, real: Tensor, layout: BatchLayout) -> Tensor:
        return ~real.unsqueeze(-1) | layout.rows.from_stream(layout.special.unsqueeze(1))


def _refuse_gaps(layout: BatchLayout) -> None:
    sees_left = (layout.token_marks[1:] & SEES_LEFT) != 0
    sequences, special = layout.token_sequences, layout.special
    neighbours = (sequences[1:] == sequences[:-1]) & ~special[1:] & ~special[:-1]
    if (neighbours & ~sees_left).any():
        raise ValueError("mixer ponet_published: attention_mask has padding between real tokens")
