"""Examples as token ids, end to end without padding: [CLS] text [SEP], or [CLS] a [SEP] b [SEP].

Batches are a function of seed and number alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from glue.data import TextExamples
from glue.tasks import Segments
from ponet import PoNetConfig
from ponet.batch import HostBatch
from ponet.packing import layout_for, stream_of_packed
from ponet.tokenizer import SpecialTokens, split_sentences

# texts that the tokenizer sees at once: it keeps far more of them than their ids
_CHUNK = 10_000
_PARAGRAPH_END = re.compile(r"\n\s*\n")
# batches that are sorted by length together
_POOL = 32
_SHUFFLE = 1


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """A split of N examples with T tokens in all."""

    ids: np.ndarray
    """`[T]` int32."""
    offsets: np.ndarray
    """`[N + 1]` int64, where each example begins."""
    second: np.ndarray
    """`[N]` int64, place in the example where the second text begins; its length without one."""
    segments: np.ndarray | None
    """`[T]` int32, from 0 in each example; None: segments are the texts."""
    labels: np.ndarray | None
    """`[N]`, int64 classes or float64 numbers."""
    num_truncated: int = 0
    """Examples that lost tokens."""

    def __len__(self) -> int:
        return len(self.second)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` int64, tokens per example."""
        return np.diff(self.offsets)


class ExampleEncoder:
    """Turns examples into ids with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, segments: Segments) -> None:
        """Take a copy of a tokenizer.

        Args:
            tokenizer: with BERT's special tokens.
            max_length: tokens of an example at most, special ones included; what is beyond is cut
                off, of a pair the longer text first.
            segments: what is pooled together.
        """
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # text that spells a special token is the plain text that it is
        self._tokenizer.encode_special_tokens = True
        special = SpecialTokens.from_tokenizer(tokenizer)
        self._cls, self._sep = special.cls, special.sep
        self._max_length = max_length
        self._segments = segments

    def encode(self, examples: TextExamples) -> EncodedExamples:
        """Encode a split."""
        columns = [self._encode_texts(texts) for texts in examples.texts]
        budget = self._max_length - 1 - len(columns)
        ids, segments, second, lengths = [], [], [], []
        num_truncated = 0
        for texts in zip(*columns, strict=True):
            whole = [len(tokens) for tokens, _ in texts]
            kept = _shares(whole, budget)
            num_truncated += kept != whole
            cut = [
                (tokens[:size], numbers[:size])
                for (tokens, numbers), size in zip(texts, kept, strict=True)
            ]
            parts, numbers = self._join(cut)
            ids += parts
            segments += numbers
            sizes = [len(part) for part in parts]
            lengths.append(sum(sizes))
            # [CLS], the first text and its [SEP] come before
            second.append(sum(sizes[:3]))
        return EncodedExamples(
            ids=np.concatenate(ids),
            offsets=np.array(list(accumulate(lengths, initial=0)), dtype=np.int64),
            second=np.array(second, dtype=np.int64),
            segments=None if self._segments == "texts" else np.concatenate(segments),
            labels=examples.labels,
            num_truncated=num_truncated,
        )

    def _encode_texts(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text without special tokens, and the segment of each id, from 0."""
        for begin in range(0, len(texts), _CHUNK):
            pieces = [self._split(text) for text in texts[begin : begin + _CHUNK]]
            flat = list(chain.from_iterable(pieces))
            encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
            for parts in pieces:
                ids = [np.array(next(encodings).ids, dtype=np.int32) for _ in parts]
                numbers = np.arange(len(parts), dtype=np.int32).repeat([len(part) for part in ids])
                yield np.concatenate(ids), numbers

    def _split(self, text: str) -> list[str]:
        """The segments of a text, at least one."""
        if self._segments == "sentences":
            return split_sentences(text) or [text]
        return _PARAGRAPH_END.split(text) if self._segments == "paragraphs" else [text]

    def _join(
        self, texts: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Put special tokens around texts, each a segment of its own."""
        ids = [np.array([self._cls], dtype=np.int32)]
        segments = [np.zeros(1, dtype=np.int32)]
        for tokens, numbers in texts:
            begin = segments[-1][-1] + 1
            end = begin + (numbers[-1] + 1 if len(numbers) else 0)
            ids += [tokens, np.array([self._sep], dtype=np.int32)]
            segments += [numbers + begin, np.array([end], dtype=np.int32)]
        return ids, segments


def _shares(lengths: list[int], budget: int) -> list[int]:
    """Tokens that each of one or two texts keeps when the longer loses its last ones until all fit.

    Args:
        lengths: of the texts.
        budget: tokens in all.
    """
    if sum(lengths) <= budget:
        return lengths
    if len(lengths) == 1:
        return [budget]
    first, second = lengths
    shorter = min(first, second, budget // 2)
    return [shorter, budget - shorter] if first <= second else [budget - shorter, shorter]


def collect_examples(
    examples: EncodedExamples, indices: np.ndarray, config: PoNetConfig
) -> HostBatch:
    """Make a batch of B examples with T tokens, without padding, as a model takes it.

    Args:
        examples: where from.
        indices: `[B]`, which.
        config: of the model.

    Returns:
        `input_ids` `[T]` int64; `labels` `[B]`, int64 or float32, where there are any;
        `token_type_ids` `[T]` int64, 1 in the second text and its [SEP], where the model knows
        them; and the layout.
    """
    lengths = examples.lengths[indices]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    places = within + np.repeat(examples.offsets[:-1][indices], lengths)
    ids = _tensor(examples.ids[places], torch.int64)
    tensors = {"input_ids": ids}
    # some encoders know no second text
    if config.type_vocab_size > 1:
        types = within >= np.repeat(examples.second[indices], lengths)
        tensors["token_type_ids"] = _tensor(types, torch.int64)
    if examples.labels is not None:
        is_number = examples.labels.dtype.kind == "f"
        labels = _tensor(examples.labels[indices], torch.float32 if is_number else torch.int64)
        tensors["labels"] = labels
    segments = examples.segments
    given = None if segments is None else _tensor(segments[places], torch.int64)
    stream = stream_of_packed(ids, _tensor(cu_seqlens, torch.int32))
    return HostBatch(tensors, layout_for(config, stream, ids, given))


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


class BatchesOfSimilarLength:
    """Endless batches; every pass is another order, its smaller batch holds what fills no other."""

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int) -> None:
        """Make the sequence of batches.

        Args:
            lengths: `[N]`, tokens per example.
            batch_size: examples per batch.
            seed: of the run.
        """
        self.per_pass = -(-len(lengths) // batch_size)
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._pass = -1
        self._batches: list[np.ndarray] = []

    def indices(self, number: int) -> np.ndarray:
        """Examples of a batch, counted from 0: `[batch_size]` or less."""
        turn, within = divmod(number, self.per_pass)
        if turn != self._pass:
            self._pass, self._batches = turn, self._arrange(turn)
        return self._batches[within]

    def _arrange(self, turn: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed, _SHUFFLE, turn))
        order = rng.permutation(len(self._lengths))
        size = _POOL * self._batch_size
        pools = [order[begin : begin + size] for begin in range(0, len(order), size)]
        ordered = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        cuts = range(self._batch_size, len(ordered), self._batch_size)
        batches = np.split(ordered, cuts)
        return [batches[number] for number in rng.permutation(len(batches))]


def batches_of_all(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Batches that hold every example once, sorted by length.

    Args:
        lengths: `[N]`, tokens per example.
        max_tokens: of a batch, counted as if it were padded, because some mixers pad inside; an
            example that is longer has a batch of its own.
    """
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return [np.array(batch) for batch in batches]
