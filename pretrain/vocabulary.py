"""The WordPiece vocabulary: load one, train one, save it beside a checkpoint, encode fast with it.

Tokenizers are `tokenizers.Tokenizer` objects in the manner of uncased BERT: cleaned and lower-cased
text without accents, split at white space and punctuation, longest match first within a word.
"""

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from ponet.checkpoint import write_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens in the order of their ids in a trained vocabulary, 0 to 4."""

_PREFIX = "##"
_NO_LENGTH_LIMIT = int(1e30)
# words kept for reuse by `SentenceEncoder`; a word takes about 200 bytes with its ids
_MAX_CACHED_WORDS = 1_000_000
_WORD_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens."""

    pad: int
    """Fills short rows."""
    unk: int
    """Stands for a word without pieces."""
    cls: int
    """Begins a sequence."""
    sep: int
    """Ends a segment."""
    mask: int
    """Hides a token that the model predicts."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Look the five tokens up.

        Raises:
            ValueError: some of them are not in the vocabulary.
        """
        ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        found = [index for index in ids if index is not None]
        if len(found) < len(ids):
            pairs = zip(SPECIAL_TOKENS, ids, strict=True)
            missing = ", ".join(token for token, index in pairs if index is None)
            raise ValueError(
                f"the vocabulary lacks {missing}; expected all of {', '.join(SPECIAL_TOKENS)}"
            )
        pad, unk, cls_, sep, mask = found
        return cls(pad=pad, unk=unk, cls=cls_, sep=sep, mask=mask)

    def as_tuple(self) -> tuple[int, ...]:
        """The ids in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a file or from a folder that holds one.

    Args:
        path: a `tokenizer.json`, a BERT `vocab.txt` (one token a line; taken as uncased), or a
            folder with either, the first preferred.

    Raises:
        ValueError: there is no such file, or it is neither of the two.
    """
    path = Path(path).expanduser()
    file = path
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "vocab.txt"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise ValueError(f"{path}: no tokenizer.json and no vocab.txt in this folder")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"{path}: no such file; expected a tokenizer.json or a vocab.txt")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 ({error})") from None
    if file.suffix != ".json":
        return _from_vocabulary_file(file, text)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        # the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer file ({error})") from error


def _from_vocabulary_file(file: Path, text: str) -> Tokenizer:
    """BERT's `vocab.txt`: the line number is the id."""
    tokens = text.removesuffix("\n").split("\n")
    tokens = [token.rstrip("\r") for token in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        token, _ = Counter(tokens).most_common(1)[0]
        line = len(tokens) - tokens[::-1].index(token)
        raise ValueError(f"{file}, line {line}: the token {token!r} stands there a second time")
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{file}: the vocabulary lacks {', '.join(missing)}; expected one token a line"
        )
    return _bert_tokenizer(vocabulary)


def _bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """An uncased BERT tokenizer over a finished vocabulary."""
    tokenizer = _bare_tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = WordPieceDecoder(prefix=_PREFIX)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _bare_tokenizer(model: WordPiece) -> Tokenizer:
    """A model with BERT's normaliser and word splitting."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


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
    inner = [_PREFIX + letter for letter in alphabet if letter not in string.punctuation]
    given = [*SPECIAL_TOKENS, *inner]
    if vocab_size < len(given) + len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: special tokens and single letters alone take "
            f"{len(given) + len(alphabet)}"
        )
    tokenizer = _bare_tokenizer(WordPiece(unk_token="[UNK]"))
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=given,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return _bert_tokenizer(tokenizer.get_vocab(with_added_tokens=True))


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


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything that decides how the tokenizer splits text: 64 hexadecimal digits."""
    # the order of keys in the file differs between library versions and means nothing
    content = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, *, max_length: int | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them.

    Each file is complete or absent: written beside its place and moved there.

    Args:
        tokenizer: a tokenizer with BERT's five special tokens.
        folder: made if missing.
        max_length: tokens a model takes, written as `model_max_length`; no limit by default.

    Raises:
        ValueError: a special token is missing.
    """
    SpecialTokens.from_tokenizer(tokenizer)
    config = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _NO_LENGTH_LIMIT if max_length is None else max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


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
