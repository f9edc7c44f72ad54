"""The *Linear* encoder of the FNet paper: two dense matrices in place of the Fourier transform.

Lee-Thorp et al., arXiv 2105.03824, section 3.3: y = S x R on rows `[B, N, C]`, with learned S
`[max_position_embeddings, max_position_embeddings]` over the tokens and R `[C, C]` over the
channels, no bias, no attention, nothing else; time O(B N C (N + C)).

A sequence of N tokens meets the first N rows and columns of S. Padding counts as zero vectors, so
it changes nothing.
"""

import torch
from torch import Tensor, nn

from ponet.config import PoNetConfig
from ponet.packing import BatchLayout


class FNetLinearMixer(nn.Module):
    """A matrix over the tokens and one over the channels; not linear attention."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        # 0.02 as published; both are of the size of the model's other initial weights
        deviation = config.initializer_range
        length, width = config.max_position_embeddings, config.hidden_size
        self.token_weight = nn.Parameter(torch.empty(length, length).normal_(std=deviation))
        self.channel_weight = nn.Parameter(torch.empty(width, width).normal_(std=deviation))

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`; a row longer than S is a `ValueError`."""
        rows, longest = layout.rows, len(self.token_weight)
        if rows.length > longest:
            raise ValueError(
                f"mixer fnet_linear: rows have {rows.length} tokens, max_position_embeddings is "
                f"{longest}"
            )
        weight = self.token_weight[: rows.length, : rows.length]
        return rows.to_stream(weight @ rows.from_stream(hidden @ self.channel_weight))
