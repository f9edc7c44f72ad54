"""Training a vocabulary, and encoding many sentences with it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from ponet.tokenizer import SPECIAL_TOKENS
from pretrain import tokenise
from pretrain.tokenise import SentenceEncoder, train_tokenizer

DOCUMENTS = [
    "The cat sat on the mat, and the other cats sat there too.\nThey were sitting still.",
    "A d\u00e9j\u00e0-vu: the cats' mats matter. \u4e2d\u6587 \u03b1\u03b2\u03b3 the end!",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 400)


def test_vocabulary(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(vocab) <= 400
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("The cats").tokens == ["[CLS]", "the", "cats", "[SEP]"]
    printable = "".join(map(chr, range(32, 127)))
    assert "[UNK]" not in tokenizer.encode(printable + " Qzx9").tokens


def test_vocabulary_is_the_same_in_another_process():
    # hash maps of the library are seeded per process
    texts = [Path(module.__file__).read_text("utf-8") for module in (tokenise, pytest)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        other = pool.submit(train_tokenizer, texts, 1500).result()
    assert other.to_str() == train_tokenizer(texts, 1500).to_str()


def test_vocabulary_of_a_limited_or_unusable_text():
    def documents():
        yield "abc " * 10
        yield "abd " * 10
        raise AssertionError("read too far")

    assert "abd" in train_tokenizer(documents(), 400, max_characters=41).get_vocab()
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 400)
    with pytest.raises(ValueError, match="vocab_size 60 is too small"):
        train_tokenizer(["Text."], 60)


def check(encoder: SentenceEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Compare with one text at a time through the library."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    expected = [copy.encode(text, add_special_tokens=False).ids for text in texts]
    tokens, counts = encoder.encode(texts)
    assert (tokens.dtype, counts.dtype) == (encoder.dtype, np.int64)
    assert counts.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]


CHARACTERS = st.one_of(
    st.sampled_from("aActhe st.,'-[]#\t\n\u00e9\u0301\u4e2d\u03a3\u03c3\u00a0\u2028\u200d\0\ufffd"),
    st.characters(exclude_categories=["Cs"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=30), min_size=1, max_size=6))
@example(["The CATS \u03a3\u03a3 \u03a3 ", "", " ", "[MASK] a[SEP]b", "e\u0301 \u0301e", "cat"])
def test_encoding_equals_the_library(tokenizer, texts):
    encoder = SentenceEncoder(tokenizer)
    check(encoder, tokenizer, texts)
    # and again with all words known
    check(encoder, tokenizer, texts[::-1])
    assert [len(part) for part in encoder.encode([])] == [0, 0]


@pytest.mark.parametrize("added", [["foobar", AddedToken("sat", single_word=True)], ["new york"]])
def test_added_tokens_truncation_and_more_words_than_are_kept(tokenizer, monkeypatch, added):
    monkeypatch.setattr(tokenise, "_MAX_CACHED_WORDS", 3)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(added)
    cut = Tokenizer.from_str(other.to_str())
    cut.enable_truncation(1)
    cut.enable_padding(length=6)
    encoder = SentenceEncoder(cut)
    for text in ["the foobar sat", "foobarfoobar x", "the_foobar new york", "new  york", "the"]:
        check(encoder, other, [text])


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_other_kinds_of_tokenizer_and_the_smallest_type(size, dtype):
    large = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, "w0"))
    large.pre_tokenizer = Whitespace()
    encoder = SentenceEncoder(large)
    assert encoder.dtype == dtype
    check(encoder, large, [f"w{size - 1} w5", "", "c w2"])
