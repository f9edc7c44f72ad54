"""The WordPiece vocabulary: train one, and encode many sentences fast with it."""

import json
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.trainers import WordPieceTrainer

from ponet.tokenizer import SPECIAL_TOKENS, WORD_PIECE_PREFIX, bare_tokenizer, bert_tokenizer

# words kept for reuse by `SentenceEncoder`; a word takes about 200 bytes with its ids
_MAX_CACHED_WORDS = 1_000_000
_WORD_GROUP = 256


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_characters: int | None = 50_000_000
) -> Tokenizer:
    """Train an uncased WordPiece vocabulary; the same documents always give the same one.

    Args:
        documents: text to learn from.
        vocab_size: number of tokens, special ones included; small texts may give fewer.
        max_characters: stop reading after so many; word counts hardly change beyond the default,
            and memory stays bounded. None reads everything.

    Raises:
        ValueError: no text, or a vocabulary too small for the letters of the text.
    """
    sample = list(_take(documents, max_characters))
    if not sample:
        raise ValueError("cannot train a vocabulary: there is no text")
    alphabet = _alphabet(sample, limit=max(1, vocab_size // 20))
    # the trainer meets inner letters in the order of a randomly seeded hash map, and ids decide
    # ties between merges; tokens given in advance keep their order
    inner = [WORD_PIECE_PREFIX + letter for letter in alphabet if letter not in string.punctuation]
    given = [*SPECIAL_TOKENS, *inner]
    if vocab_size < len(given) + len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: special tokens and single letters alone take "
            f"{len(given) + len(alphabet)}"
        )
    tokenizer = bare_tokenizer(WordPiece(unk_token="[UNK]"))
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=given,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=WORD_PIECE_PREFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return bert_tokenizer(tokenizer.get_vocab(with_added_tokens=True))


def _take(documents: Iterable[str], max_characters: int | None) -> Iterator[str]:
    """The first documents up to a number of characters."""
    characters = 0
    for document in documents:
        yield document
        characters += len(document)
        if max_characters is not None and characters >= max_characters:
            return


def _alphabet(documents: list[str], limit: int) -> list[str]:
    """Commonest characters of the normalised text, in code point order; ASCII is always in."""
    normalizer = BertNormalizer()
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    ascii_letters = set(string.ascii_lowercase + string.digits + string.punctuation)
    others = [char for char in counts if char not in ascii_letters and not char.isspace()]
    others.sort(key=lambda char: (-counts[char], char))
    return sorted({*ascii_letters, *others[:limit]})


class _WordTable(dict[str, int]):
    """Number of every word met; new words are numbered at first sight and kept for encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.new_words: list[str] = []

    def __missing__(self, word: str) -> int:
        index = self[word] = len(self)
        self.new_words.append(word)
        return index


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Smallest type that holds every id: `uint16` up to 65,536 tokens, `uint32` beyond."""
    return np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32


class SentenceEncoder:
    """Encodes many sentences to one flat array, several times as fast as `encode_batch`.

    An uncased BERT tokenizer splits at every space and treats each word alone, so a word is encoded
    once and looked up ever after. Tokenizers built otherwise go through `encode_batch_fast`. Text
    that spells a special token, such as "[MASK]", is encoded as the plain text that it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a copy of a tokenizer, without truncation and padding."""
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.dtype = token_dtype(tokenizer)
        self._words_stand_alone = _words_stand_alone(tokenizer)
        self._reset()

    def _reset(self) -> None:
        """Forget all words."""
        self._table = _WordTable()
        self._tokens = np.empty(0, dtype=self.dtype)
        self._starts = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)

    def encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode without special tokens.

        Args:
            sentences: any texts.

        Returns:
            The tokens of all sentences one after the other, and the `int64` number of tokens of
            each sentence.
        """
        if not sentences:
            return np.empty(0, dtype=self.dtype), np.empty(0, dtype=np.int64)
        if not self._words_stand_alone:
            return self._encode_now(sentences)
        if len(self._table) > _MAX_CACHED_WORDS:
            self._reset()
        split = [sentence.split(" ") for sentence in sentences]
        num_words = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
        lookup = map(self._table.__getitem__, chain.from_iterable(split))
        words = np.fromiter(lookup, dtype=np.int64, count=int(num_words.sum()))
        self._learn_new_words()
        counts = self._counts[words]
        ends = np.cumsum(counts)
        # position of every token within the stored tokens of its word, plus where those begin
        source = np.repeat(self._starts[words] - (ends - counts), counts)
        source += np.arange(len(source))
        word_ends = np.cumsum(num_words)
        token_ends = ends[word_ends - 1]
        return self._tokens[source], np.diff(token_ends, prepend=0)

    def _encode_now(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode by the tokenizer itself."""
        ids = [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        counts = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), dtype=self.dtype, count=int(counts.sum()))
        return tokens, counts

    def _learn_new_words(self) -> None:
        """Encode the words met for the first time."""
        new_words, self._table.new_words = self._table.new_words, []
        if new_words:
            tokens, counts = self._encode_words(new_words)
            starts = len(self._tokens) + np.cumsum(counts) - counts
            self._tokens = _append(self._tokens, tokens)
            self._starts = _append(self._starts, starts)
            self._counts = _append(self._counts, counts)

    def _encode_words(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode words as if they were parts of few sentences: a quarter of the time of each."""
        groups = [words[i : i + _WORD_GROUP] for i in range(0, len(words), _WORD_GROUP)]
        # the fast form would not tell which word a token belongs to
        encodings = self._tokenizer.encode_batch(
            groups, is_pretokenized=True, add_special_tokens=False
        )
        tokens = [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        counts = [
            np.bincount(np.array(encoding.word_ids, dtype=np.int64), minlength=len(group))
            for encoding, group in zip(encodings, groups, strict=True)
        ]
        return np.concatenate(tokens), np.concatenate(counts)


def _append(array: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Grow in place; the system moves pages instead of copying a table of millions of words."""
    length = len(array)
    # nobody holds a view: lookups with an index array copy
    array.resize(length + len(tail), refcheck=False)
    array[length:] = tail
    return array


def _words_stand_alone(tokenizer: Tokenizer) -> bool:
    """Whether encoding the space-separated words one by one gives the encoding of the text."""
    settings = json.loads(tokenizer.to_str())
    kinds = [
        (settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")
    ]
    added = settings["added_tokens"] or []
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(
        " " in token["content"] for token in added
    )
