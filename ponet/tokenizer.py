"""Text to tokens: sentences, tokenizers to load and to save, and their special tokens.

Tokenizers are `tokenizers.Tokenizer` objects. Those made here are in the manner of uncased BERT:
cleaned and lower-cased text without accents, split at white space and punctuation, longest match
first within a word.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

import sentencex
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from ponet.files import write_json, write_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens in the order of their ids in a trained vocabulary, 0 to 4."""

# what published vocabularies of sentence pieces call them
_OTHER_NAMES = {"[PAD]": "<pad>", "[UNK]": "<unk>"}

WORD_PIECE_PREFIX = "##"
"""Marks a piece that continues a word."""

_LANGUAGE = "en"


class SpecialTokens(NamedTuple):
    """Ids of the special tokens, in the order of `SPECIAL_TOKENS`."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Self:
        """Look the five tokens up; `ValueError` names those that are missing."""
        vocabulary = tokenizer.get_vocab()
        return cls(*(vocabulary[token] for token in _special_tokens(vocabulary, "")))


def _special_tokens(vocabulary: Mapping[str, int], where: str) -> list[str]:
    """What the vocabulary calls the special tokens."""
    found = [t if t in vocabulary else _OTHER_NAMES.get(t, t) for t in SPECIAL_TOKENS]
    missing = [t for t, name in zip(SPECIAL_TOKENS, found, strict=True) if name not in vocabulary]
    if missing:
        raise ValueError(
            f"{where}the vocabulary lacks {', '.join(missing)}; "
            f"expected all of {', '.join(SPECIAL_TOKENS)}"
        )
    return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, a BERT `vocab.txt`, or a folder that holds one of them.

    A `vocab.txt` is uncased, unless `tokenizer_config.json` beside it says otherwise.
    """
    path = Path(path).expanduser()
    names = ("tokenizer.json", "vocab.txt", "spiece.model")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        raise ValueError(f"{path}: no tokenizer.json, no vocab.txt, no folder with either")
    if file.suffix == ".model":
        raise ValueError(
            f"{file}: expected a tokenizer.json, found a model of sentencepiece, of which "
            "save_pretrained of transformers' AutoTokenizer makes one"
        )
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
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        token = line.rstrip("\r")
        if token in vocabulary:
            raise ValueError(f"{file}, line {number}: the token {token!r} stands there again")
        vocabulary[token] = len(vocabulary)
    _special_tokens(vocabulary, f"{file}: ")
    tokenizer = bert_tokenizer(vocabulary)
    tokenizer.normalizer = _normalizer(file.with_name("tokenizer_config.json"))
    return tokenizer


def _normalizer(file: Path) -> BertNormalizer:
    """As a `tokenizer_config.json` says, or uncased."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return BertNormalizer(
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error})") from error


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

    `max_length` counts the tokens that a model takes; None: no limit.
    """
    names = _special_tokens(tokenizer.get_vocab(), "")
    roles = zip(SpecialTokens._fields, names, strict=True)
    config = {f"{role}_token": name for role, name in roles} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(1e30) if max_length is None else max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_text(Path(folder) / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(Path(folder) / "tokenizer_config.json", config)


def split_sentences(document: str) -> list[str]:
    """Sentences of a document; none crosses a newline, the end of a paragraph."""
    # the package gives its type checkers no stubs
    segment = sentencex.segment  # pyright: ignore[reportAttributeAccessIssue]
    segments = chain.from_iterable(segment(_LANGUAGE, p) for p in document.split("\n") if p)
    return list(filter(None, map(str.strip, segments)))


def splitter_version() -> str:
    """What decides how `split_sentences` splits, as part of a cache key."""
    return f"sentencex {importlib.metadata.version('sentencex')} {_LANGUAGE}"
