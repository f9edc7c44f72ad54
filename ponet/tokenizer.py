"""Text to tokens: sentences, tokenizers to load and to save, and their special tokens.

Tokenizers are `tokenizers.Tokenizer` objects in the manner of uncased BERT: cleaned and lower-cased
text without accents, split at white space and punctuation, longest match first within a word.
"""

import hashlib
import importlib.metadata
import json
from collections import Counter
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import sentencex
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from ponet.files import write_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens in the order of their ids in a trained vocabulary, 0 to 4."""

WORD_PIECE_PREFIX = "##"
"""Marks a piece that continues a word."""

_NO_LENGTH_LIMIT = int(1e30)
_LANGUAGE = "en"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

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
        path: a `tokenizer.json`, a BERT `vocab.txt` (one token per line; taken as uncased), or a
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
            f"{file}: the vocabulary lacks {', '.join(missing)}; expected one token per line"
        )
    return bert_tokenizer(vocabulary)


def bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """An uncased BERT tokenizer over a finished vocabulary."""
    tokenizer = bare_tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = WordPieceDecoder(prefix=WORD_PIECE_PREFIX)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def bare_tokenizer(model: WordPiece) -> Tokenizer:
    """A model with BERT's normaliser and word splitting."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


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


def split_sentences(document: str) -> list[str]:
    """Sentences of a document; none crosses the end of a paragraph.

    Args:
        document: paragraphs separated by newlines.
    """
    paragraphs = filter(None, document.split("\n"))
    # the package gives its type checkers no stubs
    segment = sentencex.segment  # pyright: ignore[reportAttributeAccessIssue]
    segments = chain.from_iterable(segment(_LANGUAGE, paragraph) for paragraph in paragraphs)
    return list(filter(None, map(str.strip, segments)))


def splitter_version() -> str:
    """What decides how `split_sentences` splits, as part of a cache key."""
    return f"sentencex {importlib.metadata.version('sentencex')} {_LANGUAGE}"
