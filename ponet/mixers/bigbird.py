"""BigBird, arXiv 2007.14062, section 2 and appendix D: window, global and random blocks.

A sequence is cut into blocks of `block_size` tokens. The first and the last block attend to all
tokens. Any other block attends to itself, both neighbours, the first and the last block, and to
`num_random_blocks` of the rest, others in each head; where fewer are left, to all of them, which
is full attention. Time and memory are O(N K C), where a block sees K tokens.

Random blocks follow from integers drawn once with a fixed seed, so they depend on the
configuration and the number of blocks of the sequence alone; the published code seeds by layer.
The last block of a sequence is the last with a real token, so padding of its row changes nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.mixers.projections import QueryKeyValueProjections, cast_for_projections, pad_tokens
from ponet.packing import BatchLayout


class BigBirdAttention(QueryKeyValueProjections):
    """Block-sparse attention whose global blocks are tokens of the sequence, none are added."""

    draws: Tensor

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.block_size = config.block_size
        most = -(-config.max_position_embeddings // config.block_size)
        # integers, because casting a model to bf16 casts every floating buffer
        draws = torch.randint(
            2**62,
            (self.num_heads, most, config.num_random_blocks),
            generator=torch.Generator().manual_seed(0),
            device="cpu",
        )
        self.register_buffer("draws", draws, persistent=False)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        hidden = cast_for_projections(hidden)
        rows = layout.rows
        lengths = layout.cu_seqlens.diff().long()
        num_blocks = max(-(-rows.length // self.block_size), 1)
        query, key, value = (
            pad_tokens(rows.from_stream(projection(hidden)), num_blocks * self.block_size)
            .unflatten(1, (num_blocks, self.block_size))
            .unflatten(3, (self.num_heads, -1))
            for projection in (self.query, self.key, self.value)
        )  # [B, M, S, H, D]
        counts = (-(-lengths // self.block_size)).clamp(min=1)
        blocks, allowed = self._pattern(lengths, counts, num_blocks)
        sparse = F.scaled_dot_product_attention(
            query.flatten(0, 1).transpose(1, 2),
            _gather(key, blocks),
            _gather(value, blocks),
            allowed.flatten(0, 1)[:, None, None],
            self.dropout_now,
        )
        mixed = sparse.transpose(1, 2).view(query.shape)
        first, last = self._ends(query, key, value, lengths, counts)
        own = torch.arange(num_blocks, device=hidden.device).view(-1, 1, 1, 1)
        mixed = torch.where(own == counts.view(-1, 1, 1, 1, 1) - 1, last, mixed)
        mixed = torch.where(own == 0, first, mixed)
        return self.dense(rows.to_stream(mixed.flatten(3).flatten(1, 2)[:, : rows.length]))

    def _ends(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, counts: Tensor
    ) -> tuple[Tensor, ...]:
        """The first and the last block of each sequence attend to all, `[B, 1, S, H, D]` each."""
        sequences = torch.arange(query.shape[0], device=query.device)
        ends = torch.cat([query[:, 0], query[sequences, counts - 1]], dim=1)
        places = torch.arange(key.shape[1] * self.block_size, device=key.device)
        mixed = F.scaled_dot_product_attention(
            ends.transpose(1, 2),
            key.flatten(1, 2).transpose(1, 2),
            value.flatten(1, 2).transpose(1, 2),
            (places < lengths.clamp(min=1).unsqueeze(1))[:, None, None],
            self.dropout_now,
        )
        return mixed.transpose(1, 2).unsqueeze(1).chunk(2, dim=2)

    def _pattern(self, lengths: Tensor, counts: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Blocks that each block attends to, `[B, M, H, K / S]`, and which keys, `[B, M, K]`."""
        own = torch.arange(num_blocks, device=lengths.device).expand(len(lengths), -1)
        last = (counts - 1).unsqueeze(1)
        fixed = torch.stack([own - 1, own, own + 1, own * 0, last.expand_as(own)], dim=2)
        # a global block inside the window counts once
        seen = torch.stack([own > 0, own <= last, own < last, own > 1, own < last - 1], dim=2)
        inside = torch.arange(self.block_size, device=lengths.device)
        real = fixed.unsqueeze(3) * self.block_size + inside < lengths.view(-1, 1, 1, 1)

        chosen, drawn = self.random_blocks(counts, num_blocks)
        blocks = torch.cat([fixed.unsqueeze(2).expand(-1, -1, self.num_heads, -1), chosen], dim=3)
        # random blocks are never the last, hence full
        drawn = drawn.unsqueeze(3).expand(-1, -1, -1, self.block_size)
        allowed = torch.cat([seen.unsqueeze(3) & real, drawn], dim=2).flatten(2)
        # blocks of padding see anything, so that their queries have keys too
        return blocks.clamp(0, num_blocks - 1), allowed | (own > last).unsqueeze(2)

    def random_blocks(self, counts: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Choose blocks that are neither in the window nor global, without repeats.

        Of `counts` `[B]` blocks per sequence and M per row: `[B, M, H, R]` the blocks, and
        `[B, M, R]` bool, false where none was left to choose.
        """
        own = torch.arange(num_blocks, device=counts.device)
        count = counts.view(-1, 1)
        low = (own - 1).clamp(min=1)
        width = (torch.minimum(own + 1, count - 2) - low + 1).clamp(min=0)
        free = count - 2 - width
        draws = self.draws[:, own.clamp(max=self.draws.shape[1] - 1)].transpose(0, 1)
        ranks = draws.new_empty(len(counts), num_blocks, self.num_heads, 0)
        for place, draw in enumerate(draws.unbind(dim=2)):
            rank = draw % (free - place).clamp(min=1).unsqueeze(2)
            # as many as were chosen before are passed over
            for other in ranks.sort(dim=3).values.unbind(dim=3):
                rank = rank + (rank >= other)
            ranks = torch.cat([ranks, rank.unsqueeze(3)], dim=3)
        window = width.view(*width.shape, 1, 1) * (ranks + 1 >= low.view(-1, 1, 1))
        places = torch.arange(draws.shape[2], device=counts.device)
        return ranks + 1 + window, places < free.unsqueeze(2)


def _gather(values: Tensor, blocks: Tensor) -> Tensor:
    """`[B, M, S, H, D]`, `[B, M, H, J]` -> `[B * M, H, J * S, D]`, the chosen blocks of a head."""
    num_rows, num_blocks, size, num_heads, width = values.shape
    device = values.device
    rows = torch.arange(num_rows, device=device).view(-1, 1, 1, 1)
    heads = torch.arange(num_heads, device=device).view(-1, 1)
    index = (rows * num_blocks + blocks) * num_heads + heads
    chosen = values.transpose(2, 3).flatten(0, 2).index_select(0, index.flatten())
    return chosen.view(num_rows * num_blocks, num_heads, blocks.shape[3] * size, width)
