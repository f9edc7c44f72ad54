"""Five baselines as the published Long Range Arena code computes them.

The code behind the comparisons of the Nystromformer (arXiv 2102.03902) and PoNet (arXiv 2110.02442)
papers departs from the papers of linear attention, Performer, Linformer, Nystromformer and
Reformer, whose own forms are in `ponet.mixers`. The protocol `published` takes the forms here.

Q, K, V are `[R, H, N, D]`, projections of rows of full length N; m is the mask, 1 at present and 0
at absent tokens, padding and black pixels alike. All between the first and the last projection is
float32 outside autocast. None has dropout.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ponet import PoNetConfig
from ponet.mixers import register_mixer
from ponet.mixers.attention import QueryKeyValueMixer
from ponet.mixers.nystromformer import pseudo_inverse, value_convolution
from ponet.mixers.reformer import attend_in_chunks
from ponet.packing import BatchLayout, Rows


@dataclass(frozen=True, kw_only=True)
class ColumnRows(Rows):
    """The published rectangle `[R, N, C]`: every token in the column that it has in its row."""

    def from_stream(self, stream: Tensor) -> Tensor:
        """`[T, ...]` -> `[R, N, ...]`, zero at absent tokens."""
        assert self.places is not None
        size = self.num_rows * self.length
        empty = stream.new_zeros(size + 1, *stream.shape[1:])
        return empty.index_copy(0, self.places, stream)[:size].unflatten(0, (-1, self.length))

    def to_stream(self, rows: Tensor) -> Tensor:
        """`[R, N, C]` -> `[T, C]`, zero at tokens of no row."""
        assert self.places is not None
        return F.pad(rows.flatten(0, 1), (0, 0, 0, 1)).index_select(0, self.places)


@dataclass(frozen=True, kw_only=True)
class ColumnLayout(BatchLayout):
    """A layout whose rectangle has rows of full length, its tokens in their columns."""

    places: Tensor
    """`[T]` int64, where each token stands among the R * N; R * N for a token of no row."""
    num_rows: int
    """R; sequences beyond are of no row."""

    @classmethod
    def of(cls, layout: BatchLayout, places: Tensor, num_rows: int) -> Self:
        """Add the places to a layout whose `max_seqlen` is N."""
        own = {field.name: getattr(layout, field.name) for field in fields(layout)}
        return cls(**own, places=places, num_rows=num_rows)

    @cached_property
    def rows(self) -> Rows:
        size = self.num_rows * self.max_seqlen
        mask = torch.zeros(size + 1, dtype=torch.bool, device=self.places.device)
        mask = mask.index_fill(0, self.places, True)[:size].unflatten(0, (-1, self.max_seqlen))
        return ColumnRows(
            num_rows=self.num_rows, length=self.max_seqlen, mask=mask, places=self.places
        )


class PublishedMixer(QueryKeyValueMixer):
    """Base of those with Q, K and V; in `attend` these are zero at absent tokens: Q m, K m, V m."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: BatchLayout) -> Tensor:
        rows, wide = layout.rows, torch.promote_types(value.dtype, torch.float32)
        parts = (query, key, value)
        query, key, value = (self.heads(rows.from_stream(x.to(wide))) for x in parts)
        with torch.autocast(value.device.type, enabled=False):
            mixed = self.attend(query, key, value, rows.mask)
        return rows.to_stream(mixed.transpose(1, 2).flatten(2)).to(parts[2].dtype)


class PublishedLinearAttention(PublishedMixer):
    """phi(Q) (phi(K)^T V m) / sqrt(N), phi(x) = elu(x) + 1: linear attention without normaliser."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = query.shape[2] ** -0.25
        query, key = (F.elu(query) + 1) * scale, (F.elu(key) + 1) * scale
        return query @ (key.mT @ value)


class PublishedPerformer(PublishedMixer):
    """FAVOR+ with scores q k / D in place of q k / sqrt(D): the code divides twice.

    With q = Q / sqrt(D), k = K m / sqrt(D) and new features W `[M, D]` at every forward, also in
    evaluation, the same for all heads:

        phi(q) = exp(W q - |q|^2 / 2 - max_i (W q)_i) + 1e-4
        psi(k) = exp(W k - |k|^2 / 2 - max of W k over the batch) + 1e-4
        phi(Q) (psi(K)^T V m) / (phi(Q) sum_n psi(k_n))

    Absent keys are zero and stay in the denominator. The code names ReLU as the kernel, but to a
    class that does not use it.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.num_features = config.num_random_features

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        size = query.shape[-1]
        features = draw_features(self.num_features, query)
        query, key = query / size**0.5, key / size**0.5
        q, k = query @ features.mT, key @ features.mT
        q = (q - _half_square(query) - q.amax(dim=-1, keepdim=True)).exp() + 1e-4
        k = (k - _half_square(key) - k.max()).exp() + 1e-4
        return q @ (k.mT @ value) / (q @ k.sum(dim=2).unsqueeze(-1))


def _half_square(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=-1, keepdim=True) / 2


def draw_features(num_features: int, like: Tensor) -> Tensor:
    """Random features `[M, D]` for vectors `[..., D]`, by the law of the published code.

    The rows of each block of D are the columns of the Q of a normal matrix's QR decomposition, as
    LAPACK's signs make it; the length of a feature is that of a normal vector. Q is drawn as the
    product of its reflections, I - V S^-1 V^T, with the Householder vectors V of the columns below
    the diagonal of a normal matrix and S the upper triangle of V^T V, its diagonal halved
    (Puglisi 1992): a CUDA graph can hold that, but no QR decomposition.
    """
    size = like.shape[-1]
    shape = (-(-num_features // size), size, size - 1)
    vectors = torch.randn(shape, dtype=like.dtype, device=like.device).tril()
    first = vectors.diagonal(dim1=1, dim2=2)
    first += first.sign() * vectors.norm(dim=1)
    products = vectors.mT @ vectors
    triangle = products.triu(1) + torch.diag_embed(products.diagonal(dim1=1, dim2=2) / 2)
    reflections = vectors @ torch.linalg.solve_triangular(triangle, vectors.mT, upper=True)
    orthogonal = torch.eye(size, dtype=like.dtype, device=like.device) - reflections
    lengths = torch.randn(num_features, size, dtype=like.dtype, device=like.device).norm(dim=1)
    return orthogonal.mT.flatten(0, 1)[:num_features] * lengths.unsqueeze(1)


class PublishedLinformer(PublishedMixer):
    """softmax(Q (E K m)^T / sqrt(D)) (E V m): keys and values share E `[H, K, N]`.

    It is the same in all layers, see `share_projection`, and starts normal, with deviation 0.02.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        shape = (self.num_heads, config.linformer_size, config.max_position_embeddings)
        self.projection = nn.Parameter(torch.empty(shape).normal_(std=0.02))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        projection = self.projection[..., : key.shape[2]]
        return F.scaled_dot_product_attention(query, projection @ key, projection @ value)


def share_projection(model: nn.Module) -> None:
    """Give all Linformer layers of a model the projection of the first one."""
    layers = [part for part in model.modules() if isinstance(part, PublishedLinformer)]
    for layer in layers[1:]:
        layer.projection = layers[0].projection


class PublishedNystromAttention(PublishedMixer):
    """softmax(Q k'^T) Z softmax(q' K^T + (m - 1) 1e9) V + conv(V m), Q and K divided by D^(1/4).

    Landmarks q', k' are means of Q m and K m over stretches of columns, absent ones counted. Z is
    six steps from A^T over the largest column sum of all matrices A = softmax(q' k'^T) of the
    batch. With no more columns than landmarks this is softmax attention and the convolution.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.num_landmarks = config.num_landmarks
        self.conv = value_convolution(config)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        skip = 0.0 if self.conv is None else self.conv(value)
        query, key = (x / x.shape[-1] ** 0.25 for x in (query, key))
        if key.shape[2] <= self.num_landmarks:
            return _probabilities(query, key, mask) @ value + skip
        queries, keys = (x.unflatten(2, (self.num_landmarks, -1)).mean(dim=3) for x in (query, key))
        matrix = _probabilities(queries, keys)
        inverse = pseudo_inverse(matrix, matrix.sum(dim=-2).amax())
        summary = _probabilities(queries, key, mask) @ value
        return _probabilities(query, keys) @ inverse @ summary + skip


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -1e9)
    return scores.softmax(dim=-1)


class PublishedLSHAttention(nn.Module):
    """Reformer with new rotations at every forward, on the chunks of whole rows.

    Buckets are as many as N columns ask for; absent tokens are in one more, sorted last, and masked
    as keys. The code takes the weights of W_q and W_v as query-key and value projections, without
    their biases, and leaves W_k unused; all but the last projection, with a bias, is float32.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_hashes = config.num_hashes
        self.chunk_size = config.lsh_chunk_size
        self.query_key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        rows = layout.rows
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.value.weight.dtype)
            projected = (self.query_key(hidden), self.value(hidden))
            vectors, values = (
                rows.from_stream(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for x in projected
            )
            absent = vectors.new_zeros(rows.num_rows, rows.length, dtype=torch.bool)
            if rows.mask is not None:
                absent = ~rows.mask
            chunks = self._chunks(vectors.detach(), absent)
            last, padding = chunks[:, :, :, -1:], absent[:, None, :, None]
            mixed = attend_in_chunks(vectors, values, chunks, last, padding)
        return self.dense(rows.to_stream(mixed.transpose(1, 2).flatten(2)))

    def _chunks(self, vectors: Tensor, absent: Tensor) -> Tensor:
        """Columns by bucket, in chunks of each round: `[R, H, rounds, M, L]` int64."""
        _, heads, length, size = vectors.shape
        num_chunks = max(length // self.chunk_size, 1)
        # half as many as buckets, whose number is a power of two
        shape = (heads, size, self.num_hashes, 2 ** (num_chunks.bit_length() - 1))
        rotations = torch.randn(shape, dtype=vectors.dtype, device=vectors.device)
        rotated = torch.einsum("bhnd,hdrc->bhrnc", vectors, rotations)
        buckets = torch.cat([rotated, -rotated], dim=4).argmax(dim=4)
        buckets = buckets.masked_fill(absent[:, None, None], 2 * shape[-1])
        return buckets.argsort(dim=3, stable=True).unflatten(3, (num_chunks, -1))


PUBLISHED_FORMS = {
    "linear": "linear_published",
    "linformer": "linformer_published",
    "nystromformer": "nystromformer_published",
    "performer": "performer_published",
    "reformer": "reformer_published",
}
"""Names of the mixers here by those of the same papers' own forms."""

register_mixer("linear_published", PublishedLinearAttention)
register_mixer("linformer_published", PublishedLinformer)
register_mixer("nystromformer_published", PublishedNystromAttention)
register_mixer("performer_published", PublishedPerformer)
register_mixer("reformer_published", PublishedLSHAttention)
