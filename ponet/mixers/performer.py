"""Performer: softmax attention estimated with positive orthogonal random features (FAVOR+).

Choromanski et al., arXiv 2009.14794, lemma 1 and section 2.4: with x scaled by D^(-1/4) and random
w_1 .. w_M, phi(x)_i = exp(w_i . x - |x|^2 / 2) / sqrt(M) has E[phi(q) . phi(k)] = exp(q . k); then
out_t = phi(q_t)^T (sum_s phi(k_s) v_s^T) / (phi(q_t)^T sum_s phi(k_s)).
Rows `[B, H, N, D]`, M = `num_random_features`, the same w for all heads; time O(B N C M), memory
O(B H N M). Keys at padding contribute to neither sum. There are no probabilities to drop.
"""

import torch
from torch import Tensor

from ponet.config import PoNetConfig
from ponet.mixers.attention import QueryKeyValueMixer


class PerformerAttention(QueryKeyValueMixer):
    """FAVOR+ in float32 outside autocast: exponentials enlarge rounding errors.

    The features are drawn once with a fixed seed: every layer of every run has the same ones.
    """

    features: Tensor

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        size = config.hidden_size // config.num_attention_heads
        features = orthogonal_features(config.num_random_features, size)
        self.register_buffer("features", features.to(self.query.weight))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v, features = (x.to(wide) for x in (query, key, value, self.features))
        with torch.autocast(query.device.type, enabled=False):
            return _favor(q, k, v, features, mask).to(value.dtype)


def orthogonal_features(num_features: int, size: int, seed: int = 0) -> Tensor:
    """Gaussian vectors of which each block of `size` is orthogonal, section 2.4: `[M, D]` float64.

    No other random number depends on their generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float64)

    blocks = []
    for _ in range(0, num_features, size):
        orthogonal, upper = torch.linalg.qr(normal(size, size))
        # QR alone favours one direction; with the signs of the diagonal all are equally likely
        blocks.append((orthogonal * upper.diagonal().sign()).mT)
    lengths = normal(num_features, size).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num_features] * lengths


def _favor(
    query: Tensor, key: Tensor, value: Tensor, features: Tensor, mask: Tensor | None
) -> Tensor:
    scale = query.shape[-1] ** -0.25
    # factors common to all features of a query cancel: |q|^2 / 2 and 1 / sqrt(M) are left out
    query = (query * scale) @ features.mT
    key = key * scale
    key = key @ features.mT - key.square().sum(dim=-1, keepdim=True) / 2
    if mask is not None:
        key = key.masked_fill(~mask[:, None, :, None], torch.finfo(key.dtype).min)
    # the logarithm of each feature's sum over the keys moves to the queries, whose softmax then is
    # numerator and denominator at once: exact, and nothing can overflow or vanish
    peak = key.detach().amax(dim=2, keepdim=True)
    key = (key - peak).exp()
    total = key.sum(dim=2, keepdim=True)
    weights = (query + peak + total.log()).softmax(dim=-1)
    return weights @ (key.mT @ value / total.mT)
