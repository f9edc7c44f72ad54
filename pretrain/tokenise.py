"""Text to tokens: train a WordPiece vocabulary, and encode documents sentence by sentence."""

import json
import string
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice, pairwise
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.trainers import WordPieceTrainer

from ponet.tokenizer import (
    SPECIAL_TOKENS,
    WORD_PIECE_PREFIX,
    bare_tokenizer,
    bert_tokenizer,
    split_sentences,
)

# words kept for reuse by `SentenceEncoder`; a word takes about 200 bytes with its ids
_MAX_CACHED_WORDS = 1_000_000
_WORD_GROUP = 256
# handed to a worker at once: seconds of work would starve the others at the end
_BATCH_CHARACTERS = 2**20
# worker processes need seconds to start (they import torch with the caller's main module) and
# have each to meet the words of the language: with less text they cost more than they save
_BATCHES_WITHOUT_WORKERS = 48


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_characters: int = 50_000_000
) -> Tokenizer:
    """Train an uncased WordPiece vocabulary; the same documents always give the same one.

    Args:
        vocab_size: number of tokens, special ones included; small texts may give fewer.
        max_characters: to read; word counts hardly change beyond the default.

    Raises:
        ValueError: no text, or a vocabulary too small for the letters of the text.
    """
    sample = next(_batched(documents, max_characters), None)
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


def _alphabet(documents: list[str], limit: int) -> list[str]:
    """Most frequent characters of the normalised text, in code point order; ASCII is always in."""
    normalizer = BertNormalizer()
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    ascii_letters = set(string.ascii_lowercase + string.digits + string.punctuation)
    others = [char for char in counts if char not in ascii_letters and not char.isspace()]
    others.sort(key=lambda char: (-counts[char], char))
    return sorted({*ascii_letters, *others[:limit]})


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Smallest type that holds every id."""
    return np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32


class SentenceEncoder:
    """Encodes many sentences to one flat array, more than twice as fast as `encode_batch_fast`.

    An uncased BERT tokenizer splits at every space and treats each word alone, so a word is encoded
    once and looked up ever after. Tokenizers built otherwise encode whole sentences. Text that
    spells a special token, such as "[MASK]", is encoded as the plain text that it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # a copy, without truncation and padding
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(token_dtype(tokenizer))
        self._encode = self._by_words if _words_stand_alone(tokenizer) else self._whole
        # the bytes of a word's ids
        self._words: dict[str, bytes] = {}

    def encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all sentences end to end, and the `int64` number of tokens of each."""
        encoded = self._encode(sentences)
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.frombuffer(b"".join(encoded), dtype=self.dtype), sizes // self.dtype.itemsize

    def _whole(self, sentences: list[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype).tobytes() for encoding in encodings]

    def _by_words(self, sentences: list[str]) -> list[bytes]:
        if len(self._words) > _MAX_CACHED_WORDS:
            self._words = {}
        split = [sentence.split(" ") for sentence in sentences]
        words = dict.fromkeys(chain.from_iterable(split))
        self._learn([word for word in words if word not in self._words])
        look_up = self._words.__getitem__
        return [b"".join(map(look_up, words)) for words in split]

    def _learn(self, words: list[str]) -> None:
        """Encode words as if they were parts of few sentences: a quarter of the time of each."""
        groups = [words[i : i + _WORD_GROUP] for i in range(0, len(words), _WORD_GROUP)]
        # the fast form would not tell which word a token belongs to
        encodings = self._tokenizer.encode_batch(
            groups, is_pretokenized=True, add_special_tokens=False
        )
        for group, encoding in zip(groups, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=self.dtype)
            word_ids = np.array(encoding.word_ids, dtype=np.int64)
            bounds = np.searchsorted(word_ids, np.arange(len(group) + 1)).tolist()
            for word, (start, end) in zip(group, pairwise(bounds), strict=True):
                self._words[word] = ids[start:end].tobytes()


def _words_stand_alone(tokenizer: Tokenizer) -> bool:
    """Whether encoding the space-separated words one by one gives the encoding of the text."""
    settings = json.loads(tokenizer.to_str())
    parts = (settings[name] or {} for name in ("normalizer", "pre_tokenizer", "model"))
    kinds = [part.get("type") for part in parts]
    added = "".join(token["content"] for token in settings["added_tokens"])
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and " " not in added


class TokenisedDocuments(NamedTuple):
    """Some consecutive documents; sentences without tokens and empty documents are left out."""

    tokens: np.ndarray
    sentence_sizes: np.ndarray
    """In tokens."""
    document_sizes: np.ndarray
    """In sentences."""
    num_skipped: int


def tokenise(
    documents: Iterable[str], tokenizer: Tokenizer, num_workers: int = 0
) -> Generator[TokenisedDocuments, None, None]:
    """Split documents, paragraphs separated by newlines, to sentences and encode them, in order.

    Worker processes help with what is beyond 48 MiB of text.
    """
    batches = _batched(documents, _BATCH_CHARACTERS)
    encoder = SentenceEncoder(tokenizer)
    for batch in batches if num_workers == 0 else islice(batches, _BATCHES_WITHOUT_WORKERS):
        yield _tokenise_batch(encoder, batch)
    if not num_workers:
        return
    # fork is unsafe beside the threads of torch and tokenizers; the first batch starts processes
    pool = ProcessPoolExecutor(
        num_workers, get_context("spawn"), _start_worker, (tokenizer.to_str(),)
    )
    pending: deque[Future[TokenisedDocuments]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_tokenise_in_worker, batch))
            # enough to keep all workers busy, few enough to bound memory
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batched(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive documents, as few as have `size` characters together."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise_batch(encoder: SentenceEncoder, documents: list[str]) -> TokenisedDocuments:
    sentences = [split_sentences(document) for document in documents]
    tokens, sizes = encoder.encode(list(chain.from_iterable(sentences)))
    document_of = np.repeat(np.arange(len(documents)), [len(listed) for listed in sentences])
    kept = sizes > 0
    document_sizes = np.bincount(document_of[kept], minlength=len(documents))
    return TokenisedDocuments(
        tokens=tokens,
        sentence_sizes=sizes[kept],
        document_sizes=document_sizes[document_sizes > 0],
        num_skipped=int((document_sizes == 0).sum()),
    )


_encoder_of_worker: SentenceEncoder


def _start_worker(tokenizer_json: str) -> None:
    global _encoder_of_worker
    _encoder_of_worker = SentenceEncoder(Tokenizer.from_str(tokenizer_json))


def _tokenise_in_worker(documents: list[str]) -> TokenisedDocuments:
    return _tokenise_batch(_encoder_of_worker, documents)
