"""Nystromformer, arXiv 2102.03902, section 3: softmax attention from a few landmarks.

With m landmarks q', k' (means of queries and keys) and s(a, b) = softmax(a b^T / sqrt(D)),
out = s(q, k') Z (s(q', k) v) + conv(v), where Z approximates the pseudo-inverse of A = s(q', k') by
six steps of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from A^T / (|A|_1 |A|_inf). The
depth-wise convolution over tokens is one filter per head. No attention dropout, as published. Time
and memory are O(N m C).

The published model needs a length that m divides. Here the real tokens of a sequence are cut into m
chunks as equal as whole tokens allow, which is the same where m divides the length; a sequence of
at most m tokens has softmax attention, as the published one has for exactly m. Padding is masked as
key, is in no landmark, and is zero under the convolution. The norms of A are of each sequence and
head, as in the paper; the published code takes the maximum over the batch unless told otherwise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import ConfigError, PoNetConfig
from ponet.mixers.projections import QueryKeyValueProjections, cast_for_projections
from ponet.packing import BatchLayout
from ponet_kernels import PackedLayout, global_mean


class NystromAttention(QueryKeyValueProjections):
    """Nystrom approximation of softmax attention, with a convolution as a skip connection."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.num_landmarks = config.num_landmarks
        self.conv = value_convolution(config)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        hidden = cast_for_projections(hidden)
        rows = layout.rows
        lengths = layout.cu_seqlens.diff()
        query, key, value = (
            self.heads(rows.from_stream(projection(hidden)))
            for projection in (self.query, self.key, self.value)
        )  # [B, H, N, D]
        allowed = None if rows.mask is None else rows.mask[:, None, None]

        most = self.num_landmarks
        if rows.length <= most:
            mixed = F.scaled_dot_product_attention(query, key, value, allowed)
        else:
            landmarks = self._landmarks(hidden, layout)
            mixed = self._nystrom(query, key, value, landmarks, allowed)
            if allowed is not None:
                exact = F.scaled_dot_product_attention(
                    query[:, :, :most], key[:, :, :most], value[:, :, :most], allowed[..., :most]
                )
                exact = F.pad(exact, (0, 0, 0, rows.length - most))
                mixed = torch.where(lengths.view(-1, 1, 1, 1) <= most, exact, mixed)
        if self.conv is not None and rows.length:
            mixed = mixed + self.conv(value)
        return self.dense(rows.to_stream(mixed.transpose(1, 2).flatten(2)))

    def _landmarks(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """Means of the hidden states of each chunk, `[B, m, C]`, zero for a chunk without tokens.

        Projections of the means are the means of the projections.
        """
        m = self.num_landmarks
        lengths = layout.cu_seqlens.diff().long().unsqueeze(1)
        chunks = torch.arange(m, device=hidden.device)
        # token t is in chunk t * m // length
        starts = -(-chunks * lengths.clamp(min=m) // m)
        starts = layout.cu_seqlens[:-1].unsqueeze(1) + torch.minimum(starts, lengths)
        offsets = torch.cat([starts.flatten(), layout.cu_seqlens[-1:]]).int()
        chunked = PackedLayout.of_sequences(offsets, layout.num_tokens, -(-layout.rows.length // m))
        means = global_mean(hidden, chunked)
        return means.to(hidden.dtype).view(-1, m, hidden.shape[1])

    def _nystrom(
        self, query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, allowed: Tensor | None
    ) -> Tensor:
        queries, keys = self.heads(self.query(landmarks)), self.heads(self.key(landmarks))
        summary = F.scaled_dot_product_attention(queries, key, value, allowed)  # [B, H, m, D]
        scores = queries @ keys.mT / keys.shape[-1] ** 0.5
        # in half precision the iteration would not converge
        with torch.autocast(scores.device.type, enabled=False):
            precise = torch.promote_types(scores.dtype, torch.float32)
            matrix = scores.softmax(dim=-1, dtype=precise)
            norm = matrix.sum(dim=-2).amax(dim=-1)
            inverse = pseudo_inverse(matrix, norm[..., None, None])
            summary = (inverse @ summary.to(precise)).to(query.dtype)
        return F.scaled_dot_product_attention(query, keys, summary)


def value_convolution(config: PoNetConfig) -> nn.Conv2d | None:
    """One filter per head along the tokens, over values `[B, H, N, D]`; None: without."""
    size, heads = config.landmark_conv_size, config.num_attention_heads
    if size is None:
        return None
    if size % 2 == 0:
        raise ConfigError(f"landmark_conv_size must be odd, found {size}")
    return nn.Conv2d(heads, heads, (size, 1), 1, (size // 2, 0), groups=heads, bias=False)


def pseudo_inverse(matrix: Tensor, norm: Tensor) -> Tensor:
    """Six steps of third order from the transposed matrix over a norm.

    Rows of `matrix` sum to one, so its infinity norm is 1; `norm` is its 1-norm or a larger number.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = matrix.mT / norm
    for _ in range(6):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse
