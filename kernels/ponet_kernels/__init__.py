"""Operators of the PoNet token mixer (arXiv 2110.02442, section 3) on packed streams of tokens.

Each takes a `PackedLayout`. All are registered with PyTorch as `torch.ops.ponet.*`: they run under
`torch.compile` without graph breaks, in `torch.export`, activation checkpointing and autocast.
"""

from ponet_kernels.dispatch import active_backend, use_backend
from ponet_kernels.fused_pooling import fused_pooling
from ponet_kernels.global_aggregation import global_aggregation, global_mean
from ponet_kernels.layout import PackedLayout, token_marks
from ponet_kernels.local_pooling import local_pooling
from ponet_kernels.multi_granularity_pooling import multi_granularity_pooling
from ponet_kernels.segment_max import segment_max

__all__ = [
    "PackedLayout",
    "active_backend",
    "fused_pooling",
    "global_aggregation",
    "global_mean",
    "local_pooling",
    "multi_granularity_pooling",
    "segment_max",
    "token_marks",
    "use_backend",
]
