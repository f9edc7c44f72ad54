"""What the mixers that attend in blocks have in common: Longformer and BigBird.

Each block of queries gets its keys side by side, `[blocks, keys]`, and a mask of the pairs that may
attend; scaled dot-product attention does the rest, on every device, in memory linear in the tokens.
FlexAttention would save the copies of the keys on a GPU, but PyTorch 2.13 refuses its backward on a
CPU: there would be two paths, one of which no test without a GPU reaches.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import PoNetConfig


class BlockSparseAttention(nn.Module):
    """The four projections, and attention of blocks of queries to the keys gathered for them."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v over the allowed pairs of each block.

        Args:
            query: `[G, H, Q, D]`, G blocks of Q queries.
            key, value: `[G, H, K, D]`.
            allowed: `[G, 1, Q or 1, K]` bool; a query without any allowed key would become NaN.

        Returns:
            `[G, H, Q, D]`.
        """
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, allowed, dropout)


def pad_tokens(values: Tensor, length: int) -> Tensor:
    """`[..., N, C]` -> `[..., length, C]`, zeros behind; no copy where nothing is missing."""
    missing = length - values.shape[-2]
    return F.pad(values, (0, 0, 0, missing)) if missing else values
