"""Linformer: softmax attention over keys and values projected along the tokens.

Wang et al., arXiv 2006.04768, equation 7: softmax(Q (E K)^T / sqrt(D)) (F V) with E and F
`[K, max_position_embeddings]`, K = `linformer_size`. Of the ways to share them in section 4, this
is "headwise": one E and one F per layer, the same for all heads. Rows `[B, H, N, D]`; time
O(B N C K), memory O(B H N K), or O(B N C) where the scores stay in a kernel.

A sequence of N tokens meets the first N columns. Keys and values at padding are zero before they
are projected, so padding contributes nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.mixers.attention import QueryKeyValueMixer


class LinformerAttention(QueryKeyValueMixer):
    """Attention to a fixed number of mixtures of tokens."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        shape = (config.linformer_size, config.max_position_embeddings)
        # that of the other initial weights, as in the published Long Range Arena code
        deviation = config.initializer_range
        self.key_projection = nn.Parameter(torch.empty(shape).normal_(std=deviation))
        self.value_projection = nn.Parameter(torch.empty(shape).normal_(std=deviation))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        length, longest = key.shape[2], self.key_projection.shape[1]
        if length > longest:
            raise ValueError(
                f"mixer linformer: rows have {length} tokens, max_position_embeddings is {longest}"
            )
        key = self.key_projection[:, :length] @ key
        value = self.value_projection[:, :length] @ value
        return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout_now)
