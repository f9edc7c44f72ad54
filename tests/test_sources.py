"""Every kind of source, every complaint about one, and the key of its content."""

import gzip
import json
import lzma
import os
import re
from pathlib import Path
from unittest.mock import Mock, call

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import sources
from pretrain.corpus import vocabulary_text
from pretrain.settings import PretrainConfig
from pretrain.sources import SourceError, SourceReport, content_key, iter_documents


def read(*specs: Path | str, **options) -> list[str]:
    return list(iter_documents([str(spec) for spec in specs], **options))


def complaint(*specs: Path | str, **options) -> str:
    with pytest.raises(SourceError) as caught:
        read(*specs, **options)
    return str(caught.value)


def jsonl(path: Path, *texts: object) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


WRAPPED = "These are fifty characters or more, and they go on"
WIKITEXT = ["", "= One =", "", "First .", "", "= = Part = =", "", "Second .", "= 0 ="]
WIKITEXT += ["", "= Two =", "", "Third ."]
WIKITEXT = [f" {line} \n" for line in WIKITEXT]
ARTICLES = ["First .\nSecond .\n= 0 =", "Third ."]
BODIES = [f"Document {i} begins.\n" + f"It has text {i}.\n" * 30_000 for i in range(3)]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        # a small file is a document, a short line a paragraph
        ("\ufeffTitle\r\nFirst.\r\n\r\n  Second.  \r\n", ["Title\nFirst.\nSecond."]),
        (f"One\n{WRAPPED}\non. \n{WRAPPED}.\nNew.", [f"One\n{WRAPPED} on.\n{WRAPPED}.\nNew."]),
        # a large file is parted at blank lines
        ("\n\n \n".join(BODIES), [body.strip() for body in BODIES]),
        # WikiText is parted at its headings; equations are none
        ("".join(WIKITEXT), ARTICLES),
        ("We set x = 1.\n\n = 2 = \n\nThat is all.\n", ["We set x = 1.\n= 2 =\nThat is all."]),
    ],
    ids=["small", "wrapped", "large", "wikitext", "equations"],
)
def test_text_files(tmp_path, content, documents):
    file = tmp_path / "a.txt"
    file.write_text(content, "utf-8", newline="")
    assert read(file) == documents


def test_wikitext_rows_of_a_table_become_articles(tmp_path):
    assert read(parquet(tmp_path / "w.parquet", text=WIKITEXT)) == ARTICLES


def test_skipped_records_are_counted_and_half_a_surrogate_pair_is_mended(tmp_path):
    texts = ["One.\n\nTwo.", "", "  \n", None, "Three.", " One. \nTwo."]
    report = SourceReport()
    assert read(jsonl(tmp_path / "a.jsonl", *texts), report=report) == ["One.\nTwo.", "Three."]
    assert report == SourceReport(documents=2, characters=15, skipped_empty=3, skipped_duplicates=1)
    halved = jsonl(tmp_path / "b.jsonl", "A \ud83d b \ud83d\ude00.", "One.\nTwo.")
    assert read(halved, tmp_path / "a.jsonl") == ["A \ufffd b \U0001f600.", "One.\nTwo.", "Three."]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_and_another_field(tmp_path, suffix, pack):
    plain = [parquet(tmp_path / "a.parquet", body=["One.", None], other=["No.", "No."])]
    for name, content in {"b.txt": "Two.", "c.json": '{"body": "Three.", "text": "No."}'}.items():
        plain.append(tmp_path / name)
        plain[-1].write_text(content, "utf-8")
    packed = [Path(f"{path}{suffix}") for path in plain]
    for one, other in zip(plain, packed, strict=True):
        other.write_bytes(pack(one.read_bytes()))
    for files in (plain, packed):
        assert read(*files, text_field="body") == ["One.", "Two.", "Three."]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("c.txt", "b/z.txt", "b/a.txt", "a.txt", ".git/d.txt"):
        (tmp_path / name).write_text(name, "utf-8")
    for name in ("image.png", "none.txt"):
        (tmp_path / name).touch()
    report = SourceReport()
    assert read(tmp_path, report=report) == ["a.txt", "b/a.txt", "b/z.txt", "c.txt"]
    assert (report.skipped_files, report.skipped_empty) == (1, 1)


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
        ("a.txt", b"", "a.txt: no text found"),
        ("a.csv", b"text\nOne.\n", "a.csv: expected a file of type .txt, .md, .jsonl"),
        ("a.txt", b"Text.\n\x7fELF\0\0", "a.txt, line 2: a NUL byte"),
        ("a.txt", b"Fine.\ncaf\xe9.\n", "a.txt, line 2: expected UTF-8 ("),
        ("a.jsonl", b'{"text": ""}\n\n{"b": "", "id": 1}', "line 3: no field 'text'; found b, id"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected text in field 'text', found int"),
        ("a.jsonl", b"[1]", "line 1: expected one JSON object per line, found a list"),
        ("a.jsonl", b'{"text": "One.', "line 1: expected one JSON object per line ("),
        ("a.parquet", b"PAR1 nothing", "a.parquet: not a readable parquet file"),
        ("a.txt.gz", gzip.compress(b"One.\n")[:-6], "compressed file is damaged"),
        ("a.parquet", {"body": [""], "id": [1]}, "a.parquet, row 0: no field 'text'; found body"),
    ],
)
def test_complaints_about_files(tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, dict):
        parquet(file, **content)
    else:
        file.write_bytes(content)
    assert message in complaint(file)


def test_complaints_before_anything_is_read(tmp_path):
    for name in ("wikitxt", "./missing", "a/b/c", "/missing/a.txt", "data/a.jsonl"):
        with pytest.raises(SourceError, match=f"'{name}' is neither .* expected builtin, a path"):
            iter_documents([str(jsonl(tmp_path / "a.jsonl", "A.")), name])
        with pytest.raises(SourceError, match=f"'{name}' is neither"):
            content_key([name])
    assert "max_characters" in complaint(tmp_path, max_characters=0)
    (tmp_path / "empty").mkdir()
    assert "no file of type .txt" in complaint(tmp_path / "empty")


@pytest.fixture
def hub(monkeypatch) -> Mock:
    """Stands in for the hub."""
    load = Mock(return_value=Dataset.from_dict({"text": ["One.", None, "Two."], "id": [1, 2, 3]}))
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(sources, "_load_hub", sources._load_hub.__wrapped__)
    return load


def test_names_of_the_hub_and_local_paths_which_win(hub, tmp_path, monkeypatch):
    expected = {
        "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
        "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
        "org/name": ("org/name", None),
        "org/name:part.1": ("org/name", "part.1"),
    }
    assert [read(name) for name in expected] == [["One.", "Two."]] * 4
    assert hub.call_args_list == [call(*names, split="train") for names in expected.values()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    jsonl(tmp_path / "org" / "name" / "a.jsonl", "Local.")
    assert read("org/name") == ["Local."]


def test_complaints_about_the_hub(hub):
    hub.return_value = Dataset.from_dict({"body": [""], "id": [1]})
    assert complaint("org/name") == "org/name, row 0: no field 'text'; found body, id"
    for error in (ConnectionError("no"), FileNotFoundError("gone")):
        hub.side_effect = error
        assert "--data PATH" in complaint("org/name")


def test_offline_for_real():
    assert re.match("org/nobody-has-it: .*--data PATH", complaint("org/nobody-has-it"), re.S)


def test_key_is_the_content(hub, monkeypatch, tmp_path):
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
    # the files of the builtin text, and the fingerprint of a data set
    monkeypatch.setattr(sources, "builtin_files", lambda: [as_text])
    for text in ("One.", "Two."):
        jsonl(as_text, text)
        hub.return_value = Dataset.from_dict({"text": [text]})
        keys += [content_key(["builtin"]), content_key(["org/name"])]
    assert len(set(keys)) == len(keys)


def test_vocabulary_is_learned_from_all_sources_in_turn(tmp_path):
    """It sees the first documents alone; a corpus is read source after source."""
    names = tuple(str(jsonl(tmp_path / f"{text}.jsonl", *text)) for text in ("abc", "d", "ef"))
    assert "".join(vocabulary_text(PretrainConfig(data=names))) == "adebfc"
    # where reading stops early, the vocabulary sees nothing beyond it
    assert "".join(vocabulary_text(PretrainConfig(data=names, max_characters=4))) == "abcd"


def test_wikitext_as_published(shared_data):
    wiki = read(shared_data / "wikitext-2" / "valid.txt")
    assert len(wiki) == 60
    assert wiki[0].startswith("Homarus gammarus , known as the European lobster")
