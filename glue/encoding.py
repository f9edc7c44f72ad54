"""Examples as token ids, end to end without padding: [CLS] text [SEP], or [CLS] a [SEP] b [SEP].

Batches are a function of seed and number alone.
"""

import re
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing

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
        """Take a copy of a tokenizer with BERT's special tokens.

        Of `max_length` tokens, special ones included, what is beyond is cut off, of a pair from
        the longer text first.
        """
        special = SpecialTokens.from_tokenizer(tokenizer)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        ends = ("[SEP]", special.sep), ("[CLS]", special.cls)
        self._tokenizer.post_processor = BertProcessing(*ends)
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer.no_padding()
        # text that spells a special token is the plain text that it is
        self._tokenizer.encode_special_tokens = True
        self._segments = segments

    def encode(self, examples: TextExamples) -> EncodedExamples:
        """Encode a split."""
        ids, second, segments = [], [], []
        num_truncated = 0
        for begin in range(0, len(examples), _CHUNK):
            end = begin + _CHUNK
            columns = [[self._split(text) for text in texts[begin:end]] for texts in examples.texts]
            inputs = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
            for encoding in self._tokenizer.encode_batch(inputs, is_pretokenized=True):
                ids.append(np.array(encoding.ids, dtype=np.int32))
                second.append(encoding.type_ids.count(0))
                num_truncated += bool(encoding.overflowing)
                if self._segments != "texts":
                    segments.append(_segments_of(encoding.word_ids))
        return EncodedExamples(
            ids=np.concatenate(ids),
            offsets=np.array(list(accumulate(map(len, ids), initial=0)), dtype=np.int64),
            second=np.array(second, dtype=np.int64),
            segments=np.concatenate(segments) if segments else None,
            labels=examples.labels,
            num_truncated=num_truncated,
        )

    def _split(self, text: str) -> list[str]:
        """The segments of a text, at least one: "words" to the tokenizer."""
        if self._segments == "sentences":
            return split_sentences(text) or [text]
        return _PARAGRAPH_END.split(text) if self._segments == "paragraphs" else [text]


def _segments_of(parts: list[int | None]) -> np.ndarray:
    """Number segments by the part of its text that each token is in; None: a special token."""
    numbers = np.array([-1 if part is None else part for part in parts])
    begins = (numbers[1:] != numbers[:-1]) | (numbers[1:] < 0)
    return np.cumsum(np.append(False, begins), dtype=np.int32)


def collect_examples(
    examples: EncodedExamples, indices: np.ndarray, config: PoNetConfig
) -> HostBatch:
    """Make a batch of the examples with some `indices` `[B]`, T tokens, as a model takes it.

    Returns:
        `input_ids` `[T]` int64; `labels` `[B]`, int64 or float32, where there are any;
        `token_type_ids` `[T]` int64, 1 in the second text and its [SEP], where the model knows
        them; and the layout.
    """
    lengths = examples.lengths[indices]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    places = within + np.repeat(examples.offsets[:-1][indices], lengths)
    ids = torch.from_numpy(examples.ids[places]).long()
    tensors = {"input_ids": ids}
    # some encoders know no second text
    if config.type_vocab_size > 1:
        types = within >= np.repeat(examples.second[indices], lengths)
        tensors["token_type_ids"] = torch.from_numpy(types).long()
    if examples.labels is not None:
        labels = torch.from_numpy(examples.labels[indices])
        tensors["labels"] = labels.float() if labels.is_floating_point() else labels
    segments = examples.segments
    given = None if segments is None else torch.from_numpy(segments[places]).long()
    stream = stream_of_packed(ids, torch.from_numpy(cu_seqlens).int())
    return HostBatch(tensors, layout_for(config, stream, ids, given))


class BatchesOfSimilarLength:
    """Endless batches; every pass is another order, its smaller batch holds what fills no other."""

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int) -> None:
        """Make the sequence of batches of examples with `[N]` tokens each."""
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
    """Batches that hold every example once, sorted by their lengths `[N]`.

    A batch has at most `max_tokens`, counted as if it were padded, because some mixers pad inside;
    an example that is longer has a batch of its own.
    """
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return [np.array(batch) for batch in batches]
