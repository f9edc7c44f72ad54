"""Reformer, arXiv 2001.04451, section 2: attention between tokens of similar hash.

Queries are the keys before normalisation, k = q / |q|. In each of `num_hashes` rounds a token falls
into the bucket argmax([x R; -x R]) of a random rotation R, tokens are sorted by bucket, the sorted
sequence is cut into chunks of `lsh_chunk_size`, and a token attends to all of its chunk and of the
one before; before the first chunk is the last of the previous round, as in the published code. With
z_r the log-sum-exp of the scores of round r and o_r its result, o = sum_r exp(z_r - log sum_s exp
z_s) o_r. A token attends to itself only where it has no other. Projections have no bias, as
published. One chunk is full attention. Time and memory are O(N L C R), chunks of L and R rounds.

The rotations are drawn once with a fixed seed and kept, so a model is a function; the published
code draws at each step. There are 2 N / L buckets, rounded down to a power of two and at most 2 L,
where the published code begins to factorise the hash. Hashes take at least float32, also under
autocast: rounded vectors fall into other buckets. Padding is sorted last and masked, and the
number of buckets and the last chunk are those of each sequence, so padding changes nothing.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.mixers.projections import cast_for_projections, pad_tokens
from ponet.packing import BatchLayout, Rows


class LSHAttention(nn.Module):
    """Locality-sensitive hashing attention with shared queries and keys; without reversibility."""

    rotations: Tensor
    enough: Tensor

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.chunk_size = config.lsh_chunk_size
        self.dropout = config.attention_probs_dropout_prob
        self.query_key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.dense = nn.Linear(width, width, bias=False)
        most = max(config.max_position_embeddings // self.chunk_size, 1)
        num_columns = 2 ** (min(most, self.chunk_size).bit_length() - 1)
        rotations = torch.randn(
            self.num_heads,
            width // self.num_heads,
            config.num_hashes,
            num_columns,
            generator=torch.Generator().manual_seed(0),
            device="cpu",
        )
        self.register_buffer("rotations", rotations, persistent=False)
        # chunks that a sequence must have for a column to be used: 1, 2, 4, 4, 8, ...
        enough = torch.tensor([2 ** column.bit_length() for column in range(num_columns)])
        self.register_buffer("enough", enough, persistent=False)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        rows, exact = layout.rows, hidden
        hidden = cast_for_projections(hidden)
        lengths = layout.cu_seqlens.diff().long().view(-1, 1, 1, 1)
        vectors = self._heads(rows.from_stream(self.query_key(hidden)))  # [B, H, N, D]
        values = self._heads(rows.from_stream(self.value(hidden)))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            order = self._sorted(self._hashed(exact, vectors, rows), lengths)  # [B, H, R, N]
        chunks = order.unflatten(3, (-1, self.chunk_size))
        num_chunks = (-(-lengths // self.chunk_size)).clamp(min=1)
        last = chunks.take_along_dim(num_chunks.unsqueeze(4) - 1, dim=3)
        padding = torch.arange(vectors.shape[2], device=vectors.device).unsqueeze(1) >= lengths
        dropout = self.dropout if self.training else 0.0
        mixed = attend_in_chunks(vectors, values, chunks, last, padding, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)[:, : rows.length]
        return self.dense(rows.to_stream(mixed))

    def _hashed(self, hidden: Tensor, vectors: Tensor, rows: Rows) -> Tensor:
        """The vectors `[B, H, N, D]` of `[T, C]` in at least float32."""
        wide = torch.promote_types(vectors.dtype, torch.float32)
        if vectors.dtype == wide:
            return vectors
        parameters = {name: x.to(wide) for name, x in self.query_key.named_parameters()}
        exact = functional_call(self.query_key, parameters, hidden.to(wide))
        return self._heads(rows.from_stream(exact))

    def _heads(self, rows: Tensor) -> Tensor:
        length = max(-(-rows.shape[1] // self.chunk_size), 1) * self.chunk_size
        return pad_tokens(rows, length).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _sorted(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Tokens in the order of their buckets, padding behind: `[B, H, R, N]` int64."""
        rotated = torch.einsum("bhnd,hdrc->bhrnc", vectors, self.rotations.to(vectors.dtype))
        chunks = (lengths // self.chunk_size).clamp(min=1).unsqueeze(4)
        unused = self.enough > chunks
        high, highest = rotated.masked_fill(unused, -torch.inf).max(dim=4)
        low, lowest = rotated.masked_fill(unused, torch.inf).min(dim=4)
        num_columns = len(self.enough)
        buckets = torch.where(high >= -low, highest, lowest + num_columns)
        places = torch.arange(vectors.shape[2], device=vectors.device)
        buckets = buckets.masked_fill(places >= lengths, 2 * num_columns)
        return buckets.argsort(dim=3, stable=True)


def attend_in_chunks(
    vectors: Tensor,
    values: Tensor,
    chunks: Tensor,
    last: Tensor,
    padding: Tensor,
    dropout_prob: float = 0.0,
) -> Tensor:
    """Attention within the chunks of all rounds, summed over the rounds: `[B, H, N, D]`.

    Args:
        vectors: `[B, H, N, D]`, queries, and keys before they are normalised.
        values: `[B, H, N, D]`.
        chunks: `[B, H, R, M, L]` int64, tokens by bucket in M chunks of each of R rounds.
        last: `[B, H, R, 1, L]`, the chunk that the first one of the next round sees.
        padding: `[B, 1, N, 1]` bool, tokens that no other one attends to.
        dropout_prob: of the probabilities.
    """
    keys = vectors * (vectors.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    keys = keys / keys.shape[-1] ** 0.5
    before = torch.cat([last.roll(1, dims=2), chunks[:, :, :, :-1]], dim=3)
    seen = torch.cat([before, chunks], dim=4)  # [B, H, R, M, 2 L]

    scores = _take(vectors, chunks) @ _take(keys, seen).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(_take(padding, seen).mT, -1e9)
    scores = scores.masked_fill(chunks.unsqueeze(5) == seen.unsqueeze(4), -1e5)
    sums = scores.logsumexp(dim=5, keepdim=True)  # [B, H, R, M, L, 1]
    weights = F.dropout(scores.softmax(dim=5), dropout_prob)
    mixed = weights.to(values.dtype) @ _take(values, seen)

    back = chunks.flatten(3).argsort(dim=3).unsqueeze(4)
    shares = sums.flatten(3, 4).take_along_dim(back, dim=3).softmax(dim=2)
    mixed = (mixed.flatten(3, 4).take_along_dim(back, dim=3) * shares).sum(dim=2)
    return mixed.to(values.dtype)


def _take(vectors: Tensor, places: Tensor) -> Tensor:
    """`[B, H, N, D]`, `[B, H, R, M, X]` -> `[B, H, R, M, X, D]`."""
    taken = vectors.take_along_dim(places.flatten(2).unsqueeze(3), dim=2)
    return taken.unflatten(2, places.shape[2:])
