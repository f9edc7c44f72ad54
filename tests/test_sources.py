"""Every kind of source, every complaint about one, and the key of its content."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import sources
from pretrain.prepare import vocabulary_text
from pretrain.settings import PretrainConfig
from pretrain.sources import DataError, SourceReport, content_key, in_turn, iter_documents

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def read(*specs: Path | str, **options) -> list[str]:
    """All documents of some sources."""
    return list(iter_documents([str(spec) for spec in specs], **options))


def complaint(*specs: Path | str, **options) -> str:
    """The message about some sources."""
    with pytest.raises(DataError) as caught:
        read(*specs, **options)
    return str(caught.value)


def jsonl(path: Path, *records: object) -> Path:
    """A file with one JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def parquet(path: Path, **columns: list) -> Path:
    """A table of columns."""
    pq.write_table(pa.table(columns), path)
    return path


class TestLocalFiles:
    def test_small_text_file_is_one_document(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_bytes(b"\xef\xbb\xbfTitle\r\nFirst paragraph.\r\n\r\n  Second one.  \r\n")
        assert read(file) == ["Title\nFirst paragraph.\nSecond one."]

    def test_wrapped_lines_are_joined(self, tmp_path: Path) -> None:
        file = tmp_path / "a.md"
        line = "These are fifty characters or more, and they go on"
        file.write_text(f"Short heading\n{line}\nover the line. \n{line}.\nNew.\n", "utf-8")
        assert read(file) == [f"Short heading\n{line} over the line.\n{line}.\nNew."]

    def test_large_text_file_is_parted_at_blank_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        bodies = [f"Document {i} begins.\n" + f"It has text {i}.\n" * 30_000 for i in range(3)]
        file.write_text("\n\n \n".join(bodies), "utf-8")
        assert file.stat().st_size > 2**20
        assert read(file) == [body.strip() for body in bodies]

    def test_wikitext_lines_become_articles(self, tmp_path: Path) -> None:
        file = tmp_path / "wiki.txt"
        text = " \n = One = \n \n First . \n \n = = Part = = \n \n Second . \n = 0 = \n"
        file.write_text(text + " \n = Two = \n \n Third . \n", "utf-8")
        assert read(file) == ["First .\nSecond .\n= 0 =", "Third ."]

    def test_wikitext_rows_of_a_table_become_articles(self, tmp_path: Path) -> None:
        rows = ["", " = One = \n", "", " First . \n", "", " = = = Part = = = \n", "", " More . \n"]
        rows += ["", " = Two = \n", "", " Third . \n"]
        assert read(parquet(tmp_path / "w.parquet", text=rows)) == ["First .\nMore .", "Third ."]

    def test_equations_do_not_make_a_file_wikitext(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("We set x = 1.\n\n = 2 = \n\nAnd that is all.\n", "utf-8")
        assert read(file) == ["We set x = 1.\n= 2 =\nAnd that is all."]

    def test_jsonl_counts_what_it_skips(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        texts = ["One.\n\nTwo.", "", "  \n", None, "Three.", " One. \nTwo."]
        jsonl(file, *({"text": text, "id": 1} for text in texts))
        report = SourceReport()
        assert read(file, report=report) == ["One.\nTwo.", "Three."]
        assert report == SourceReport(
            documents=2, characters=15, skipped_empty=3, skipped_duplicates=1
        )

    def test_half_a_surrogate_pair_does_no_harm(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "A \\ud83d b \\ud83d\\ude00."}\n', "utf-8")
        assert read(file) == ["A \ufffd b \U0001f600."]

    def test_other_field(self, tmp_path: Path) -> None:
        file = jsonl(tmp_path / "a.json", {"body": "One.", "text": "Other."})
        table = parquet(tmp_path / "a.parquet", body=["Two.", None])
        assert read(file, table, text_field="body") == ["One.", "Two."]

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
    @pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
    def test_compressed(self, tmp_path: Path, kind: str, suffix: str, pack) -> None:
        plain = tmp_path / f"a{kind}"
        if kind == ".txt":
            plain.write_text("One.", "utf-8")
        elif kind == ".jsonl":
            jsonl(plain, {"text": "One."})
        else:
            parquet(plain, text=["One."])
        packed = tmp_path / f"b{kind}{suffix}"
        packed.write_bytes(pack(plain.read_bytes()))
        assert read(packed) == ["One."]

    def test_folder_is_read_in_the_order_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / ".git").mkdir()
        for name in ("c.txt", "b/z.txt", "b/a.txt", "a.txt", ".git/d.txt"):
            (tmp_path / name).write_text(f"Text of {name}.", "utf-8")
        (tmp_path / "image.png").write_bytes(b"\0")
        (tmp_path / "none.txt").touch()
        report = SourceReport()
        expected = [f"Text of {name}." for name in ("a.txt", "b/a.txt", "b/z.txt", "c.txt")]
        assert read(tmp_path, report=report) == expected
        assert (report.skipped_files, report.skipped_empty) == (1, 1)

    def test_sources_mix_and_share_duplicates(self, tmp_path: Path) -> None:
        one = jsonl(tmp_path / "1.jsonl", {"text": "A."}, {"text": "B."})
        two = jsonl(tmp_path / "2.jsonl", {"text": "B."}, {"text": "C."})
        assert read(two, one) == ["B.", "C.", "A."]
        assert read(one, one) == ["A.", "B."]

    @pytest.mark.parametrize(("limit", "expected"), [(1, 1), (10, 1), (11, 2), (20, 2), (99, 3)])
    def test_limit_ends_after_a_whole_document(
        self, tmp_path: Path, limit: int, expected: int
    ) -> None:
        file = jsonl(tmp_path / "a.jsonl", *({"text": f"Ten char {i}"} for i in range(3)))
        assert len(read(file, max_characters=limit)) == expected

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)))
    def test_same_documents_from_json_and_parquet(self, tmp_path_factory, texts: list[str]) -> None:
        folder = tmp_path_factory.mktemp("texts")
        texts = [*texts, "sentinel"]
        if texts[0].strip().startswith("="):
            texts.insert(0, "no title")
        expected = []
        for text in texts:
            document = "\n".join(line.strip() for line in text.split("\n") if line.strip())
            if document and document not in expected:
                expected.append(document)
        assert read(jsonl(folder / "a.jsonl", *({"text": text} for text in texts))) == expected
        assert read(parquet(folder / "a.parquet", text=texts)) == expected


class TestComplaints:
    def test_no_source(self) -> None:
        assert "no source" in complaint()

    def test_a_string_instead_of_a_list(self) -> None:
        with pytest.raises(DataError, match="list"):
            iter_documents("builtin")

    def test_bad_limit(self, tmp_path: Path) -> None:
        assert "max_characters" in complaint(tmp_path, max_characters=0)

    @pytest.mark.parametrize(
        "name", ["wikitxt", "./missing", "/missing/a.txt", "data/missing.jsonl", "a/b/c"]
    )
    def test_unknown_name(self, name: str) -> None:
        message = complaint(name)
        assert name in message
        assert "builtin" in message

    @pytest.mark.parametrize("name", ["bookcorpus", "bookcorpus/bookcorpus"])
    def test_script_data_set(self, name: str) -> None:
        message = complaint(name)
        assert "loading script" in message
        assert "--data PATH" in message

    def test_names_are_checked_before_anything_is_read(self, tmp_path: Path) -> None:
        file = jsonl(tmp_path / "a.jsonl", {"text": "A."})
        with pytest.raises(DataError, match="wikitxt"):
            iter_documents([str(file), "wikitxt"])

    def test_empty_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.touch()
        assert complaint(file) == f"{file}: the file is empty"

    def test_only_empty_records(self, tmp_path: Path) -> None:
        assert "no text" in complaint(jsonl(tmp_path / "a.jsonl", {"text": " "}))

    def test_other_file_type(self, tmp_path: Path) -> None:
        file = tmp_path / "a.csv"
        file.write_text("text\nOne.\n", "utf-8")
        message = complaint(file)
        assert "a.csv" in message
        assert ".jsonl" in message

    def test_folder_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"\0")
        assert "no file of type .txt" in complaint(tmp_path)

    def test_binary_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_bytes(b"Text.\n\x7fELF\0\0")
        message = complaint(file)
        assert f"{file}, line 2" in message
        assert "NUL" in message

    def test_invalid_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_bytes("\u00c9\u00e9n.\n".encode() + b"caf\xe9.\n")
        message = complaint(file)
        # seven bytes of the first line, then the fourth of the second, counted from 0
        assert f"{file}, line 2, byte 10" in message
        assert "0xe9" in message

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ('{"body": "One.", "id": 1}', "no field 'text'; found body, id"),
            ("{}", "no field 'text'; found no field"),
            ('{"text": 3}', "expected text in field 'text', found int"),
            ('{"text": ["One."]}', "expected text in field 'text', found list"),
            ("[1]", "expected one JSON object a line, found a list"),
            ('{"text": "One.', "expected one JSON object a line ("),
        ],
    )
    def test_bad_record(self, tmp_path: Path, line: str, expected: str) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text(f'{{"text": "Fine."}}\n\n{line}\n', "utf-8")
        message = complaint(file)
        assert f"{file}, line 3: {expected}" in message

    def test_parquet_without_the_column(self, tmp_path: Path) -> None:
        file = parquet(tmp_path / "a.parquet", body=["One."], id=[1])
        assert complaint(file) == f"{file}: no column 'text'; found body, id"

    def test_parquet_with_numbers(self, tmp_path: Path) -> None:
        file = parquet(tmp_path / "a.parquet", text=[1])
        assert complaint(file) == f"{file}: expected text in column 'text', found int64"

    def test_damaged_parquet(self, tmp_path: Path) -> None:
        file = tmp_path / "a.parquet"
        file.write_bytes(b"PAR1 nothing")
        assert f"{file}: not a readable parquet file" in complaint(file)

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
    def test_cut_off_compressed_file(self, tmp_path: Path, suffix: str, pack) -> None:
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(pack(os.urandom(5000).hex().encode())[:-20])
        assert "compressed file is damaged" in complaint(file)

    @pytest.mark.parametrize("suffix", [".gz", ".xz"])
    def test_not_compressed_at_all(self, tmp_path: Path, suffix: str) -> None:
        file = tmp_path / f"a.txt{suffix}"
        file.write_text("One.", "utf-8")
        assert "compressed file is damaged" in complaint(file)


class FakeDataset:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, column: str, rows: list, fingerprint: str = "f1") -> None:
        self.column_names = [column, "id"]
        self._rows = [{column: row} for row in rows]
        self._fingerprint = fingerprint

    def select_columns(self, columns: list[str]) -> list[dict]:
        assert columns == self.column_names[:1]
        return self._rows


class TestHub:
    @pytest.fixture(autouse=True)
    def _forget_loaded(self):
        sources._load_hub.cache_clear()
        yield
        sources._load_hub.cache_clear()

    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch):
        """Stand in for the hub; returns the calls and a place to put the answer."""
        calls: list[tuple] = []
        answer: list = [FakeDataset("text", ["One.", None, "Two."])]

        def load_dataset(*args, **kwargs):
            calls.append((*args, kwargs["split"]))
            if isinstance(answer[0], Exception):
                raise answer[0]
            return answer[0]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls, answer

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
            ("wikipedia", ("wikimedia/wikipedia", "20231101.en", "train")),
            ("org/name", ("org/name", None, "train")),
            ("org/name:part.1", ("org/name", "part.1", "train")),
        ],
    )
    def test_names(self, loaded, name: str, expected: tuple) -> None:
        calls, _ = loaded
        assert read(name) == ["One.", "Two."]
        assert calls == [expected]

    def test_local_path_wins(self, loaded, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name").mkdir(parents=True)
        jsonl(tmp_path / "org" / "name" / "a.jsonl", {"text": "Local."})
        assert read("org/name") == ["Local."]
        assert loaded[0] == []

    def test_key_is_the_fingerprint(self, loaded) -> None:
        _, answer = loaded
        keys = []
        for fingerprint in ("f1", "f1", "f2"):
            sources._load_hub.cache_clear()
            answer[0] = FakeDataset("text", ["One."], fingerprint)
            keys.append(content_key(["org/name"]))
        assert keys[0] == keys[1] != keys[2]

    def test_missing_column(self, loaded) -> None:
        loaded[1][0] = FakeDataset("body", ["One."])
        assert complaint("org/name") == "org/name: no column 'text'; found body, id"

    def test_row_that_is_no_text(self, loaded) -> None:
        loaded[1][0] = FakeDataset("text", ["One.", 2])
        assert "org/name, row 1: expected text in 'text', found int" in complaint("org/name")

    @pytest.mark.parametrize("error", [ConnectionError("no"), FileNotFoundError("gone")])
    def test_what_to_do_without_the_hub(self, loaded, error: Exception) -> None:
        loaded[1][0] = error
        message = complaint("wikitext")
        assert "wikitext" in message
        assert "--data PATH" in message

    def test_offline_for_real(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        message = complaint("some-org/some-name-that-nobody-has")
        assert message.startswith("some-org/some-name-that-nobody-has: ")
        assert "--data PATH" in message


class TestContentKey:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return jsonl(tmp_path / "a.jsonl", {"text": "One."})

    def test_time_and_place_do_not_matter(self, file: Path, tmp_path: Path) -> None:
        key = content_key([str(file)])
        os.utime(file, (1, 1))
        assert content_key([str(file)]) == key
        copy = tmp_path / "other.jsonl"
        copy.write_bytes(file.read_bytes())
        assert content_key([str(copy)]) == key

    def test_content_and_settings_matter(self, file: Path, tmp_path: Path) -> None:
        spec = [str(file)]
        as_text = tmp_path / "a.txt"
        as_text.write_bytes(file.read_bytes())
        keys = [
            content_key(spec),
            content_key(spec * 2),
            content_key(spec, "body"),
            content_key(spec, max_characters=5),
            content_key([str(as_text)]),
        ]
        # same size, same time, other bytes
        times = (file.stat().st_atime, file.stat().st_mtime)
        jsonl(file, {"text": "Two."})
        os.utime(file, times)
        keys.append(content_key(spec))
        assert len(set(keys)) == len(keys)

    def test_unknown_source(self) -> None:
        with pytest.raises(DataError):
            content_key(["wikitxt"])

    def test_builtin(self, monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path) -> None:
        module = tmp_path / "module.py"
        module.write_text('"""Documentation."""\n', "utf-8")
        monkeypatch.setattr(sources, "builtin_files", lambda: [module])
        key = content_key(["builtin"])
        os.utime(module, (1, 1))
        assert content_key(["builtin"]) == key
        module.write_text('"""documentation."""\n', "utf-8")
        assert content_key(["builtin"]) != key


class TestBuiltin:
    def test_a_paragraph_comes_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        same = "This sentence stands in both of the files and is read only once. " * 4
        first = "The first of the files has this sentence on its own subject. " * 4
        other = "The other of the files has that sentence on another subject. " * 8
        for name, own in (("a.py", first), ("b.py", other)):
            text = f'"""{same}\n\n{own}\n\n{same}\n"""\n'
            (tmp_path / name).write_text(text, "utf-8")
        files = [tmp_path / "a.py", tmp_path / "b.py"]
        monkeypatch.setattr(sources, "builtin_files", lambda: files)
        assert read("builtin") == [f"{same.strip()}\n{first.strip()}", other.strip()]

    def test_is_large_enough_and_deterministic(self) -> None:
        documents = read("builtin", max_characters=200_000)
        assert documents == read("builtin", max_characters=200_000)
        assert len(documents) > 50
        assert all(len(document) >= 400 for document in documents)


def test_sources_take_turns() -> None:
    drawn = in_turn([iter("abc"), iter(""), iter("d"), iter("ef")])
    assert "".join(drawn) == "adebfc"
    assert list(in_turn([])) == []


def test_vocabulary_is_learned_from_all_sources(tmp_path: Path) -> None:
    """It sees the first documents alone; a corpus is read source after source."""
    names = []
    for name in ("first", "second"):
        names.append(str(tmp_path / f"{name}.jsonl"))
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(2)]
        Path(names[-1]).write_text("\n".join(lines))
    turns = ["first 0", "second 0", "first 1", "second 1"]
    assert list(vocabulary_text(PretrainConfig(data=tuple(names)))) == turns
    # where reading stops early, the vocabulary sees nothing beyond it
    few = PretrainConfig(data=tuple(names), max_characters=10)
    assert list(vocabulary_text(few)) == ["first 0", "first 1"]


def test_real_data() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    wiki = read(SHARED_DATA / "wikitext-2" / "valid.txt")
    assert len(wiki) == 60
    assert wiki[0].startswith("Homarus gammarus , known as the European lobster")
    report = SourceReport()
    news = read(SHARED_DATA / "wikinews" / "articles.jsonl.xz", max_characters=10**6, report=report)
    assert sum(map(len, news)) == report.characters >= 10**6
