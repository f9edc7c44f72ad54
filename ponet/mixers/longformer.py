"""Longformer, arXiv 2004.05150, section 3.1: sliding window attention without global tokens.

A token attends to itself and to w = `attention_window` // 2 tokens on each side, in its sequence:
out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over |i - j| <= w; where the sequence is shorter
than that, this is full attention. Time and memory are O(T w C).

The stream `[T, C]` is cut into blocks of w queries, wherever sequences begin; each sees the 3 w
keys of its own block and both neighbours, through a view that copies nothing. Sequences are told
apart by the mask; only the last block is filled up. FlexAttention is not used, here and in BigBird,
because PyTorch 2.13 refuses its backward on a CPU.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet.config import ConfigError, PoNetConfig
from ponet.mixers.projections import (
    QueryKeyValueProjections,
    cast_for_projections,
    pad_tokens,
)
from ponet.packing import BatchLayout


class SlidingWindowAttention(QueryKeyValueProjections):
    """Attention to the neighbours in a window; every layer has the same window."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.reach = config.attention_window // 2
        if self.reach < 1:
            found = config.attention_window
            raise ConfigError(f"attention_window must be at least 2, found {found}")

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        hidden = cast_for_projections(hidden)
        num_tokens = hidden.shape[0]
        length = max(-(-num_tokens // self.reach), 1) * self.reach
        query = pad_tokens(self.query(hidden), length)
        query = query.view(-1, self.reach, self.num_heads, query.shape[-1] // self.num_heads)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            self._windows(self.key(hidden), length),
            self._windows(self.value(hidden), length),
            self._allowed(layout, length),
            self.dropout_now,
        )
        return self.dense(mixed.transpose(1, 2).reshape(length, -1)[:num_tokens])

    def _windows(self, stream: Tensor, length: int) -> Tensor:
        """Keys that each block sees: `[T, C]` -> `[blocks, H, 3 w, D]`, overlapping views."""
        stream = F.pad(stream, (0, 0, self.reach, length - stream.shape[0] + self.reach))
        heads = stream.unflatten(1, (self.num_heads, -1))
        return heads.unfold(0, 3 * self.reach, self.reach).mT

    def _allowed(self, layout: BatchLayout, length: int) -> Tensor:
        """Pairs inside one window and one sequence, `[blocks, 1, w, 3 w]`."""
        sequences = layout.token_sequences
        missing = length - sequences.shape[0]
        # the fill counts as a sequence, so that its queries have keys too
        keys = F.pad(sequences, (self.reach, missing + self.reach), value=-1)
        queries = keys[self.reach : -self.reach].view(-1, self.reach, 1)
        places = torch.arange(3 * self.reach, device=keys.device)
        distances = places - places[self.reach : 2 * self.reach].unsqueeze(1)
        same = queries == keys.unfold(0, 3 * self.reach, self.reach).unsqueeze(1)
        return (same & (distances.abs() <= self.reach)).unsqueeze(1)
