"""Rows as token ids, end to end and without padding: [CLS] text [SEP], or [CLS] a [SEP] b [SEP]."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
from tokenizers import Tokenizer

from glue.rows import Rows
from glue.tasks import Segments
from ponet.sentences import split_sentences
from ponet.tokenizer import SpecialTokens

# texts that the tokenizer sees at once: it keeps far more of them than their ids
_CHUNK = 10_000
_PARAGRAPH_END = re.compile(r"\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
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

    def __len__(self) -> int:
        return len(self.second)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` int64, tokens of each example."""
        return np.diff(self.offsets)


class RowEncoder:
    """Turns rows into ids with one tokenizer."""

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

    def encode(self, rows: Rows) -> EncodedRows:
        """Encode a split."""
        columns = [self._encode_texts(texts) for texts in rows.texts]
        budget = self._max_length - 1 - len(columns)
        ids, segments, second, lengths = [], [], [], []
        for texts in zip(*columns, strict=True):
            kept = _shares([len(tokens) for tokens, _ in texts], budget)
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
        return EncodedRows(
            ids=np.concatenate(ids),
            offsets=np.array(list(accumulate(lengths, initial=0)), dtype=np.int64),
            second=np.array(second, dtype=np.int64),
            segments=None if self._segments == "texts" else np.concatenate(segments),
            labels=rows.labels,
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
