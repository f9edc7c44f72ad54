"""The tokenised cache: what is in it, when it is reused, and how it fails."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ponet.tokenizer import split_sentences
from pretrain import tokenise
from pretrain.corpus import Corpus, DamagedCorpusError, build_corpus, load_corpus
from pretrain.sources import SourceReport
from pretrain.tokenise import train_tokenizer

DOCUMENTS = ["Mr. Smith sat down. He was tired.\nA new paragraph has no end", "\u200b", "Two."]
SENTENCES = ["Mr. Smith sat down.", "He was tired.", "A new paragraph has no end", "Two."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(documents=DOCUMENTS, using=tokenizer, **options) -> Corpus:
        defaults = {"cache_dir": tmp_path / "cache", "key_parts": {"text": "k"}}
        return build_corpus(documents, using, **(defaults | options))

    return build


def encoded(tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in sentences]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_content(build, tokenizer):
    corpus = build(report=SourceReport(documents=5, skipped_empty=2))
    sentences = encoded(tokenizer, SENTENCES)
    tokens = [token for sentence in sentences for token in sentence]
    assert corpus.tokens.tolist() == tokens
    assert corpus.document_offsets.tolist() == [0, 3, 4]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.sentence_offsets.dtype == corpus.document_offsets.dtype == np.int64
    assert (type(corpus.tokens), corpus.tokens.flags.writeable) == (np.ndarray, False)
    counts = {"documents": 2, "sentences": 4, "tokens": len(tokens), "skipped_documents": 1}
    assert corpus.metadata["counts"] == counts
    assert corpus.metadata["sources"]["skipped_empty"] == 2
    expected = [tokens.count(token) for token in range(tokenizer.get_vocab_size())]
    assert corpus.token_frequencies().tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.text("ab .!\u200b", max_size=12), max_size=4).map("\n".join), max_size=8)
)
def test_any_shape(tmp_path_factory, tokenizer, documents):
    documents = [*documents, "end"]
    folder = tmp_path_factory.mktemp("cache")
    corpus = build_corpus(documents, tokenizer, cache_dir=folder, key_parts={})
    sentences = np.split(corpus.tokens, corpus.sentence_offsets[1:-1])
    bounds = zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True)
    found = [[part.tolist() for part in sentences[first:last]] for first, last in bounds]
    by_document = [encoded(tokenizer, split_sentences(document)) for document in documents]
    expected = [list(filter(None, sentences)) for sentences in by_document]
    assert found == list(filter(None, expected))
    assert corpus.metadata["counts"]["skipped_documents"] == expected.count([])


def test_workers_give_the_same_bytes(build, tmp_path, monkeypatch):
    documents = [f"Document {i} begins. It ends.\nParagraph {i}." for i in range(300)]
    monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 1000)
    alone = build(documents, cache_dir=tmp_path / "a")
    monkeypatch.setattr(tokenise, "_BATCHES_WITHOUT_WORKERS", 2)
    helped = build(documents, cache_dir=tmp_path / "b", num_workers=2)
    assert alone.folder.name == helped.folder.name
    assert files_of(alone.folder) == files_of(helped.folder)


def test_is_used_again_for_the_same_text_tokenizer_and_splitter(build, monkeypatch):
    first, again = build(), build(iter([]))
    assert again.folder == first.folder
    other = train_tokenizer(["Other words."], 200)
    folders = {first.folder, build(key_parts={"text": "l"}).folder, build(using=other).folder}
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert len(folders | {build().folder}) == 4


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokens.bin", lambda data: data[:-2], "has .* bytes, expected"),
        ("sentences.bin", lambda data: b"", "has 0 bytes, expected"),
        ("documents.bin", lambda data: bytes([data[0] ^ 1]) + data[1:], "the checksum differs"),
        ("corpus.json", lambda data: b'{"format_version": 1}', "not a readable manifest"),
        ("corpus.json", lambda data: b'{"format_version": 99}', "format 99, expected 1"),
    ],
)
def test_damage_is_seen_and_repaired(build, caplog, name, damage, message):
    folder = build().folder
    before = files_of(folder)
    (folder / name).write_bytes(damage(before[name]))
    with pytest.raises(DamagedCorpusError, match=f"{folder / name}.* {message}"):
        load_corpus(folder)
    assert files_of(build().folder) == before
    assert "building it again" in caplog.text
    # a file that is gone is one without bytes
    (folder / name).unlink()
    assert files_of(build().folder) == before


def test_failures_and_killed_builds_leave_nothing(build):
    def broken():
        yield from DOCUMENTS
        raise ValueError("bad record")

    folder = build().folder
    folder.rename(folder.with_name(f".{folder.name}-unfinished"))
    with pytest.raises(ValueError, match="bad record"):
        build(broken())
    with pytest.raises(ValueError, match=r"no document holds a sentence \(1 documents"):
        build(["\u200b"])
    assert {path.suffix for path in folder.parent.iterdir()} <= {".lock"}


def test_two_processes_at_once(tmp_path, tokenizer):
    documents = [f"Document {i} begins. It ends." for i in range(20000)]
    options = {"cache_dir": tmp_path, "key_parts": {}}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        made = [pool.submit(build_corpus, documents, tokenizer, **options) for _ in range(2)]
    one, other = (future.result() for future in made)
    assert one.folder == other.folder
    assert load_corpus(one.folder).num_documents == other.num_documents == 20000
