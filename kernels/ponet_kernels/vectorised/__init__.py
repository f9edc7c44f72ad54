"""The backend "torch": PyTorch operations arranged for CPU caches; runs on any device.

Fixed-length or ragged, nothing here is compiled. On a GPU the sequence functions read the offsets
back to the host once a call.
"""

from ponet_kernels.vectorised.fusion import fusion_bwd, fusion_fwd
from ponet_kernels.vectorised.global_aggregation import (
    sequence_softmax,
    sequence_sums,
    sequence_totals,
    spread_rows,
    token_scores,
)
from ponet_kernels.vectorised.segment_max import segment_max_bwd, segment_max_fwd

__all__ = [
    "fusion_bwd",
    "fusion_fwd",
    "segment_max_bwd",
    "segment_max_fwd",
    "sequence_softmax",
    "sequence_sums",
    "sequence_totals",
    "spread_rows",
    "token_scores",
]
