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
from pretrain.corpus import vocabulary_text
from pretrain.settings import PretrainConfig
from pretrain.sources import SourceError, SourceReport, content_key, in_turn, iter_documents

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def read(*specs: Path | str, **options) -> list[str]:
    """All documents of some sources."""
    return list(iter_documents([str(spec) for spec in specs], **options))


def complaint(*specs: Path | str, **options) -> str:
    """The message about some sources."""
    with pytest.raises(SourceError) as caught:
        read(*specs, **options)
    return str(caught.value)


def jsonl(path: Path, *texts: object) -> Path:
    """A file with one record per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def parquet(path: Path, **columns: list) -> Path:
    """A table of columns."""
    pq.write_table(pa.table(columns), path)
    return path


WRAPPED = "These are fifty characters or more, and they go on"
BODIES = [f"Document {i} begins.\n" + f"It has text {i}.\n" * 30_000 for i in range(3)]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        # a small file is a document
        (
            "\ufeffTitle\r\nFirst paragraph.\r\n\r\n  Second one.  \r\n",
            ["Title\nFirst paragraph.\nSecond one."],
        ),
        # wrapped lines are joined
        (
            f"Short heading\n{WRAPPED}\nover the line. \n{WRAPPED}.\nNew.\n",
            [f"Short heading\n{WRAPPED} over the line.\n{WRAPPED}.\nNew."],
        ),
        # a large file is parted at blank lines
        ("\n\n \n".join(BODIES), [body.strip() for body in BODIES]),
        # WikiText is parted at its headings; equations are none
        (
            " \n = One = \n \n First . \n \n = = Part = = \n \n Second . \n = 0 = \n"
            " \n = Two = \n \n Third . \n",
            ["First .\nSecond .\n= 0 =", "Third ."],
        ),
        (
            "We set x = 1.\n\n = 2 = \n\nAnd that is all.\n",
            ["We set x = 1.\n= 2 =\nAnd that is all."],
        ),
    ],
    ids=["small", "wrapped", "large", "wikitext", "equations"],
)
def test_text_files(tmp_path, content, documents):
    file = tmp_path / "a.txt"
    file.write_text(content, "utf-8", newline="")
    assert read(file) == documents


def test_wikitext_rows_of_a_table_become_articles(tmp_path):
    rows = ["", " = One = \n", "", " First . \n", "", " = = = Part = = = \n", "", " More . \n"]
    rows += ["", " = Two = \n", "", " Third . \n"]
    assert read(parquet(tmp_path / "w.parquet", text=rows)) == ["First .\nMore .", "Third ."]


def test_jsonl_counts_what_it_skips_and_mends_half_a_surrogate_pair(tmp_path):
    texts = ["One.\n\nTwo.", "", "  \n", None, "Three.", " One. \nTwo."]
    report = SourceReport()
    assert read(jsonl(tmp_path / "a.jsonl", *texts), report=report) == ["One.\nTwo.", "Three."]
    assert report == SourceReport(documents=2, characters=15, skipped_empty=3, skipped_duplicates=1)
    halved = jsonl(tmp_path / "b.jsonl", "A \ud83d b \ud83d\ude00.")
    assert read(halved) == ["A \ufffd b \U0001f600."]


def test_other_field(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"body": "One.", "text": "Other."}\n')
    table = parquet(tmp_path / "a.parquet", body=["Two.", None])
    assert read(file, table, text_field="body") == ["One.", "Two."]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_compressed(tmp_path, kind, suffix, pack):
    plain = tmp_path / f"a{kind}"
    if kind == ".parquet":
        parquet(plain, text=["One."])
    else:
        plain.write_text("One." if kind == ".txt" else '{"text": "One."}', "utf-8")
    packed = tmp_path / f"b{kind}{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert read(packed) == ["One."]


def test_folder_is_read_in_the_order_of_names(tmp_path):
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


def test_sources_mix_and_share_duplicates(tmp_path):
    one, two = jsonl(tmp_path / "1.jsonl", "A.", "B."), jsonl(tmp_path / "2.jsonl", "B.", "C.")
    assert read(two, one) == ["B.", "C.", "A."]
    assert read(one, one) == ["A.", "B."]


def test_limit_ends_after_a_whole_document(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", *(f"Ten char {i}" for i in range(3)))
    limits = {1: 1, 10: 1, 11: 2, 20: 2, 99: 3}
    assert {limit: len(read(file, max_characters=limit)) for limit in limits} == limits


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_same_documents_from_json_and_parquet(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    # a first line like " = a = " would make it WikiText
    texts = ["no title", *texts]
    stripped = [[line.strip() for line in text.split("\n") if line.strip()] for text in texts]
    expected = list(dict.fromkeys("\n".join(lines) for lines in stripped if lines))
    assert read(jsonl(folder / "a.jsonl", *texts)) == expected
    assert read(parquet(folder / "a.parquet", text=texts)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl: no text found"),
        ("a.csv", b"text\nOne.\n", "a.csv: expected a file of type .txt, .md, .jsonl"),
        ("a.txt", b"Text.\n\x7fELF\0\0", "a.txt, line 2: a NUL byte"),
        # seven bytes of the first line, then the fourth of the second, counted from 0
        (
            "a.txt",
            "\u00c9\u00e9n.\n".encode() + b"caf\xe9.\n",
            "a.txt, line 2, byte 10: expected UTF-8, found byte 0xe9",
        ),
        (
            "a.jsonl",
            b'{"text": "Fine."}\n\n{"body": "One.", "id": 1}',
            "a.jsonl, line 3: no field 'text'; found body, id",
        ),
        ("a.jsonl", b"{}", "a.jsonl, line 1: no field 'text'; found no field"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected text in field 'text', found int"),
        ("a.jsonl", b"[1]", "line 1: expected one JSON object per line, found a list"),
        ("a.jsonl", b'{"text": "One.', "line 1: expected one JSON object per line ("),
        ("a.parquet", b"PAR1 nothing", "a.parquet: not a readable parquet file"),
        ("a.txt.gz", b"One.", "a.txt.gz: the compressed file is damaged"),
        ("a.txt.xz", b"One.", "a.txt.xz: the compressed file is damaged"),
        ("a.txt.gz", gzip.compress(b"One.\n")[:-6], "compressed file is damaged"),
        ("a.txt.xz", lzma.compress(b"One.\n")[:-6], "compressed file is damaged"),
        ("a.parquet", {"body": [""], "id": [1]}, "a.parquet: no column 'text'; found body, id"),
        ("a.parquet", {"text": [1]}, "a.parquet: expected text in column 'text', found int64"),
    ],
)
def test_complaints_about_files(tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, dict):
        parquet(file, **content)
    else:
        file.write_bytes(content)
    assert message in complaint(file)


def test_complaints_about_names():
    names = ("wikitxt", "./missing", "a/b/c", "/missing/a.txt", "data/a.jsonl")
    expected = dict.fromkeys(names, "expected builtin, a path")
    expected |= {"bookcorpus": "loading script", "bookcorpus/bookcorpus": "--data PATH"}
    for name, message in expected.items():
        assert name in complaint(name)
        assert message in complaint(name)


def test_complaints_before_anything_is_read(tmp_path):
    assert "no source" in complaint()
    assert "max_characters" in complaint(tmp_path, max_characters=0)
    with pytest.raises(SourceError, match="list"):
        iter_documents("builtin")
    with pytest.raises(SourceError, match="wikitxt"):
        iter_documents([str(jsonl(tmp_path / "a.jsonl", "A.")), "wikitxt"])
    with pytest.raises(SourceError, match="wikitxt"):
        content_key(["wikitxt"])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\0")
    assert "no file of type .txt" in complaint(tmp_path / "pictures")


class FakeDataset:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, column: str, rows: list, fingerprint: str = "f1") -> None:
        self.column_names, self._fingerprint = [column, "id"], fingerprint
        self._rows = [{column: row} for row in rows]

    def select_columns(self, columns: list[str]) -> list[dict]:
        assert columns == self.column_names[:1]
        return self._rows


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub; returns the calls and a place to put the answer."""
    calls: list[tuple] = []
    answer: list = [FakeDataset("text", ["One.", None, "Two."])]

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sources._load_hub.cache_clear()
    yield calls, answer
    sources._load_hub.cache_clear()


def test_names_of_the_hub_and_local_paths_which_win(hub, tmp_path, monkeypatch):
    expected = {
        "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
        "wikipedia": ("wikimedia/wikipedia", "20231101.en", "train"),
        "org/name": ("org/name", None, "train"),
        "org/name:part.1": ("org/name", "part.1", "train"),
    }
    for name in expected:
        assert read(name) == ["One.", "Two."]
    assert hub[0] == list(expected.values())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    jsonl(tmp_path / "org" / "name" / "a.jsonl", "Local.")
    sources._load_hub.cache_clear()
    assert read("org/name") == ["Local."]
    assert len(hub[0]) == len(expected)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (FakeDataset("body", ["One."]), "org/name: no column 'text'; found body, id"),
        (FakeDataset("text", ["", 2]), "org/name, row 1: expected text in field 'text', found int"),
        (ConnectionError("no"), "--data PATH"),
        (FileNotFoundError("gone"), "--data PATH"),
    ],
)
def test_complaints_about_the_hub(hub, answer, message):
    hub[1][0] = answer
    assert message in complaint("org/name")


def test_offline_for_real(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    message = complaint("some-org/some-name-that-nobody-has")
    assert message.startswith("some-org/some-name-that-nobody-has: ")
    assert "--data PATH" in message


def test_key_of_files_is_their_content(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "One.")
    spec, key = [str(file)], content_key([str(file)])
    os.utime(file, (1, 1))
    copy, as_text = (tmp_path / name for name in ("other.jsonl", "a.txt"))
    for target in (copy, as_text):
        target.write_bytes(file.read_bytes())
    assert content_key(spec) == content_key([str(copy)]) == key
    keys = [key, content_key(spec * 2), content_key(spec, "body"), content_key([str(as_text)])]
    keys.append(content_key(spec, max_characters=5))
    # same size, same time, other bytes
    jsonl(file, "Two.")
    os.utime(file, (1, 1))
    keys.append(content_key(spec))
    assert len(set(keys)) == len(keys)


def test_key_of_the_hub_is_its_fingerprint(hub):
    keys = []
    for fingerprint in ("f1", "f1", "f2"):
        sources._load_hub.cache_clear()
        hub[1][0] = FakeDataset("text", ["One."], fingerprint)
        keys.append(content_key(["org/name"]))
    assert keys[0] == keys[1] != keys[2]


def test_key_of_the_builtin_text_is_that_of_its_files(monkeypatch, tmp_path):
    module = tmp_path / "module.py"
    monkeypatch.setattr(sources, "builtin_files", lambda: [module])
    keys = []
    for text in ("Documentation.", "documentation."):
        module.write_text(f'"""{text}"""\n', "utf-8")
        keys.append(content_key(["builtin"]))
    assert keys[0] != keys[1]


def test_vocabulary_is_learned_from_all_sources_in_turn(tmp_path):
    """It sees the first documents alone; a corpus is read source after source."""
    assert "".join(in_turn([iter("abc"), iter(""), iter("d"), iter("ef")])) == "adebfc"
    files = (jsonl(tmp_path / f"{name}.jsonl", f"{name} 0", f"{name} 1") for name in ("one", "two"))
    names = tuple(map(str, files))
    assert list(vocabulary_text(PretrainConfig(data=names))) == ["one 0", "two 0", "one 1", "two 1"]
    # where reading stops early, the vocabulary sees nothing beyond it
    assert list(vocabulary_text(PretrainConfig(data=names, max_characters=10))) == [
        "one 0",
        "one 1",
    ]


def test_real_data():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    wiki = read(SHARED_DATA / "wikitext-2" / "valid.txt")
    assert len(wiki) == 60
    assert wiki[0].startswith("Homarus gammarus , known as the European lobster")
    report = SourceReport()
    news = read(SHARED_DATA / "wikinews" / "articles.jsonl.xz", max_characters=10**6, report=report)
    assert sum(map(len, news)) == report.characters >= 10**6
