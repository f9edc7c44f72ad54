"""Loading and saving a tokenizer."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from ponet.tokenizer import (
    SPECIAL_TOKENS,
    SpecialTokens,
    bert_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)

WORDS = ["[PAD]", "the", "cat", "##s", ",", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "e"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return bert_tokenizer({word: index for index, word in enumerate(WORDS)})


def test_vocab_txt_is_uncased_bert_and_tokenizer_json_is_preferred(tmp_path, tokenizer):
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    found = load_tokenizer(tmp_path)
    encoding = found.encode("The CATS,\tdog \u00e9 [MASK]")
    assert encoding.ids == [6, 1, 2, 3, 4, 5, 9, 8, 7]
    assert found.decode(encoding.ids) == "the cats, e"
    assert SpecialTokens.from_tokenizer(found) == SpecialTokens(pad=0, unk=5, cls=6, sep=7, mask=8)
    assert found.to_str() == tokenizer.to_str()
    tokenizer.add_tokens(["dog"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_vocab_txt_is_split_as_the_file_beside_it_says(tmp_path):
    words = [*SPECIAL_TOKENS, "The", "the", "caf\u00e9", "cafe"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    settings = tmp_path / "tokenizer_config.json"
    for content, expected in (
        ({}, ["the", "cafe"]),
        ({"do_lower_case": False}, ["The", "caf\u00e9"]),
        ({"do_lower_case": False, "strip_accents": True}, ["The", "cafe"]),
        ({"strip_accents": False}, ["the", "caf\u00e9"]),
    ):
        settings.write_text(json.dumps(content))
        for path in (tmp_path, tmp_path / "vocab.txt"):
            assert load_tokenizer(path).encode("The caf\u00e9").tokens[1:-1] == expected
    settings.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: damaged"):
        load_tokenizer(tmp_path)


def test_sentence_pieces_with_their_names_of_special_tokens(tmp_path):
    """As the published FNet has them."""
    special = ["<unk>", "<pad>", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*((token, 0.0) for token in special), ("\u2581a", -1.0), ("\u2581cat", -2.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = Metaspace()
    assert SpecialTokens.from_tokenizer(tokenizer) == (1, 0, 2, 3, 4)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).encode("a cat").ids == [5, 6]
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token, loaded.unk_token, loaded.mask_token) == ("<pad>", "<unk>", "[MASK]")


def test_published_vocabulary(shared_data):
    tokenizer = load_tokenizer(shared_data / "vocab" / "bert-base-uncased-vocab.txt")
    assert tokenizer.get_vocab_size() == 30522
    assert SpecialTokens.from_tokenizer(tokenizer) == (0, 100, 101, 102, 103)
    ids = [101, 7592, 1010, 14477, 20961, 3468, 2088, 999, 102]
    assert tokenizer.encode("Hello, unaffable world!").ids == ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".", None, r"no tokenizer\.json, no vocab\.txt"),
        ("missing.json", None, r"missing\.json: no tokenizer\.json"),
        ("bad.json", b'{"model": 1}', r"bad\.json: not a tokenizer file"),
        ("latin.txt", b"caf\xe9\n", r"latin\.txt: expected UTF-8"),
        ("few.txt", b"a\n[PAD]\n[UNK]\n[CLS]\n", r"few\.txt: .* lacks \[SEP\], \[MASK\]"),
        ("two.txt", b"b\na\nc\na\n", r"two\.txt, line 4: the token 'a' stands there again"),
        (
            "spiece.model",
            b"\x0a\x0e",
            r"spiece\.model: expected a tokenizer\.json, found a model of",
        ),
    ],
)
def test_complaints(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_folder_serves_both_libraries(tmp_path, tokenizer):
    folder = tmp_path / "new" / "folder"
    save_tokenizer(tokenizer, folder, max_length=512)
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(tokenizer)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokens = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    assert tokens.items() <= config.items()
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.mask_token_id, loaded.model_max_length) == (8, 512)
    encoded = loaded("the cats", "the cat")
    assert encoded["input_ids"] == tokenizer.encode("the cats", "the cat").ids
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_fingerprint_follows_behaviour(tokenizer):
    copy = Tokenizer.from_str(tokenizer.to_str(pretty=True))
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    copy.add_tokens(["newword"])
    assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(tokenizer)
