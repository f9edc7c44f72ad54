"""Sentence poolers: the states of a sequence become one vector, on the packed stream of any mixer.

    name          vector                                                            source
    cls           tanh(W h + b), h the first token                                  BERT
    first         h                                                                 MaxPoolBERT
    max_cls       element-wise maximum of the first token over the last k layers    MaxPoolBERT
    mha           multi-head attention of the first token over all tokens           MaxPoolBERT
    maxseq_mha    mha on the element-wise maximum of the last k layers              MaxPoolBERT
    meanseq_mha   mha on the mean of the last k layers                              MaxPoolBERT
    meanmax       tanh(W [mean; m] + b), m the token with the longest vector        CS475
    mswap         relu(h * softmax(h)), softmax in windows of w features of h       CS475
    stochastic    tanh(W s + b), s a token drawn for each feature                   CS475
    mean, max     element-wise over the tokens                                      -

MaxPoolBERT is arXiv 2505.15696, CS475 a course's report on poolers for BERT. Layers are those of
the encoder, the embedding is none of them. Everything is over real tokens, [CLS] and [SEP] included
and padding excluded, with these exceptions in the literal reading of a source:

    mha, ...      the softmax has a term for each padding token of the row, whose state is zero, so
                  the vector depends on the longest sequence of the batch
    meanmax       a sum in place of the mean, which saturates tanh for long sequences
    stochastic    draws are added up in place of averaged, and made in evaluation too

In the sound reading stochastic follows Zeiler and Fergus (arXiv 1301.3557): in evaluation the
expectation of a draw. The sources let the model compute states at padding; here there are none,
`PoNetModel` returns zero, and zero is what the literal reading takes.

An empty sequence counts as one token with the state zero.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import ConfigError, PoolerConfig
from ponet.packing import BatchLayout
from ponet_kernels import PackedLayout, global_mean, segment_max

LayerRule = Literal["last", "max", "mean", "norm"]
"""How the states of a token in several layers become one."""


def tokens_at(tokens: Tensor, cu_seqlens: Tensor, places: Tensor | int) -> Tensor:
    """The token at a place of each sequence, zero for an empty one: `[T, C]` -> `[B, C]`."""
    offsets = cu_seqlens.long()
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    empty = offsets[1:] == offsets[:-1]
    return padded.index_select(0, torch.where(empty, tokens.shape[0], offsets[:-1] + places))


def _rows(tokens: Tensor, layout: BatchLayout) -> Tensor:
    """`[T, ...]` -> `[B, N, ...]`, zero at padding, with at least one column."""
    rows = layout.rows.from_stream(tokens)
    return rows if layout.rows.length else rows.new_zeros(len(rows), 1, *rows.shape[2:])


class SentencePooler(nn.Module):
    """What all poolers share: the choice of layers, and a projection before a tanh, or none."""

    divisor: str | None = None
    """Field of the configuration that divides the hidden size."""
    own_fields: tuple[str, ...] = ()
    """Fields of the configuration that it reads, besides the choice of layers."""

    def __init__(
        self, config: PoolerConfig, hidden_size: int, rule: LayerRule, dense: nn.Linear | None
    ) -> None:
        super().__init__()
        divisor = getattr(config, self.divisor) if self.divisor else 1
        if hidden_size % divisor:
            raise ConfigError(
                f"hidden_size {hidden_size} is not a multiple of pooler {self.divisor} {divisor}"
            )
        self.layer_rule: LayerRule = "norm" if config.layer_choice == "norm" else rule
        self.num_layers = 1 if self.layer_rule == "last" else config.num_layers
        self.literal = config.reading == "literal"
        self.config = config
        self.output_size = hidden_size
        self.dense = dense

    def forward(self, states: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        """Pool each sequence: `[B, output_size]`.

        Args:
            states: `[T, C]` each, after the embedding and after each layer.
            layout: where the sequences lie, and how long their rows are with padding, which the
                sound readings do not depend on.
        """
        if self.num_layers > len(states) - 1:
            raise ValueError(
                f"the pooler reads the last {self.num_layers} layers, found {len(states) - 1}"
            )
        vectors = self._pool(states[-self.num_layers :], layout)
        return vectors if self.dense is None else torch.tanh(self.dense(vectors))

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        """Pool the states of the layers that the pooler reads: `[B, C]`, before the projection."""
        raise NotImplementedError

    def _join(self, layers: Sequence[Tensor]) -> Tensor:
        """One state of each token from those of k layers `[M, C]`; the first layer wins ties."""
        if self.layer_rule == "last":
            return layers[-1]
        stacked = torch.stack(tuple(layers))
        if self.layer_rule == "max":
            return stacked.max(dim=0).values
        if self.layer_rule == "mean":
            return stacked.mean(dim=0)
        longest = stacked.detach().norm(dim=2).argmax(dim=0)
        return stacked[longest, torch.arange(stacked.shape[1], device=stacked.device)]


class FirstTokenPooler(SentencePooler):
    """The first token: cls, first and max_cls."""

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        # chosen before layers are joined, which then costs B states and not T
        return self._join([tokens_at(x, layout.cu_seqlens, 0) for x in layers])


class SwapPooler(FirstTokenPooler):
    """mswap: each feature weighted by a softmax over its window, then ReLU."""

    divisor = "window"
    own_fields = ("window",)

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        vectors = super()._pool(layers, layout)
        windows = vectors.unflatten(1, (-1, self.config.window))
        return F.relu(windows * windows.softmax(dim=2)).flatten(1)


class MeanPooler(SentencePooler):
    """mean: over the tokens."""

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        return global_mean(self._join(layers), layout)


class MaxPooler(SentencePooler):
    """max: over the tokens, element by element; the first token wins ties."""

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        tokens = self._join(layers)
        lengths = layout.cu_seqlens.diff()
        whole = PackedLayout.of_sequences(layout.cu_seqlens, len(tokens), layout.max_seqlen)
        return segment_max(tokens, whole).masked_fill((lengths == 0).unsqueeze(1), 0.0)


class MeanMaxPooler(SentencePooler):
    """meanmax: the mean, or literally the sum, beside the token with the longest vector."""

    own_fields = ("reading",)

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        tokens = self._join(layers)
        average = global_mean(tokens, layout)
        if self.literal:
            average = average * layout.cu_seqlens.diff().unsqueeze(1)
        norms = _rows(tokens.detach().norm(dim=1), layout)
        # the first of equal norms, so padding, whose norm is zero, never comes before a token
        longest = tokens_at(tokens, layout.cu_seqlens, norms.argmax(dim=1))
        return torch.cat([average, longest], dim=1)


class StochasticPooler(SentencePooler):
    """stochastic: for each feature the activation of a token, drawn in proportion to it."""

    own_fields = ("reading", "num_draws")

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        activations = F.relu(self._join(layers))
        if self.training or self.literal:
            return self._draw(_rows(activations, layout))
        # sum_t p_t a_t with p_t = a_t / sum_s a_s; zero where nothing is active
        total = global_mean(activations, layout)
        squares = global_mean(activations.square(), layout)
        return squares / total.clamp_min(torch.finfo(total.dtype).tiny)

    def _draw(self, rows: Tensor) -> Tensor:
        """Activations `[B, N, C]` -> `[B, C]`, summed in the literal reading, else averaged."""
        rates = rows.detach().float()
        # of clocks that ring after exponential times, p_t is the chance of that of rate a_t to be
        # the first
        drawn = [
            (rates / torch.empty_like(rates).exponential_()).argmax(dim=1)
            for _ in range(self.config.num_draws)
        ]
        values = rows.gather(1, torch.stack(drawn, dim=1))
        return values.sum(dim=1) if self.literal else values.mean(dim=1)


class AttentionPooler(SentencePooler):
    """mha, maxseq_mha, meanseq_mha: attention of the first token, without residual or norm."""

    divisor = "num_heads"
    own_fields = ("reading", "num_heads")

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        # PyTorch's initial weights, as published, in place of BERT's
        width, num_heads = self.output_size, self.config.num_heads
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def _pool(self, layers: Sequence[Tensor], layout: BatchLayout) -> Tensor:
        rows, mask = _rows(self._join(layers), layout), layout.rows.mask
        ignored = None if self.literal or mask is None else ~mask
        vectors, _ = self.attention(
            rows[:, :1], rows, rows, key_padding_mask=ignored, need_weights=False
        )
        return vectors.squeeze(1)


class PoolerKind(NamedTuple):
    build: type[SentencePooler]
    layer_rule: LayerRule
    dense_inputs: int
    """Vectors that the projection before the tanh reads; 0: neither."""


POOLERS: dict[str, PoolerKind] = {
    "cls": PoolerKind(FirstTokenPooler, "last", 1),
    "first": PoolerKind(FirstTokenPooler, "last", 0),
    "meanmax": PoolerKind(MeanMaxPooler, "last", 2),
    "mswap": PoolerKind(SwapPooler, "last", 0),
    "stochastic": PoolerKind(StochasticPooler, "last", 1),
    "max_cls": PoolerKind(FirstTokenPooler, "max", 0),
    "mha": PoolerKind(AttentionPooler, "last", 0),
    "maxseq_mha": PoolerKind(AttentionPooler, "max", 0),
    "meanseq_mha": PoolerKind(AttentionPooler, "mean", 0),
    "mean": PoolerKind(MeanPooler, "last", 0),
    "max": PoolerKind(MaxPooler, "last", 0),
}


def essential(config: PoolerConfig) -> PoolerConfig:
    """The configuration with all that its pooler does not read at the defaults.

    Configurations of the same pooler are equal then.
    """
    kind = POOLERS[config.name]
    read = {"name", "layer_choice", *kind.build.own_fields}
    if kind.layer_rule != "last" or config.layer_choice == "norm":
        read.add("num_layers")
    return PoolerConfig(**{name: getattr(config, name) for name in read})


def build_pooler(
    config: PoolerConfig, hidden_size: int, initializer_range: float, *, with_dense: bool = True
) -> SentencePooler:
    """Make a pooler; its projection has BERT's initial weights.

    Without `with_dense` a caller that has a pre-trained projection applies it and the tanh.
    """
    if config.name not in POOLERS:
        raise ConfigError(f"pooler name must be one of {', '.join(POOLERS)}, found {config.name!r}")
    kind = POOLERS[config.name]
    dense = None
    if with_dense and kind.dense_inputs:
        dense = nn.Linear(kind.dense_inputs * hidden_size, hidden_size)
        nn.init.normal_(dense.weight, std=initializer_range)
        nn.init.zeros_(dense.bias)
    return kind.build(config, hidden_size, kind.layer_rule, dense)
