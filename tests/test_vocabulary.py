"""Training a vocabulary, and encoding many sentences with it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from ponet.tokenizer import SPECIAL_TOKENS, SpecialTokens
from pretrain import vocabulary
from pretrain.vocabulary import SentenceEncoder, token_dtype, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "The cat sat on the mat, and the other cats sat there too.\nThey were sitting still.",
    "A d\u00e9j\u00e0-vu: the cats' mats matter. \u4e2d\u6587 \u03b1\u03b2\u03b3 the end!",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 400)


class TestTrain:
    def test_special_tokens_come_first(self, tokenizer: Tokenizer) -> None:
        assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
        assert SpecialTokens.from_tokenizer(tokenizer).as_tuple() == (0, 1, 2, 3, 4)
        added = tokenizer.get_added_tokens_decoder()
        assert [added[i].content for i in sorted(added)] == list(SPECIAL_TOKENS)

    def test_ids_are_dense_and_frequent_words_whole(self, tokenizer: Tokenizer) -> None:
        vocab = tokenizer.get_vocab()
        assert sorted(vocab.values()) == list(range(len(vocab)))
        assert len(vocab) <= 400
        assert tokenizer.encode("The cats").tokens == ["[CLS]", "the", "cats", "[SEP]"]

    def test_all_ascii_text_can_be_spelt(self, tokenizer: Tokenizer) -> None:
        printable = "".join(map(chr, range(32, 127)))
        assert "[UNK]" not in tokenizer.encode(printable + " Qzx9").tokens

    def test_same_in_another_process(self) -> None:
        program = (
            "from ponet.tokenizer import tokenizer_fingerprint\n"
            "from pretrain.vocabulary import train_tokenizer\n"
            "import pathlib, argparse, textwrap, inspect\n"
            "texts = [inspect.getsource(m) for m in (pathlib, argparse, textwrap)]\n"
            "print(tokenizer_fingerprint(train_tokenizer(texts, 1500)))\n"
        )
        results = {
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PYTHONHASHSEED": seed},
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(results) == 1
        assert len(results.pop().strip()) == 64

    def test_limit_of_characters(self) -> None:
        def documents():
            yield "abc " * 10
            yield "abd " * 10
            raise AssertionError("read too far")

        vocab = train_tokenizer(documents(), 400, max_characters=41).get_vocab()
        assert "abd" in vocab

    def test_complaints(self) -> None:
        with pytest.raises(ValueError, match="no text"):
            train_tokenizer([], 400)
        with pytest.raises(ValueError, match="vocab_size 60 is too small"):
            train_tokenizer(["Text."], 60)


def expected_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """One text at a time through the library."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return [copy.encode(text, add_special_tokens=False).ids for text in texts]


def encoded(encoder: SentenceEncoder, texts: list[str]) -> list[list[int]]:
    """The encoder's flat answer as lists."""
    tokens, counts = encoder.encode(texts)
    assert tokens.dtype == encoder.dtype
    assert counts.dtype == np.int64
    assert counts.sum() == len(tokens)
    return [part.tolist() for part in np.split(tokens, np.cumsum(counts)[:-1])]


CHARACTERS = st.one_of(
    st.sampled_from("aActhe st.,'-[]#\t\n\u00e9\u0301\u4e2d\u03a3\u03c3\u00a0\u2028\u200d\0\ufffd"),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=30), min_size=1, max_size=6)


class TestSentenceEncoder:
    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    @example(["The CATS \u03a3\u03a3 \u03a3 ", "", " ", "[MASK] a[SEP]b", "e\u0301 \u0301e", "cat"])
    def test_equals_the_library(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        encoder = SentenceEncoder(tokenizer)
        assert encoder._words_stand_alone
        assert encoded(encoder, texts) == expected_ids(tokenizer, texts)
        # and again with all words known
        assert encoded(encoder, texts[::-1]) == expected_ids(tokenizer, texts[::-1])

    def test_added_tokens(self, tokenizer: Tokenizer) -> None:
        texts = ["the foobar sat", "foobarfoobar x", "the_foobar new york", "new  york"]
        with_word = Tokenizer.from_str(tokenizer.to_str())
        with_word.add_tokens(["foobar", AddedToken("sat", single_word=True)])
        assert SentenceEncoder(with_word)._words_stand_alone
        assert encoded(SentenceEncoder(with_word), texts) == expected_ids(with_word, texts)
        with_words = Tokenizer.from_str(tokenizer.to_str())
        with_words.add_tokens(["new york"])
        assert not SentenceEncoder(with_words)._words_stand_alone
        assert encoded(SentenceEncoder(with_words), texts) == expected_ids(with_words, texts)

    def test_other_kinds_of_tokenizer(self) -> None:
        other = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
        other.pre_tokenizer = Whitespace()
        assert encoded(SentenceEncoder(other), ["a b", "", "c a"]) == [[1, 2], [], [0, 1]]

    def test_truncation_and_padding_are_off(self, tokenizer: Tokenizer) -> None:
        cut = Tokenizer.from_str(tokenizer.to_str())
        cut.enable_truncation(3)
        cut.enable_padding(length=6)
        text = "the cats sat on the mat"
        assert encoded(SentenceEncoder(cut), [text]) == expected_ids(tokenizer, [text])
        assert cut.truncation is not None

    def test_full_table_is_emptied(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vocabulary, "_MAX_CACHED_WORDS", 3)
        encoder = SentenceEncoder(tokenizer)
        for text in ["the cats sat there too", "the mat", "a cat", "the cats sat"]:
            assert encoded(encoder, [text]) == expected_ids(tokenizer, [text])
        assert len(encoder._table) < 7

    def test_nothing(self, tokenizer: Tokenizer) -> None:
        tokens, counts = SentenceEncoder(tokenizer).encode([])
        assert (len(tokens), len(counts)) == (0, 0)

    @pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
    def test_smallest_type(self, size: int, dtype: type) -> None:
        large = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, "w0"))
        large.pre_tokenizer = Whitespace()
        assert token_dtype(large) is dtype
        tokens, _ = SentenceEncoder(large).encode([f"w{size - 1}"])
        assert tokens.tolist() == [size - 1]
