"""The PoNet token mixer: global aggregation, segment and local pooling, and their fusion.

PoNet, arXiv 2110.02442, section 3; out_t = (g' + S_{j(t)}) * O_t + L_t, then one projection. S and
L are maxima, L over three tokens; the configuration may ask for averages or other windows, for
which the kernels of maxima have an empty place and the term is added.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.mixers.projections import (
    all_plain,
    cast_for_projections,
    plain_parameters,
    project_together,
)
from ponet.packing import BatchLayout
from ponet_kernels import (
    fused_pooling,
    global_aggregation,
    global_mean,
    local_pooling,
    multi_granularity_pooling,
)


class PoNetMixer(nn.Module):
    """Mixing of multi-granularity poolings; projections an ablation leaves unused do not exist."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.has_segment_maxima = config.use_segment and config.segment_pooling == "max"
        windows = (config.local_pooling, config.local_window)
        self.has_local_maxima = config.use_local and windows == ("max", 3)
        if config.use_global:
            self.query = nn.Linear(width, width)
        if config.use_global and config.use_global_second_stage:
            self.key = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        if config.use_segment:
            self.segment = nn.Linear(width, width)
        if config.use_local:
            self.local = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """Mix the tokens of each sequence, `[T, C]` -> `[T, C]`."""
        hidden = cast_for_projections(hidden)
        plain = self.plain_projections()
        if plain is not None:
            heads = self.config.num_attention_heads
            return self.dense(multi_granularity_pooling(hidden, plain, heads, layout))
        config, values = self.config, self.project(hidden)
        mixed = fused_pooling(
            self.pool_sequences(hidden, layout) if config.use_global else None,
            values,
            layout,
            use_segment=self.has_segment_maxima,
            use_local=self.has_local_maxima,
        )
        if config.use_segment and not self.has_segment_maxima:
            mixed = mixed + self.fuse_segment_means(values[:, : config.hidden_size], hidden, layout)
        if config.use_local and not self.has_local_maxima:
            average = config.local_pooling == "average"
            window = config.local_window
            mixed = mixed + local_pooling(self.local(hidden), layout, window, average=average)
        return self.dense(mixed)

    def plain_projections(self) -> list[tuple[Tensor, Tensor]] | None:
        """Weight and bias of all five; None where a setting or an adapter changes the block."""
        config = self.config
        if not (config.use_global and config.use_global_second_stage):
            return None
        if not (self.has_segment_maxima and self.has_local_maxima):
            return None
        return all_plain((self.query, self.key, self.output, self.segment, self.local))

    def project(self, hidden: Tensor) -> Tensor:
        """Output, segment and local projections of each token, side by side: `[T, 3 C]`.

        Without those that are not used for the published maxima.
        """
        parts = [self.output]
        if self.has_segment_maxima:
            parts.append(self.segment)
        if self.has_local_maxima:
            parts.append(self.local)
        return project_together(hidden, parts)

    def fuse_segment_means(self, output: Tensor, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """S_{j(t)} * O_t with the mean of each segment for S, zero at special tokens: `[T, C]`."""
        kept = self.segment(hidden).masked_fill(layout.special.unsqueeze(1), 0.0)
        segments = layout.by_segment
        means = global_mean(kept, segments)
        return fused_pooling(means, output, segments, use_segment=False, use_local=False)

    def pool_sequences(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """g' of each sequence, or g when the second stage is off: `[B, C]`."""
        query = self.query
        if not self.config.use_global_second_stage:
            if plain_parameters(query) is None:
                return global_mean(query(hidden), layout)
            # the projection of the mean is the mean of the projections
            return query(global_mean(hidden, layout).to(hidden.dtype))
        key, heads = self.key, self.config.num_attention_heads
        plain = all_plain((query, key))
        if plain is None:
            return self.attend(query(hidden), key(hidden), layout)
        return global_aggregation(hidden, *plain[0], *plain[1], heads, layout)

    def attend(self, queries: Tensor, keys: Tensor, layout: BatchLayout) -> Tensor:
        """g' `[B, C]`: the mean query attends over the keys `[T, C]`, which are the values too."""
        heads = self.config.num_attention_heads
        g = global_mean(queries, layout).to(keys.dtype).unflatten(1, (heads, 1, -1))
        keys = layout.rows.from_stream(keys).unflatten(2, (heads, -1)).transpose(1, 2)
        mask = layout.rows.mask
        keys_shown = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(g, keys, keys, keys_shown).flatten(1)
