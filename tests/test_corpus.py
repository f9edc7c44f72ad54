"""The tokenised cache: what is in it, when it is reused, and how it fails."""

import json
import logging
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "Mr. Smith sat down. He was tired.\nA new paragraph has no end",
    "\u200b\n\u200b",
    "One sentence only.",
    "The third begins! Does it end? \u200b\nIt does.",
    "The fourth has two sentences. This is the second.",
]
SENTENCES = [
    ["Mr. Smith sat down.", "He was tired.", "A new paragraph has no end"],
    ["One sentence only."],
    ["The third begins!", "Does it end?", "It does."],
    ["The fourth has two sentences.", "This is the second."],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def build(tmp_path, tokenizer):
    """Build with the same settings each time."""

    def build(documents=DOCUMENTS, using=tokenizer, **options) -> Corpus:
        defaults = {"cache_dir": tmp_path / "cache", "key_parts": {"text": "k"}}
        return build_corpus(documents, using, **(defaults | options))

    return build


def ids_of(corpus: Corpus) -> list[list[list[int]]]:
    """Token ids by document and sentence."""
    sentences = np.split(np.asarray(corpus.tokens), corpus.sentence_offsets[1:-1])
    bounds = zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True)
    return [[part.tolist() for part in sentences[first:last]] for first, last in bounds]


def encoded(tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in sentences]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_content(build, tokenizer, monkeypatch):
    corpus = build(report=SourceReport(documents=5, skipped_empty=2))
    assert ids_of(corpus) == [encoded(tokenizer, document) for document in SENTENCES]
    assert corpus.document_offsets.tolist() == [0, 3, 4, 7, 9]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.sentence_offsets.dtype == corpus.document_offsets.dtype == np.int64
    assert not corpus.tokens.flags.writeable
    tokens = corpus.tokens.tolist()
    counts = {"documents": 4, "sentences": 9, "tokens": len(tokens)}
    assert corpus.metadata["counts"] == counts | {"skipped_documents": 1}
    assert corpus.metadata["sources"]["skipped_empty"] == 2
    monkeypatch.setattr("pretrain.corpus._COUNTED_TOKENS", 7)
    expected = [tokens.count(token) for token in range(tokenizer.get_vocab_size())]
    assert corpus.token_frequencies().tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.text("ab .!\u200b", max_size=12), max_size=4).map("\n".join), max_size=8)
)
def test_any_shape(tmp_path_factory, tokenizer, documents):
    documents = [*documents, "end"]
    corpus = build_corpus(
        documents, tokenizer, cache_dir=tmp_path_factory.mktemp("cache"), key_parts={}
    )
    by_document = [encoded(tokenizer, split_sentences(document)) for document in documents]
    expected = [[ids for ids in sentences if ids] for sentences in by_document]
    assert ids_of(corpus) == [sentences for sentences in expected if sentences]
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
    def unreadable():
        raise AssertionError("the cache was not used")
        yield ""

    first, again = build(), build(unreadable())
    assert again.folder == first.folder
    assert np.array_equal(again.tokens, first.tokens)
    other = train_tokenizer(["Other words."], 200)
    folders = {first.folder, build(key_parts={"text": "l"}).folder, build(using=other).folder}
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert len(folders | {build().folder}) == 4


@pytest.mark.parametrize("name", ["tokens.bin", "sentences.bin", "documents.bin"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damage_is_seen_and_repaired(build, caplog, name, damage):
    corpus = build()
    before = files_of(corpus.folder)
    file, data = corpus.folder / name, before[name]
    if damage == "cut":
        file.write_bytes(data[:-2])
        expected = f"has {len(data) - 2} bytes, expected {len(data)} bytes"
    elif damage == "changed":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        expected = "the checksum differs"
        assert load_corpus(corpus.folder, verify=False).num_documents == 4
    else:
        file.unlink()
        expected = "is missing"
    with pytest.raises(DamagedCorpusError, match=f"{file}.* {expected}"):
        load_corpus(corpus.folder)
    with caplog.at_level(logging.WARNING):
        rebuilt = build()
    assert "building it again" in caplog.text
    assert files_of(rebuilt.folder) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', None])
def test_damaged_manifest(build, text):
    folder = build().folder
    manifest, message = folder / "corpus.json", "not a readable manifest"
    if text is None:
        text = json.dumps(json.loads(manifest.read_text("utf-8")) | {"format_version": 99})
        message = "format 99"
    manifest.write_text(text, "utf-8")
    with pytest.raises(DamagedCorpusError, match=message):
        load_corpus(folder)
    assert build().num_documents == 4


def test_failure_leaves_nothing(build, tmp_path):
    def broken():
        yield from DOCUMENTS
        raise ValueError("bad record")

    with pytest.raises(ValueError, match="bad record"):
        build(broken())
    with pytest.raises(ValueError, match=r"no document holds a sentence \(1 documents"):
        build(["\u200b"])
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_leftovers_of_a_killed_build_go(build):
    folder = build().folder
    leftover = folder.rename(folder.parent / f".{folder.name}-killed")
    build()
    assert not leftover.exists()


def test_full_disk_names_the_place(build, tmp_path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="cannot write the corpus: No space left") as caught:
        build()
    assert caught.value.errno == 28
    assert str(tmp_path) in str(caught.value.filename)
    assert not list((tmp_path / "cache").glob("*corpus-*[!k]"))


def test_two_processes_at_once(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = (
        "import sys\n"
        "from pretrain.corpus import build_corpus\n"
        "from ponet.tokenizer import load_tokenizer\n"
        "documents = [f'Document {i} begins. It ends.' for i in range(20000)]\n"
        "corpus = build_corpus(documents, load_tokenizer(sys.argv[1]),\n"
        "    cache_dir=sys.argv[1] + '/cache', key_parts={})\n"
        "print(corpus.folder, corpus.num_documents)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    folder, count = outputs[0].split()
    assert int(count) == load_corpus(folder).num_documents == 20000
