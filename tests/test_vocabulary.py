"""Loading, training, saving a tokenizer, and encoding many sentences with it."""

import json
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

from pretrain import vocabulary
from pretrain.vocabulary import (
    SPECIAL_TOKENS,
    SentenceEncoder,
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
    tokenizer_fingerprint,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
BERT_VOCABULARY = ROOT.parent / "shared" / "data" / "vocab" / "bert-base-uncased-vocab.txt"
DOCUMENTS = [
    "The cat sat on the mat, and the other cats sat there too.\nThey were sitting still.",
    "A d\u00e9j\u00e0-vu: the cats' mats matter. \u4e2d\u6587 \u03b1\u03b2\u03b3 the end!",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 400)


def vocab_txt(path: Path, *tokens: str) -> Path:
    """A BERT vocabulary file."""
    path.write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    return path


class TestLoad:
    def test_vocab_txt_is_uncased_bert(self, tmp_path: Path) -> None:
        words = ["[PAD]", "the", "cat", "##s", ",", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "e"]
        tokenizer = load_tokenizer(vocab_txt(tmp_path / "vocab.txt", *words))
        encoding = tokenizer.encode("The CATS,\tdog \u00e9 [MASK]")
        assert encoding.ids == [6, 1, 2, 3, 4, 5, 9, 8, 7]
        assert tokenizer.decode(encoding.ids) == "the cats, e"
        assert SpecialTokens.from_tokenizer(tokenizer) == SpecialTokens(
            pad=0, unk=5, cls=6, sep=7, mask=8
        )

    def test_tokenizer_json_is_preferred_in_a_folder(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        vocab_txt(tmp_path / "vocab.txt", *SPECIAL_TOKENS)
        assert load_tokenizer(tmp_path).get_vocab_size() == 5
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()

    def test_published_vocabulary(self) -> None:
        if not BERT_VOCABULARY.is_file():
            pytest.skip(f"no vocabulary at {BERT_VOCABULARY}")
        tokenizer = load_tokenizer(BERT_VOCABULARY)
        assert tokenizer.get_vocab_size() == 30522
        assert SpecialTokens.from_tokenizer(tokenizer).as_tuple() == (0, 100, 101, 102, 103)
        assert tokenizer.encode("Hello, unaffable world!").ids == [
            *(101, 7592, 1010, 14477, 20961, 3468, 2088, 999, 102)
        ]

    def test_complaints(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such file"):
            load_tokenizer(tmp_path / "missing.json")
        with pytest.raises(ValueError, match=r"no tokenizer\.json and no vocab\.txt"):
            load_tokenizer(tmp_path)
        (tmp_path / "bad.json").write_text('{"model": 1}', "utf-8")
        with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
            load_tokenizer(tmp_path / "bad.json")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
        with pytest.raises(ValueError, match=r"latin\.txt: expected UTF-8"):
            load_tokenizer(tmp_path / "latin.txt")
        with pytest.raises(ValueError, match=r"lacks \[SEP\], \[MASK\]"):
            load_tokenizer(vocab_txt(tmp_path / "few.txt", "a", *SPECIAL_TOKENS[:3]))
        with pytest.raises(ValueError, match="line 8: the token 'a' stands there a second"):
            load_tokenizer(vocab_txt(tmp_path / "two.txt", "b", "a", *SPECIAL_TOKENS, "a"))

    def test_missing_special_token(self) -> None:
        bare = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, "[UNK]"))
        with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
            SpecialTokens.from_tokenizer(bare)


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
            "from pretrain.vocabulary import train_tokenizer, tokenizer_fingerprint\n"
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


class TestSave:
    def test_folder_serves_both_libraries(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        folder = tmp_path / "new" / "folder"
        save_tokenizer(tokenizer, folder, max_length=512)
        assert sorted(path.name for path in folder.iterdir()) == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        loaded = load_tokenizer(folder)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        assert config["mask_token"] == "[MASK]"
        assert config["pad_token"] == "[PAD]"
        assert config["model_max_length"] == 512
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (folder / "tokenizer.json").stat().st_mode & 0o400

    def test_transformers_reads_it(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        transformers = pytest.importorskip("transformers")
        save_tokenizer(tokenizer, tmp_path, max_length=8)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.mask_token_id == 4
        assert loaded.model_max_length == 8
        encoded = loaded("the cats", "the mat")
        assert encoded["input_ids"] == tokenizer.encode("the cats", "the mat").ids
        assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]

    def test_failure_leaves_the_old_file(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_tokenizer(tokenizer, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            save_tokenizer(train_tokenizer(["Other text."], 400), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_fingerprint_follows_behaviour(self, tokenizer: Tokenizer) -> None:
        copy = Tokenizer.from_str(tokenizer.to_str(pretty=True))
        assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
        copy.add_tokens(["newword"])
        assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(tokenizer)


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
