"""The PoNet mixing block as its published code computes it: the baseline of the benchmarks.

Eager PyTorch on rows `[B, N, C]`, our own writing. The order and the layout of the operations are
those of the release (github.com/lxchtan/PoNet, with `scatter_reduce` for segment maxima), because
they are what costs time: five projections, heads split off by permuting, segment maxima scattered
into N rows and gathered back, windows pooled on a permuted view, masks filled in on every call.
Where the release overwrites a projection in place, this does too unless the caller owns it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# what the published code writes where a maximum must not look
_BLOCKED = -10000.0


@dataclass(frozen=True)
class Rows:
    """What the published code is told about a batch."""

    segment_ids: Tensor
    """`[B, N]` int64, from 0, not decreasing in a row."""
    special: Tensor
    """`[B, N]` bool, [CLS] and [SEP]: they receive global aggregation only."""
    padding: Tensor
    """`[B, N]` bool."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, N, C]` -> `[B, H, N, D]`, a view."""
    return x.unflatten(-1, (num_heads, -1)).permute(0, 2, 1, 3)


def segment_max(values: Tensor, segment_ids: Tensor) -> Tensor:
    """Maximum of each token's segment: `[B, N, C]`."""
    index = segment_ids.unsqueeze(-1).expand_as(values)
    maxima = torch.zeros_like(values).scatter_reduce(1, index, values, "amax", include_self=False)
    return maxima.gather(1, index)


def local_max(values: Tensor) -> Tensor:
    """Maximum of each token and its neighbours: `[B, N, C]`."""
    pooled = F.max_pool1d(values.permute(0, 2, 1), kernel_size=3, stride=1, padding=1)
    return pooled.permute(0, 2, 1)


def global_aggregation(queries: Tensor, keys: Tensor, padding: Tensor, num_heads: int) -> Tensor:
    """g', the mean query's softmax average of the keys: `[B, H, D]` from `[B, N, C]`."""
    q, k = split_heads(queries, num_heads), split_heads(keys, num_heads)
    apart = padding[:, None, :, None]
    count = (~apart).to(q.dtype).sum(dim=2)
    g = q.masked_fill(apart, 0.0).sum(dim=2) / count
    scores = torch.einsum("bhd,bhnd->bhn", g, k) / q.shape[-1] ** 0.5
    scores = scores + padding[:, None, :].to(q.dtype) * _BLOCKED
    return torch.einsum("bhnd,bhn->bhd", k, scores.softmax(dim=-1))


def fusion(g: Tensor, segment: Tensor, output: Tensor, local: Tensor) -> Tensor:
    """(g' + S) * O + L, computed in the layout of the heads: `[B, N, C]`; g' is `[B, H, D]`."""
    num_heads = g.shape[1]
    s, o, w = (split_heads(x, num_heads) for x in (segment, output, local))
    mixed = (g.unsqueeze(2) + s) * o + w
    return mixed.permute(0, 2, 1, 3).reshape(output.shape)


def pooling(g: Tensor, segment: Tensor, output: Tensor, local: Tensor, rows: Rows) -> Tensor:
    """Segment maxima, local maxima and their fusion with g', masks included: `[B, N, C]`."""
    padding, special = rows.padding.unsqueeze(-1), rows.special.unsqueeze(-1)
    local = local.masked_fill(padding, _BLOCKED)
    segment = segment.masked_fill(padding, _BLOCKED)
    windows = local_max(local.masked_fill(special, _BLOCKED))
    maxima = segment_max(segment, rows.segment_ids)
    mixed = fusion(g, maxima.masked_fill_(special, 0.0), output, windows.masked_fill_(special, 0.0))
    return mixed.masked_fill_(padding, 0.0)


def mixer(
    queries: Tensor,
    keys: Tensor,
    output: Tensor,
    segment: Tensor,
    local: Tensor,
    rows: Rows,
    num_heads: int,
) -> Tensor:
    """The block between its projections: five times `[B, N, C]` -> `[B, N, C]`."""
    g = global_aggregation(queries, keys, rows.padding, num_heads)
    return pooling(g, segment, output, local, rows)


class PublicSubLayer(nn.Module):
    """Five projections, the block, the output projection; parameters as in `PoNetMixer`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.segment = nn.Linear(width, width)
        self.local = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        queries, keys = self.query(hidden), self.key(hidden)
        output, segment, local = self.output(hidden), self.segment(hidden), self.local(hidden)
        mixed = mixer(queries, keys, output, segment, local, rows, self.num_heads)
        return self.dense(mixed)
