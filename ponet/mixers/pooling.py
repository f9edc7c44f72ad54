"""The PoNet token mixer: global aggregation, segment and local max-pooling, and their fusion.

PoNet, arXiv 2110.02442, section 3; out_t = (g' + S_{j(t)}) * O_t + L_t, then one projection.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.mixers.autocast import cast_for_projections
from ponet.packing import PackedLayout
from ponet_kernels import fused_pooling, global_aggregation, global_mean


class PoNetMixer(nn.Module):
    """Mixing of multi-granularity poolings; projections an ablation leaves unused do not exist."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
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

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            hidden: `[T, C]`, floating.
            layout: where sequences, segments and runs lie.

        Returns:
            `[T, C]`.
        """
        hidden = cast_for_projections(hidden)
        mixed = fused_pooling(
            self.pool_sequences(hidden, layout) if self.config.use_global else None,
            self.segment(hidden) if self.config.use_segment else None,
            self.output(hidden),
            self.local(hidden) if self.config.use_local else None,
            layout.cu_segments,
            layout.token_segments,
            layout.segment_sequences,
            layout.token_marks,
            layout.max_seqlen,
        )
        return self.dense(mixed)

    def pool_sequences(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """g' of each sequence, or g when the second stage is off: `[B, C]`."""
        if not self.config.use_global_second_stage:
            mean = global_mean(hidden, layout.cu_seqlens, layout.max_seqlen)
            return F.linear(mean.to(hidden.dtype), self.query.weight, self.query.bias)
        return global_aggregation(
            hidden,
            self.query.weight,
            self.query.bias,
            self.key.weight,
            self.key.bias,
            self.config.num_attention_heads,
            layout.cu_seqlens,
            layout.max_seqlen,
        )
