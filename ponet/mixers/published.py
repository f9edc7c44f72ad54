"""The PoNet mixer as published: five projections of every token, rectangles, masks.

The readable reference of `ponet.mixers.pooling` and the baseline of the benchmarks. Same
parameters, same function. It has the published poolings only.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ponet.config import ConfigError, PoNetConfig
from ponet.mixers.pooling import PoNetMixer
from ponet.packing import BatchLayout
from ponet_kernels.layout import SEES_LEFT


class PublishedPoNetMixer(PoNetMixer):
    """Eager PyTorch on rows `[B, N, C]`, made from the stream and turned back into it.

    Raises:
        ConfigError: the configuration asks for other poolings than the published.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        for name in ("segment_pooling", "local_pooling", "local_window"):
            published, found = getattr(PoNetConfig, name), getattr(config, name)
            if found != published:
                raise ConfigError(
                    f"mixer ponet_published: {name} must be {published}, found {found}; "
                    "the mixer ponet has others"
                )

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        if not len(hidden):
            # rows without columns have no windows
            return self.dense(hidden)
        rows, config = layout.rows.from_stream(hidden), self.config
        mixed = torch.zeros_like(rows)
        if config.use_global:
            queries = self.query(rows)
            keys = self.key(rows) if config.use_global_second_stage else None
            mixed = mixed + published_global(queries, keys, config.num_attention_heads, layout)
        if config.use_segment:
            mixed = mixed + published_segment_max(self.segment(rows), layout)
        mixed = mixed * self.output(rows)
        if config.use_local:
            mixed = mixed + published_local_max(self.local(rows), layout)
        return self.dense(layout.rows.to_stream(mixed))


def published_global(
    queries: Tensor, keys: Tensor | None, heads: int, layout: BatchLayout
) -> Tensor:
    """g' from queries and keys `[B, N, C]`, or g when there are no keys: `[B, 1, C]`."""
    real = _real(queries, layout)
    g = queries.masked_fill(~real.unsqueeze(-1), 0.0).sum(dim=1, keepdim=True)
    g = g / real.sum(dim=1).clamp(min=1).view(-1, 1, 1)
    if keys is None:
        return g
    g, keys = (rearrange(x, "b n (h e) -> b h n e", h=heads) for x in (g, keys))
    logits = g @ keys.mT / keys.shape[-1] ** 0.5
    logits = logits.masked_fill(~real[:, None, None, :], torch.finfo(logits.dtype).min)
    return rearrange(logits.softmax(dim=-1) @ keys, "b h n e -> b n (h e)")


def published_segment_max(values: Tensor, layout: BatchLayout) -> Tensor:
    """Maximum of each token's segment, `[B, N, C]` -> `[B, N, C]`; 0 at special tokens."""
    values = values.masked_fill(~_real(values, layout).unsqueeze(-1), -torch.inf)
    # numbers of the segments in their own sequence
    sequences = torch.arange(layout.num_sequences, device=values.device)
    first = torch.searchsorted(layout.segment_sequences, sequences)
    numbers = layout.token_segments - first.index_select(0, layout.token_sequences)
    index = layout.rows.from_stream(numbers.unsqueeze(1)).expand_as(values)
    count = int(numbers.max()) + 1 if len(numbers) else 1
    maxima = values.new_full((len(values), count, values.shape[-1]), -torch.inf)
    maxima = maxima.scatter_reduce(1, index, values, "amax")
    return maxima.gather(1, index).masked_fill(_apart(values, layout), 0.0)


def published_local_max(values: Tensor, layout: BatchLayout) -> Tensor:
    """Maximum of windows of three tokens, `[B, N, C]` -> `[B, N, C]`; 0 at special tokens."""
    # where padding was taken out between two tokens: rows cannot keep a gap
    sees_left = (layout.token_marks[1:] & SEES_LEFT) != 0
    sequences, special = layout.token_sequences, layout.special
    neighbours = (sequences[1:] == sequences[:-1]) & ~special[1:] & ~special[:-1]
    if (neighbours & ~sees_left).any():
        raise ValueError("mixer ponet_published: attention_mask has padding between real tokens")
    values = values.masked_fill(_apart(values, layout), -torch.inf)
    pooled = F.max_pool1d(values.mT, kernel_size=3, stride=1, padding=1).mT
    return pooled.masked_fill(_apart(values, layout), 0.0)


def _real(rows: Tensor, layout: BatchLayout) -> Tensor:
    mask = layout.rows.mask
    return rows.new_ones(rows.shape[:2], dtype=torch.bool) if mask is None else mask


def _apart(rows: Tensor, layout: BatchLayout) -> Tensor:
    special = layout.rows.from_stream(layout.special.unsqueeze(1))
    return ~_real(rows, layout).unsqueeze(-1) | special
