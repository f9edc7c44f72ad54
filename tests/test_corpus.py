"""The tokenised cache: what is in it, when it is reused, and how it fails."""

import json
import logging
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ponet.sentences import split_sentences
from pretrain import corpus as corpus_module
from pretrain.corpus import Corpus, DamagedCacheError, build_corpus, load_corpus
from pretrain.sources import SourceReport
from pretrain.vocabulary import train_tokenizer

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
def build(tmp_path: Path, tokenizer: Tokenizer):
    """Build with the same settings each time."""

    def build(documents=DOCUMENTS, **options) -> Corpus:
        given_options = {"cache_dir": tmp_path / "cache", "key_parts": {"text": "k"}, **options}
        return build_corpus(documents, tokenizer, progress=False, **given_options)

    return build


def sentences_of(corpus: Corpus, tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids by document and sentence."""
    sentences = np.split(np.asarray(corpus.tokens), corpus.sentence_offsets[1:-1])
    bounds = zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True)
    return [[part.tolist() for part in sentences[first:last]] for first, last in bounds]


def files_of(folder: Path) -> dict[str, bytes]:
    """Bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unreadable():
    """Documents that must not be asked for."""
    raise AssertionError("the cache was not used")
    yield ""


class TestContent:
    def test_tokens_are_those_of_the_sentences(self, build, tokenizer: Tokenizer) -> None:
        corpus = build()
        expected = [
            [tokenizer.encode(text, add_special_tokens=False).ids for text in document]
            for document in SENTENCES
        ]
        assert sentences_of(corpus, tokenizer) == expected
        first = tokenizer.decode(corpus.tokens[: corpus.sentence_offsets[1]].tolist())
        assert first == "mr. smith sat down."
        assert corpus.document_offsets.tolist() == [0, 3, 4, 7, 9]

    def test_types_and_counts(self, build) -> None:
        report = SourceReport(documents=5, skipped_empty=2)
        corpus = build(report=report)
        assert corpus.tokens.dtype == np.uint16
        assert corpus.sentence_offsets.dtype == corpus.document_offsets.dtype == np.int64
        assert not corpus.tokens.flags.writeable
        assert (corpus.num_documents, corpus.num_sentences) == (4, 9)
        assert corpus.metadata["counts"] == {
            "documents": 4,
            "sentences": 9,
            "tokens": corpus.num_tokens,
            "skipped_documents": 1,
        }
        assert corpus.metadata["sources"]["skipped_empty"] == 2

    def test_token_counts_and_frequencies(self, build, tokenizer: Tokenizer, monkeypatch) -> None:
        monkeypatch.setattr("pretrain.corpus._COUNTED_TOKENS", 7)
        corpus = build()
        ids = [list(chain.from_iterable(document)) for document in sentences_of(corpus, tokenizer)]
        assert corpus.token_counts(np.array([3, 1])).tolist() == [len(ids[3]), len(ids[1])]
        everything = list(chain.from_iterable(ids))
        expected = [everything.count(token) for token in range(tokenizer.get_vocab_size())]
        assert corpus.token_frequencies().tolist() == expected

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.lists(st.text("ab .!\u200b", max_size=12), max_size=4).map("\n".join), max_size=8
        )
    )
    def test_any_shape(self, tmp_path_factory, tokenizer: Tokenizer, documents: list[str]) -> None:
        expected = []
        for document in [*documents, "end"]:
            ids = [
                tokenizer.encode(text, add_special_tokens=False).ids
                for text in split_sentences(document)
            ]
            expected.append([sentence for sentence in ids if sentence])
        corpus = build_corpus(
            [*documents, "end"],
            tokenizer,
            cache_dir=tmp_path_factory.mktemp("cache"),
            key_parts={},
            progress=False,
        )
        kept = [document for document in expected if document]
        assert sentences_of(corpus, tokenizer) == kept
        assert corpus.metadata["counts"]["skipped_documents"] == len(expected) - len(kept)

    def test_text_that_spells_special_tokens_stays_text(self, build, tokenizer: Tokenizer) -> None:
        tokens = build(["The [MASK] and [SEP] are words."]).tokens
        assert tokens.min() > 4

    def test_workers_give_the_same_bytes(self, build, tmp_path: Path, monkeypatch) -> None:
        documents = [f"Document {i} begins. It ends.\nParagraph {i}." for i in range(300)]
        monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 1000)
        alone = build(documents, cache_dir=tmp_path / "a")
        monkeypatch.setattr(corpus_module, "_BATCHES_WITHOUT_WORKERS", 2)
        helped = build(documents, cache_dir=tmp_path / "b", num_workers=2)
        assert alone.folder.name == helped.folder.name
        assert files_of(alone.folder) == files_of(helped.folder)

    def test_sentences_do_not_cross_paragraphs(self) -> None:
        assert split_sentences("No end here\nand none there\n\n  ") == [
            "No end here",
            "and none there",
        ]


class TestCache:
    def test_is_used_again(self, build) -> None:
        first = build()
        again = build(unreadable())
        assert again.folder == first.folder
        assert np.array_equal(again.tokens, first.tokens)

    def test_depends_on_key_and_tokenizer(self, build, tmp_path: Path) -> None:
        other = train_tokenizer(["Other words."], 200)
        folders = [
            build().folder,
            build(key_parts={"text": "l"}).folder,
            build_corpus(
                DOCUMENTS,
                other,
                cache_dir=tmp_path / "cache",
                key_parts={"text": "k"},
                progress=False,
            ).folder,
        ]
        assert len(set(folders)) == 3

    def test_depends_on_the_splitter(self, build, monkeypatch: pytest.MonkeyPatch) -> None:
        before = build().folder
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
        assert build().folder != before

    @pytest.mark.parametrize("name", ["tokens.bin", "sentences.bin", "documents.bin"])
    @pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
    def test_damage_is_seen_and_repaired(self, build, caplog, name: str, damage: str) -> None:
        corpus = build()
        before = files_of(corpus.folder)
        file = corpus.folder / name
        data = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(data[:-2])
            expected = f"has {len(data) - 2} bytes, expected {len(data)} bytes"
        elif damage == "changed":
            data[0] ^= 1
            file.write_bytes(data)
            expected = "checksum"
        else:
            file.unlink()
            expected = "is missing"
        with pytest.raises(DamagedCacheError, match=expected) as caught:
            load_corpus(corpus.folder)
        assert str(file) in str(caught.value)
        with caplog.at_level(logging.WARNING):
            rebuilt = build()
        assert "building it again" in caplog.text
        assert files_of(rebuilt.folder) == before

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}'])
    def test_damaged_manifest(self, build, text: str) -> None:
        folder = build().folder
        (folder / "corpus.json").write_text(text, "utf-8")
        with pytest.raises(DamagedCacheError, match="not a readable manifest"):
            load_corpus(folder)
        assert build().num_documents == 4

    def test_other_format(self, build) -> None:
        folder = build().folder
        manifest = json.loads((folder / "corpus.json").read_text("utf-8"))
        manifest["format_version"] = 99
        (folder / "corpus.json").write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(DamagedCacheError, match="format 99"):
            load_corpus(folder)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedCacheError, match="nowhere"):
            load_corpus(tmp_path / "nowhere")

    def test_failure_leaves_nothing(self, build, tmp_path: Path) -> None:
        def broken():
            yield from DOCUMENTS
            raise ValueError("bad record")

        with pytest.raises(ValueError, match="bad record"):
            build(broken())
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])

    def test_leftovers_of_a_killed_build_go(self, build, tmp_path: Path) -> None:
        folder = build().folder
        shutil.rmtree(folder)
        leftover = folder.parent / f".{folder.name}-killed"
        leftover.mkdir()
        (leftover / "tokens.bin").write_bytes(b"half")
        build()
        assert not leftover.exists()

    def test_full_disk_names_the_place(self, build, tmp_path: Path, monkeypatch) -> None:
        def fail(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="cannot write the corpus: No space left") as caught:
            build()
        assert caught.value.errno == 28
        assert str(tmp_path) in str(caught.value.filename)
        assert not list((tmp_path / "cache").glob("*corpus-*[!k]"))

    def test_no_sentence_at_all(self, build) -> None:
        with pytest.raises(ValueError, match=r"no document holds a sentence \(1 documents"):
            build(["\u200b"])

    def test_two_processes_at_once(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
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
        assert count == "20000"
        assert load_corpus(folder).num_documents == 20000


class TestSplit:
    def corpus(self, num_documents: int) -> Corpus:
        """A corpus of one-token documents."""
        offsets = np.arange(num_documents + 1)
        return Corpus(
            tokens=np.zeros(num_documents, dtype=np.uint16),
            sentence_offsets=offsets,
            document_offsets=offsets,
            folder=Path(),
            metadata={},
        )

    @given(st.integers(4, 500), st.floats(0.001, 0.999))
    def test_parts_are_whole_disjoint_and_never_empty(self, size: int, fraction: float) -> None:
        train, validation = self.corpus(size).split(fraction)
        assert train.dtype == validation.dtype == np.int64
        assert sorted([*train, *validation]) == list(range(size))
        assert len(validation) == min(max(round(fraction * size), 1), size - 1)

    def test_is_a_scattered_draw_that_never_changes(self) -> None:
        train, validation = self.corpus(1000).split(0.1)
        again = self.corpus(1000).split(0.1)
        assert np.array_equal(train, again[0])
        assert np.array_equal(validation, again[1])
        # ten a hundred on average; the golden list pins the draw across versions
        by_hundred = np.bincount(validation // 100, minlength=10)
        assert by_hundred.min() >= 3
        assert by_hundred.max() <= 18
        assert self.corpus(20).split(0.25)[1].tolist() == GOLDEN_SPLIT

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
    def test_bad_fraction(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="validation_fraction"):
            self.corpus(10).split(fraction)

    def test_too_few_documents(self) -> None:
        with pytest.raises(ValueError, match="3 documents"):
            self.corpus(3).split(0.5)


def splitmix64(seed: int) -> int:
    """The published generator's first output, in plain integers."""
    mask = 2**64 - 1
    mixed = (seed + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


# splitmix64 is a stream: its i-th output is that of the state i steps on
GOLDEN_SPLIT = sorted(
    sorted(range(20), key=lambda i: splitmix64(i * 0x9E3779B97F4A7C15 % 2**64))[:5]
)


def test_splitmix64_is_the_published_one() -> None:
    # first outputs of the reference implementation for seed 1234567
    outputs = [splitmix64((1234567 + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(2)]
    assert outputs == [6457827717110365317, 3203168211198807973]
