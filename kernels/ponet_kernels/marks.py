"""What each token's local window may see, one byte a token: computed once a batch.

A run is a stretch of tokens that local windows treat as neighbours; sequences, places where padding
was taken out and special tokens that are kept apart end runs.
"""

import torch
from torch import Tensor

SEES_LEFT = 1
"""The token before lies in the same run."""
SEES_RIGHT = 2
"""The token after lies in the same run."""
SPECIAL = 4
"""The token receives global aggregation only."""


def token_marks(cu_runs: Tensor, num_tokens: int, special_tokens: Tensor | None = None) -> Tensor:
    """Marks of a stream.

    Args:
        cu_runs: `[R + 1]`, int32, offsets of the runs into the tokens, ascending, from 0 to T.
        num_tokens: T.
        special_tokens: `[X]`, int64, places of the special tokens.

    Returns:
        `[T]`, uint8, sums of `SEES_LEFT`, `SEES_RIGHT` and `SPECIAL`.
    """
    starts = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_runs.device)
    starts[cu_runs.long()] = True
    marks = (~starts[:-1]).to(torch.uint8) * SEES_LEFT
    marks += (~starts[1:]).to(torch.uint8) * SEES_RIGHT
    if special_tokens is not None:
        marks[special_tokens] += SPECIAL
    return marks
