"""Readers of ListOps, IMDb reviews (Text) and pairs of papers (Retrieval)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra.cache import draw_tenth
from lra.encoding import encode_bytes, encode_listops
from lra.examples import DataError, Example
from lra.files import fields_of, find_in_release, label_of, lines_of, members
from lra.tasks import TASKS

_LISTOPS, _TEXT, _RETRIEVAL = (TASKS[name] for name in ("listops", "text", "retrieval"))
_POLARITIES = {"neg": 0, "pos": 1}
_REVIEW = r"(?:^|/)(train|test)/(neg|pos)/[^/]+\.txt$"


def read_listops(source: Path) -> Iterator[Example]:
    """Expressions of the files of the release, `basic_{train,val,test}.tsv`.

    Args:
        source: a folder that holds them, or the whole release.

    Raises:
        DataError: a file is missing, or a line is none of the task's.
    """
    names = ("basic_train.tsv", "listops-1000/basic_train.tsv")
    folder = find_in_release(source, *names).parent
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        lines = lines_of(folder / f"basic_{name}.tsv")
        where, header = next(lines, (f"{folder}/basic_{name}.tsv", b""))
        if header != b"Source\tTarget":
            found = header[:40].decode(errors="replace")
            raise DataError(f"{where}: expected the columns Source and Target, found {found!r}")
        for where, line in lines:
            text, target = fields_of(where, line, "Source", "Target")
            label = label_of(where, target, _LISTOPS.num_classes)
            yield Example(split, label, (_listops_ids(where, text),))


def _listops_ids(where: str, text: bytes) -> np.ndarray:
    try:
        ids = encode_listops(text.decode("ascii"), _LISTOPS.max_tokens)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not len(ids):
        raise DataError(f"{where}: the expression is empty")
    return ids


def read_reviews(source: Path, skipped: list[str]) -> Iterator[Example]:
    """Reviews of IMDb.

    Args:
        source: the folder or the archive `aclImdb_v1`, or a folder with `train*.jsonl` and
            `test*.jsonl`, also `.gz` or `.xz`, whose lines have `text` and `label` (1 positive).
        skipped: gets the places of empty texts.

    Raises:
        DataError: a record is none of the task's.
    """
    if any(source.glob("train*.jsonl*")):
        for split in ("train", "test"):
            for path in sorted(source.glob(f"{split}*.jsonl*")):
                for where, record in _records(path, "text", "label"):
                    label = label_of(where, str(record["label"]).encode(), _TEXT.num_classes)
                    text = record["text"].encode(errors="replace")
                    yield from _review(where, split, label, text, skipped)
        return
    for where, match, content in members(source, _REVIEW):
        yield from _review(where, match[1], _POLARITIES[match[2]], content, skipped)


def reviews_of(dataset: Any, skipped: list[str]) -> Iterator[Example]:
    """Reviews of the hub's data set; see `read_reviews`."""
    for split in ("train", "test"):
        for number, row in enumerate(dataset[split]):
            where = f"{split}, row {number}"
            yield from _review(where, split, row["label"], row["text"].encode(), skipped)


def _review(
    where: str, split: str, label: int, text: bytes, skipped: list[str]
) -> Iterator[Example]:
    if text:
        yield Example(split, label, (encode_bytes(text, _TEXT.max_tokens),))
    else:
        skipped.append(f"{where}: empty text")


def _records(path: Path, *fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of a file, one a line, that have all fields; `text` is a string."""
    for where, line in lines_of(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or not set(fields) <= record.keys():
            raise DataError(f"{where}: expected an object with {', '.join(fields)}")
        if not isinstance(record["text"], str):
            found = type(record["text"]).__name__
            raise DataError(f"{where}: expected a string in text, found {found}")
        yield where, record


def read_pairs(source: Path, skipped: list[str], seed: int) -> Iterator[Example]:
    """Pairs of papers of which one cites the other, or does not.

    Args:
        source: the release, whose `new_aan_pairs.{train,eval,test}.tsv` hold the texts; or a
            folder with `papers.jsonl` (`id`, `text`; also `.gz` or `.xz`) and
            `pairs.{train,val,test}.tsv` (columns label, paper1, paper2). There, without a test
            file the validation file is the test set, and the pairs of a seeded tenth of the
            training set's first papers are the development set.
        skipped: gets the places of pairs with an empty text.
        seed: of that choice.

    Raises:
        DataError: a file is missing, or a record is none of the task's.
    """
    papers = sorted(source.glob("papers.jsonl*"))
    if papers:
        yield from _collection_pairs(source, papers[0], skipped, seed)
        return
    name = "new_aan_pairs.train.tsv"
    folder = find_in_release(source, name, f"tsv_data/{name}").parent
    columns = ("label", "id1", "id2", "text1", "text2")
    for split, name in (("train", "train"), ("dev", "eval"), ("test", "test")):
        for where, line in lines_of(folder / f"new_aan_pairs.{name}.tsv"):
            field, _, _, *texts = fields_of(where, line, *columns)
            label = label_of(where, field, _RETRIEVAL.num_classes)
            inputs = [encode_bytes(text, _RETRIEVAL.max_tokens) for text in texts]
            yield from _pair(where, split, label, inputs, skipped)


def _pair(
    where: str, split: str, label: int, inputs: list[np.ndarray], skipped: list[str]
) -> Iterator[Example]:
    if all(map(len, inputs)):
        yield Example(split, label, tuple(inputs))
    else:
        skipped.append(f"{where}: empty text")


def _collection_pairs(
    folder: Path, papers: Path, skipped: list[str], seed: int
) -> Iterator[Example]:
    texts = {
        record["id"]: encode_bytes(record["text"].encode(errors="replace"), _RETRIEVAL.max_tokens)
        for _, record in _records(papers, "id", "text")
    }
    pairs = {path.name.split(".")[1]: list(_pair_rows(path)) for path in folder.glob("pairs.*.tsv")}
    if "train" not in pairs or not {"val", "test"} & pairs.keys():
        raise DataError(f"{folder}: expected pairs.train.tsv and pairs.val.tsv or pairs.test.tsv")
    train = pairs["train"]
    if {"val", "test"} <= pairs.keys():
        dev, test = pairs["val"], pairs["test"]
    else:
        test = pairs.get("val") or pairs["test"]
        # pairs of one paper stay together
        first = {row[2] for row in train}
        chosen = dict(zip(sorted(first), draw_tenth(np.zeros(len(first)), seed), strict=True))
        dev = [row for row in train if chosen[row[2]]]
        train = [row for row in train if not chosen[row[2]]]
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        for where, label, *names in rows:
            for name in names:
                if name not in texts:
                    raise DataError(f"{where}: the paper {name!r} is not in {papers}")
            yield from _pair(where, split, label, [texts[name] for name in names], skipped)


def _pair_rows(path: Path) -> Iterator[tuple[str, int, str, str]]:
    """Place, label and the ids of both papers of each line below the header."""
    columns = ("label", "paper1", "paper2")
    lines = lines_of(path)
    where, header = next(lines, (str(path), b""))
    if header != "\t".join(columns).encode():
        raise DataError(f"{where}: expected the columns {', '.join(columns)}")
    for where, line in lines:
        label, first, second = fields_of(where, line, *columns)
        number = label_of(where, label, _RETRIEVAL.num_classes)
        yield where, number, first.decode(errors="replace"), second.decode(errors="replace")
