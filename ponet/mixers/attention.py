"""Softmax attention, the Transformer's token mixer, in three forms with the same parameters.

Vaswani et al., arXiv 1706.03762, equation 1 and section 3.2.2:
Attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V in each of H heads, then one projection, with Q, K
and V `[B, H, N, D]`. Time O(B N^2 C); scores take O(B H N^2) memory unless they stay in a kernel.
Keys at padding get probability zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ponet.mixers.projections import (
    QueryKeyValueProjections,
    cast_for_projections,
    project_together,
)
from ponet.packing import BatchLayout


class QueryKeyValueMixer(QueryKeyValueProjections):
    """Base of mixers on rows of whole sequences; a subclass says how they `attend`."""

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        hidden = cast_for_projections(hidden)
        parts = (self.query, self.key, self.value)
        query, key, value = project_together(hidden, parts).chunk(3, dim=1)
        # no kernel is asked to reduce over no tokens at all
        mixed = self.mix(query, key, value, layout) if hidden.shape[0] else value
        return self.dense(mixed)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: BatchLayout) -> Tensor:
        """Projected streams `[T, C]` -> `[T, C]`, by way of rows with padding."""
        rows = layout.rows
        query, key, value = (self.heads(rows.from_stream(x)) for x in (query, key, value))
        mixed = self.attend(query, key, value, rows.mask)
        return rows.to_stream(mixed.transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the values of each row and head: all `[B, H, N, D]`, zero at padding.

        The mask `[B, N]` is true at real tokens, None where all are; results at padding drop out.
        """
        raise NotImplementedError


class SoftmaxAttention(QueryKeyValueMixer):
    """By PyTorch's fused kernels; in half precision on a GPU a ragged stream stays a stream."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: BatchLayout) -> Tensor:
        size = query.shape[1] // self.num_heads
        # the packed kernel knows no dropout
        if layout.rows.mask is None or self.dropout_now or not _packed_kernel_runs(query, size):
            return super().mix(query, key, value, layout)
        # here, because it brings seconds of imports that nothing else needs
        from torch.nn.attention.varlen import varlen_attn

        heads = (self.num_heads, size)
        query, key, value = (stream.unflatten(1, heads) for stream in (query, key, value))
        offsets, longest = layout.cu_seqlens, layout.max_seqlen
        mixed = varlen_attn(query, key, value, offsets, offsets, longest, longest)
        assert isinstance(mixed, Tensor)
        return mixed.flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        keys = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=keys, dropout_p=self.dropout_now
        )


class NaiveAttention(QueryKeyValueMixer):
    """By the formula: scores and probabilities `[B, H, N, N]` lie in memory."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query / query.shape[-1] ** 0.5) @ key.mT
        if mask is not None:
            # not -inf, which makes NaN of a row of padding
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask[:, None, None, :], lowest)
        probabilities = F.dropout(scores.softmax(dim=-1), self.dropout_now)
        return probabilities @ value


class CheckpointedAttention(NaiveAttention):
    """The softmax baseline of PoNet's speed comparison (arXiv 2110.02442, table 2).

    The published code runs it in float32 outside autocast and computes scores and probabilities
    again in the backward pass instead of keeping them.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        wide = [x.to(dtype) for x in (query, key, value)]
        with torch.autocast(query.device.type, enabled=False):
            mixed = checkpoint(super().attend, *wide, mask, use_reentrant=False)
        assert isinstance(mixed, Tensor)
        return mixed.to(value.dtype)


def _packed_kernel_runs(stream: Tensor, head_size: int) -> bool:
    return (
        stream.is_cuda
        and stream.dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= 256
        and torch.cuda.get_device_capability(stream.device) >= (8, 0)
    )
