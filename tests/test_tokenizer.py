"""Loading and saving a tokenizer."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ponet.tokenizer import (
    SPECIAL_TOKENS,
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from pretrain.tokenise import train_tokenizer

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
