"""The backend "triton": kernels for NVIDIA and AMD GPUs, also in Triton's interpreter on a CPU.

No atomics: two runs on the same input agree bit by bit. Block sizes are plain functions of shape
and dtype; nothing is tuned at run time. `python -m ponet_kernels.compile_report` compiles every
kernel without a GPU.
"""

from ponet_kernels.triton_kernels.fusion import fusion_bwd, fusion_fwd
from ponet_kernels.triton_kernels.global_aggregation import (
    sequence_sums,
    sequence_totals,
    spread_rows,
    token_scores,
)
from ponet_kernels.triton_kernels.segment_max import segment_max_bwd, segment_max_fwd
from ponet_kernels.triton_kernels.sequence_softmax import sequence_softmax

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
