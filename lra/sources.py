"""Readers of the tasks' source files: what they hold becomes ids as in the published pipelines.

They raise `ArenaError` where a file is missing or a record is none of the task's; `skipped` gets
the places of empty texts and images, which are left out.
"""

import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lra.store import SPLITS, ArenaError, Example, draw_tenth
from lra.tasks import ArenaTask
from ponet.run.hub import import_datasets

LISTOPS_TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Their ids are 1, 2, ... in this order, ours: the published one is that of an unordered set and
differs from run to run."""

HUB = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}
"""Data sets of the Hugging Face hub by task."""

SOURCES = {
    "listops": "lra_release (unpacked), or a folder with basic_{train,val,test}.tsv",
    "text": "aclImdb, aclImdb_v1.tar.gz, or {train,test}*.jsonl with text and label (1 positive)",
    "retrieval": "lra_release (unpacked), a folder with new_aan_pairs.{train,eval,test}.tsv, or "
    "with papers.jsonl (id, text) and pairs.{train,val,test}.tsv (label, paper1, paper2)",
    "image": "cifar-10-binary.tar.gz or its folder, or {train,test}/CLASS/*.png, also in archives",
    "pathfinder": "lra_release (unpacked), or its folder pathfinder32",
    "pathx": "lra_release (unpacked), or its folder pathfinder128",
}
"""What `read_source` reads, by task; JSON lines may be compressed (`.gz`, `.xz`)."""

_LISTOPS_IDS = {token: number for number, token in enumerate(LISTOPS_TOKENS, start=1)}
# the nesting in pairs says nothing that the brackets do not
_NO_PARENTHESES = str.maketrans("", "", "()")
_GREY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], np.float32)
_REVIEW = r"(?:^|/)(train|test)/(neg|pos)/[^/]+\.txt$"
_CIFAR_SIDE = 32
_CIFAR = (
    r"(?:^|/)(?:(?P<batch>data_batch_[1-5]|test_batch)(?P<binary>\.bin)?"
    r"|(?P<split>train|test)/(?P<name>[^/]+)/[^/]+\.(?:png|jpe?g))$"
)
_METADATA = "curv_contour_length_14/metadata"
# the archive of the release unpacks to a folder in a folder of the same name
_RELEASE = (".", "lra_release", "lra_release/lra_release")
_ARCHIVES = ("*.tar", "*.tar.*", "*.tgz")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError)

# split, place for messages, label, a text for each input
_Record = tuple[str, str, bytes, list[bytes]]


def encode_listops(source: str, max_tokens: int) -> np.ndarray:
    """Ids of an expression without its parentheses, cut: `[tokens]`, uint8, 1 to 15.

    Raises `ValueError` for no token, or one that is none of the task's.
    """
    tokens = source.translate(_NO_PARENTHESES).split()
    if not tokens:
        raise ValueError("the expression is empty")
    try:
        ids = bytes([_LISTOPS_IDS[token] for token in tokens])
    except KeyError as error:
        raise ValueError(f"token {error.args[0]!r}, expected {' '.join(LISTOPS_TOKENS)}") from None
    return np.frombuffer(ids, np.uint8)[:max_tokens]


def encode_bytes(text: bytes, max_tokens: int) -> np.ndarray:
    """Ids of a text, one per byte: the byte plus one, because 0 is padding; uint16, 1 to 256."""
    return np.frombuffer(text[:max_tokens], np.uint8).astype(np.uint16) + np.uint16(1)


def grey_levels(images: np.ndarray) -> np.ndarray:
    """Grey images `[...]` of `[..., 3]`, both uint8: TensorFlow's formula, which rounds down."""
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    # white gives 0.9999, and 255.5 brings it back to 255
    return ((scaled @ _GREY_WEIGHTS) * np.float32(255.5)).astype(np.uint8)


def read_source(task: ArenaTask, source: Path, skipped: list[str], seed: int) -> Iterator[Example]:
    """Examples of a task from files; the seed is that of splits that are drawn."""
    match task.name:
        case "listops":
            return _read_listops(task, source)
        case "text":
            return _encode_texts(task, _reviews(source), skipped)
        case "retrieval":
            papers = sorted(source.glob("papers.jsonl*"))
            pairs = _collection(source, papers[0], seed) if papers else _release_pairs(source)
            return _encode_texts(task, pairs, skipped)
        case "image":
            return _read_cifar(task, source)
        case _:
            return _read_pathfinder(task, source, skipped, seed)


def _read_listops(task: ArenaTask, source: Path) -> Iterator[Example]:
    folder = _find_in_release(source, "basic_train.tsv", "listops-1000/basic_train.tsv").parent
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        for where, (text, target) in _rows(folder / f"basic_{name}.tsv", "Source", "Target"):
            label = _label(where, target, task)
            try:
                ids = encode_listops(text.decode("ascii"), task.max_tokens)
            except ValueError as error:
                raise ArenaError(f"{where}: {error}") from error
            yield Example(split, label, (ids,))


def _encode_texts(
    task: ArenaTask, records: Iterable[_Record], skipped: list[str]
) -> Iterator[Example]:
    for split, where, field, texts in records:
        label = _label(where, field, task)
        if all(texts):
            inputs = tuple(encode_bytes(text, task.max_tokens) for text in texts)
            yield Example(split, label, inputs)
        else:
            skipped.append(f"{where}: empty text")


def _reviews(source: Path) -> Iterator[_Record]:
    if not any(source.glob("train*.jsonl*")):
        for where, match, content in _members(source, _REVIEW):
            yield match[1], where, b"1" if match[2] == "pos" else b"0", [content]
        return
    for split in ("train", "test"):
        for path in sorted(source.glob(f"{split}*.jsonl*")):
            for where, record in _json_lines(path, "text", "label"):
                text = record["text"].encode(errors="replace")
                yield split, where, str(record["label"]).encode(), [text]


def _release_pairs(source: Path) -> Iterator[_Record]:
    name = "new_aan_pairs.train.tsv"
    folder = _find_in_release(source, name, f"tsv_data/{name}").parent
    columns = ("label", "id1", "id2", "text1", "text2")
    for split, name in (("train", "train"), ("dev", "eval"), ("test", "test")):
        rows = _rows(folder / f"new_aan_pairs.{name}.tsv", *columns, header=False)
        for where, (label, _, _, *texts) in rows:
            yield split, where, label, texts


def _collection(folder: Path, papers: Path, seed: int) -> Iterator[_Record]:
    """Of three files; of two, the second is the test set, and the pairs of a seeded tenth of the
    training set's first papers are the development set.
    """
    records = _json_lines(papers, "id", "text")
    texts = {str(r["id"]).encode(): r["text"].encode(errors="replace") for _, r in records}
    pairs = {
        path.name.split(".")[1]: list(_rows(path, "label", "paper1", "paper2"))
        for path in folder.glob("pairs.*.tsv")
    }
    if "train" not in pairs or not {"val", "test"} & pairs.keys():
        raise ArenaError(f"{folder}: expected pairs.train.tsv and pairs.val.tsv or pairs.test.tsv")
    train, dev, test = (pairs.get(name, []) for name in ("train", "val", "test"))
    if not (dev and test):
        test = dev or test
        # pairs of one paper stay together
        first = sorted({fields[1] for _, fields in train})
        chosen = dict(zip(first, draw_tenth(np.zeros(len(first)), seed), strict=True))
        dev = [row for row in train if chosen[row[1][1]]]
        train = [row for row in train if not chosen[row[1][1]]]
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        for where, (label, *ids) in rows:
            for name in ids:
                if name not in texts:
                    found = name.decode(errors="replace")
                    raise ArenaError(f"{where}: the paper {found!r} is not in {papers}")
            yield split, where, label, [texts[name] for name in ids]


def _read_cifar(task: ArenaTask, source: Path) -> Iterator[Example]:
    """Grey images. The published development set is the last tenth of the training set in an order
    that only the TensorFlow data set has, so `lra.store.write_task` draws one.
    """
    names = task.class_names
    for where, match, content in _members(source, _CIFAR):
        if match["batch"] and not match["binary"]:
            raise ArenaError(
                f"{where}: the Python version of CIFAR-10 is a pickle, which could run code; "
                "take the binary version (cifar-10-binary.tar.gz)"
            )
        if match["batch"]:
            split = "test" if match["batch"] == "test_batch" else "train"
            images = _binary_batch(where, content)
        elif match["name"] in names:
            split, label = match["split"], names.index(match["name"])
            images = [(label, _decode_image(where, content, "RGB", _CIFAR_SIDE))]
        else:
            expected = ", ".join(names)
            raise ArenaError(f"{where}: unknown class {match['name']!r}, expected {expected}")
        for label, image in images:
            yield Example(split, label, (grey_levels(image).reshape(-1),))


def _binary_batch(where: str, content: bytes) -> Iterable[tuple[int, np.ndarray]]:
    """Labels and images `[32, 32, 3]`: records of a label and a plane for each colour, in bytes."""
    size = 1 + 3 * _CIFAR_SIDE**2
    if not content or len(content) % size:
        raise ArenaError(f"{where}: expected records of {size} bytes, found {len(content)}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ArenaError(f"{where}: expected labels from 0 to 9, found {labels.max()}")
    images = records[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1)
    return zip(labels.tolist(), images, strict=True)


def examples_of_hub(task: ArenaTask, advice: str) -> Iterator[Example]:
    """Examples of a task in `HUB`; the error ends with `advice` where they cannot be had."""
    name = HUB[task.name]
    try:
        dataset: Any = import_datasets().load_dataset(name)
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise ArenaError(f"the hub's {name} cannot be loaded ({error}); {advice}") from error
    for split in ("train", "test"):
        for row in dataset[split]:
            if task.name == "text":
                ids = encode_bytes(row["text"].encode(), task.max_tokens)
            else:
                ids = grey_levels(np.asarray(row["img"].convert("RGB"))).reshape(-1)
            yield Example(split, row["label"], (ids,))


def _read_pathfinder(
    task: ArenaTask, source: Path, skipped: list[str], seed: int
) -> Iterator[Example]:
    """Images of the release, which has empty files, divided by a seeded shuffle 80, 10 and 10."""
    side = round(task.max_tokens**0.5)
    names = ("metadata", _METADATA, f"pathfinder{side}/{_METADATA}")
    folder, rows = _find_in_release(source, *names), []
    # text files in spite of their names, by number
    for file in sorted(folder.glob("[0-9]*.npy"), key=lambda path: (len(path.name), path)):
        for where, line in _lines(file):
            fields = line.decode(errors="replace").split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                expected = "folder, file, number, label (0 or 1)"
                raise ArenaError(f"{where}: expected {expected}, found {line[:60]!r}")
            path = folder.parent / fields[0] / fields[1]
            if not path.is_file():
                raise ArenaError(f"{where}: the image {path} is missing")
            if path.stat().st_size:
                rows.append((path, int(fields[3])))
            else:
                skipped.append(f"{path}: empty file")
    ranks = np.random.default_rng(seed).permutation(len(rows))
    bounds = (len(rows) * 8 // 10, len(rows) * 9 // 10)
    places = np.searchsorted(bounds, ranks, side="right")
    for (path, label), place in zip(rows, places, strict=True):
        pixels = _decode_image(str(path), path.read_bytes(), "L", side)
        yield Example(SPLITS[place], label, (pixels.reshape(-1),))


def _find_in_release(source: Path, *names: str) -> Path:
    """A file or folder of the unpacked release, at the first of the paths that it may have."""
    for place in (source / base / name for base in _RELEASE for name in names):
        if place.exists():
            return place
    raise ArenaError(f"{source}: expected {' or '.join(names)} in it or in lra_release below it")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place for messages, and line, of a file, which may be compressed (`.gz`, `.xz`)."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line.rstrip(b"\r\n")
    except _DAMAGE as error:
        raise ArenaError(f"{path}: cannot be read ({error})") from error


def _rows(path: Path, *columns: str, header: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """Place and fields of each line of an unquoted TSV file, whose header names the columns."""
    named = ", ".join(columns)
    for where, line in _lines(path):
        fields = line.split(b"\t")
        if header and fields != [name.encode() for name in columns]:
            found = line[:40].decode(errors="replace")
            raise ArenaError(f"{where}: expected the columns {named}, found {found!r}")
        if len(fields) != len(columns):
            message = f"expected {len(columns)} columns ({named}), found {len(fields)}"
            raise ArenaError(f"{where}: {message}")
        if not header:
            yield where, fields
        header = False


def _label(where: str, field: bytes, task: ArenaTask) -> int:
    """A label, also one written as 1.0."""
    text = field.removesuffix(b".0")
    if text.isdigit() and int(text) < task.num_classes:
        return int(text)
    found = field[:40].decode(errors="replace")
    raise ArenaError(f"{where}: expected a label from 0 to {task.num_classes - 1}, found {found!r}")


def _json_lines(path: Path, *fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of a file, one per line, that have all fields; `text` is a string."""
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ArenaError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or not set(fields) <= record.keys():
            raise ArenaError(f"{where}: expected an object with {', '.join(fields)}")
        if not isinstance(record["text"], str):
            raise ArenaError(f"{where}: expected a string in text, found {record['text']!r:.40}")
        yield where, record


def _members(source: Path, pattern: str) -> Iterator[tuple[str, re.Match[str], bytes]]:
    """Place for messages, match of the name, with `/` between folders, and content of files: in an
    archive, in a folder, or in the archives of a folder that holds some.
    """
    archives = [source]
    if source.is_dir():
        archives = sorted(path for kind in _ARCHIVES for path in source.glob(kind))
    for archive in archives:
        yield from _archive_members(archive, pattern)
    for path in [] if archives else sorted(source.rglob("*")):
        if match := re.search(pattern, path.relative_to(source).as_posix()):
            yield str(path), match, path.read_bytes()


def _archive_members(archive: Path, pattern: str) -> Iterator[tuple[str, re.Match[str], bytes]]:
    try:
        with tarfile.open(archive, "r|*") as tar:
            for entry in tar:
                match = re.search(pattern, entry.name)
                file = tar.extractfile(entry) if match and entry.isfile() else None
                if match and file:
                    yield f"{archive}: {entry.name}", match, file.read()
    except _DAMAGE as error:
        raise ArenaError(f"{archive}: not a readable archive ({error})") from error


def _decode_image(where: str, content: bytes, mode: str, side: int) -> np.ndarray:
    """Pixels of a square image file: `[side, side]`, or of the mode RGB `[side, side, 3]`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError) as error:
        # damaged PNG files raise SyntaxError
        raise ArenaError(f"{where}: not a readable image ({error})") from error
    if pixels.shape[:2] != (side, side):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ArenaError(f"{where}: expected an image of {side} x {side} pixels, found {found}")
    return pixels
