"""Operators of the PoNet token mixer (arXiv 2110.02442, section 3) on packed streams of tokens.

A packed stream holds the tokens of all sequences of a batch back to back, without padding. Offsets
into it are int32 tensors of length "count + 1", as in `cu_seqlens` of variable-length attention.
All are registered with PyTorch as `torch.ops.ponet.*`: they run under `torch.compile` without graph
breaks, in `torch.export`, activation checkpointing and autocast.
"""

from ponet_kernels.dispatch import active_backend, use_backend
from ponet_kernels.fused_pooling import fused_pooling
from ponet_kernels.fusion import pooling_fusion
from ponet_kernels.global_aggregation import global_aggregation, global_mean
from ponet_kernels.local_max import local_max
from ponet_kernels.marks import token_marks
from ponet_kernels.segment_max import segment_max

__all__ = [
    "active_backend",
    "fused_pooling",
    "global_aggregation",
    "global_mean",
    "local_max",
    "pooling_fusion",
    "segment_max",
    "token_marks",
    "use_backend",
]
