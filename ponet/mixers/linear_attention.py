"""Linear attention: a kernel of two feature maps in place of the softmax.

Katharopoulos et al., arXiv 2006.16236, equations 5 and 7, not causal:
out_t = phi(q_t)^T (sum_s phi(k_s) v_s^T) / (phi(q_t)^T sum_s phi(k_s)), phi(x) = elu(x) + 1.
Rows `[B, H, N, D]`; time O(B N C D), memory O(B N C). Keys at padding contribute to neither sum.
There are no probabilities to drop.
"""

from torch import Tensor
from torch.nn import functional as F

from ponet.mixers.attention import QueryKeyValueMixer


class LinearAttention(QueryKeyValueMixer):
    """Attention with the feature map elu(x) + 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key = F.elu(query) + 1, F.elu(key) + 1
        # means over the tokens instead of sums: the ratio is the same, and float16 holds them
        if mask is None:
            key = key / key.shape[2]
        else:
            real = mask[:, None, :, None]
            count = real.sum(dim=2, keepdim=True).clamp(min=1)
            key = key.masked_fill(~real, 0.0) / count
        total = query @ key.sum(dim=2).unsqueeze(-1)
        # features are positive but round to zero far below zero
        return query @ (key.mT @ value) / total.clamp(min=1e-6)
