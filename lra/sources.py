"""Readers of the tasks' source files: what they hold becomes ids as in the published pipelines."""

import gzip
import io
import json
import logging
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lra.store import ArenaError, Example, draw_tenth
from lra.tasks import TASKS, ArenaTask

LISTOPS_TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Their ids are 1, 2, ... in this order, ours: the published one is that of an unordered set and
differs from run to run."""

_LISTOPS_IDS = {token: number for number, token in enumerate(LISTOPS_TOKENS, start=1)}
# the nesting in pairs says nothing that the brackets do not
_NO_PARENTHESES = str.maketrans("", "", "()")
_GREY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], np.float32)

_LISTOPS, _TEXT, _RETRIEVAL, _IMAGE = (
    TASKS[name] for name in ("listops", "text", "retrieval", "image")
)
_POLARITIES = {"neg": 0, "pos": 1}
_REVIEW = r"(?:^|/)(train|test)/(neg|pos)/[^/]+\.txt$"
_CIFAR_SIDE = 32
_CIFAR = (
    r"(?:^|/)(?:(?P<batch>data_batch_[1-5]|test_batch)(?P<binary>\.bin)?"
    r"|(?P<split>train|test)/(?P<name>[^/]+)/[^/]+\.(?:png|jpe?g))$"
)
_METADATA = "curv_contour_length_14/metadata"
# the archive of the release unpacks to a folder in a folder of the same name
_RELEASE = (".", "lra_release", "lra_release/lra_release")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError)

# place for messages, match of the name, content of a file
_Member = tuple[str, re.Match[str], bytes]

logger = logging.getLogger(__name__)


def encode_listops(source: str, max_tokens: int) -> np.ndarray:
    """Ids of an expression without its parentheses, cut: `[tokens]`, uint8, 1 to 15.

    Raises:
        ValueError: a token is none of the task's.
    """
    tokens = source.translate(_NO_PARENTHESES).split()
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


def read_listops(source: Path) -> Iterator[Example]:
    """Expressions of `basic_{train,val,test}.tsv`, in a folder or in the whole release.

    Raises:
        ArenaError: a file is missing, or a line is none of the task's.
    """
    names = ("basic_train.tsv", "listops-1000/basic_train.tsv")
    folder = _find_in_release(source, *names).parent
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        path = folder / f"basic_{name}.tsv"
        for where, (text, target) in _rows_below_header(path, "Source", "Target"):
            label = _label(where, target, _LISTOPS.num_classes)
            try:
                ids = encode_listops(text.decode("ascii"), _LISTOPS.max_tokens)
            except ValueError as error:
                raise ArenaError(f"{where}: {error}") from error
            if not len(ids):
                raise ArenaError(f"{where}: the expression is empty")
            yield Example(split, label, (ids,))


def read_reviews(source: Path, skipped: list[str]) -> Iterator[Example]:
    """Reviews of IMDb.

    Args:
        source: the folder or the archive `aclImdb_v1`, or a folder with `train*.jsonl` and
            `test*.jsonl`, also `.gz` or `.xz`, whose lines have `text` and `label` (1 positive).
        skipped: gets the places of empty texts.

    Raises:
        ArenaError: a record is none of the task's.
    """
    if any(source.glob("train*.jsonl*")):
        for split in ("train", "test"):
            for path in sorted(source.glob(f"{split}*.jsonl*")):
                for where, record in _records(path, "text", "label"):
                    label = _label(where, str(record["label"]).encode(), _TEXT.num_classes)
                    text = record["text"].encode(errors="replace")
                    yield from _documents(where, split, label, [text], _TEXT, skipped)
        return
    for where, match, content in _members(source, _REVIEW):
        label = _POLARITIES[match[2]]
        yield from _documents(where, match[1], label, [content], _TEXT, skipped)


def reviews_of_hub(dataset: Any, skipped: list[str]) -> Iterator[Example]:
    """Reviews of the hub's data set; see `read_reviews`."""
    for split in ("train", "test"):
        for number, row in enumerate(dataset[split]):
            where, text = f"{split}, row {number}", row["text"].encode()
            yield from _documents(where, split, row["label"], [text], _TEXT, skipped)


def _documents(
    where: str, split: str, label: int, texts: list[bytes], task: ArenaTask, skipped: list[str]
) -> Iterator[Example]:
    """An example of texts, unless one is empty."""
    if all(texts):
        yield Example(split, label, tuple(encode_bytes(text, task.max_tokens) for text in texts))
    else:
        skipped.append(f"{where}: empty text")


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
        ArenaError: a file is missing, or a record is none of the task's.
    """
    papers = sorted(source.glob("papers.jsonl*"))
    if papers:
        yield from _collection_pairs(source, papers[0], skipped, seed)
        return
    name = "new_aan_pairs.train.tsv"
    folder = _find_in_release(source, name, f"tsv_data/{name}").parent
    columns = ("label", "id1", "id2", "text1", "text2")
    for split, name in (("train", "train"), ("dev", "eval"), ("test", "test")):
        for where, line in _lines(folder / f"new_aan_pairs.{name}.tsv"):
            field, _, _, *texts = _fields(where, line, *columns)
            label = _label(where, field, _RETRIEVAL.num_classes)
            yield from _documents(where, split, label, texts, _RETRIEVAL, skipped)


def _collection_pairs(
    folder: Path, papers: Path, skipped: list[str], seed: int
) -> Iterator[Example]:
    texts = {
        record["id"]: record["text"].encode(errors="replace")
        for _, record in _records(papers, "id", "text")
    }
    pairs = {
        path.name.split(".")[1]: list(_rows_below_header(path, "label", "paper1", "paper2"))
        for path in folder.glob("pairs.*.tsv")
    }
    if "train" not in pairs or not {"val", "test"} & pairs.keys():
        raise ArenaError(f"{folder}: expected pairs.train.tsv and pairs.val.tsv or pairs.test.tsv")
    train = pairs["train"]
    if {"val", "test"} <= pairs.keys():
        dev, test = pairs["val"], pairs["test"]
    else:
        test = pairs.get("val") or pairs["test"]
        # pairs of one paper stay together
        first = {fields[1] for _, fields in train}
        chosen = dict(zip(sorted(first), draw_tenth(np.zeros(len(first)), seed), strict=True))
        dev = [row for row in train if chosen[row[1][1]]]
        train = [row for row in train if not chosen[row[1][1]]]
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        for where, (field, *ids) in rows:
            label = _label(where, field, _RETRIEVAL.num_classes)
            names = [name.decode(errors="replace") for name in ids]
            for name in names:
                if name not in texts:
                    raise ArenaError(f"{where}: the paper {name!r} is not in {papers}")
            pair = [texts[name] for name in names]
            yield from _documents(where, split, label, pair, _RETRIEVAL, skipped)


def read_cifar(source: Path) -> Iterator[Example]:
    """Grey images of CIFAR-10, training and test set.

    The published development set is the last tenth of the training set in an order that only the
    TensorFlow data set has, so `lra.store.write_task` draws one.

    Args:
        source: a folder or tar archive (or a folder of archives) with the batches of the binary
            version, or with images as `train/<class>/*.png`, `test/<class>/*.png` (or `.jpg`).

    Raises:
        ArenaError: a batch or an image is damaged, or a class is unknown.
    """
    for where, match, content in _members(source, _CIFAR):
        if match["batch"]:
            if not match["binary"]:
                raise ArenaError(
                    f"{where}: the Python version of CIFAR-10 is a pickle, which could run code; "
                    "take the binary version (cifar-10-binary.tar.gz)"
                )
            split = "test" if match["batch"] == "test_batch" else "train"
            for label, image in _binary_batch(where, content):
                yield _grey_example(split, label, image)
        elif match["name"] in _IMAGE.class_names:
            image = _decode_image(where, content, "RGB", _CIFAR_SIDE)
            yield _grey_example(match["split"], _IMAGE.class_names.index(match["name"]), image)
        else:
            expected = ", ".join(_IMAGE.class_names)
            raise ArenaError(f"{where}: unknown class {match['name']!r}, expected {expected}")


def cifar_of_hub(dataset: Any) -> Iterator[Example]:
    """Grey images of the hub's data set; see `read_cifar`."""
    for split in ("train", "test"):
        for row in dataset[split]:
            yield _grey_example(split, row["label"], np.asarray(row["img"].convert("RGB")))


def _grey_example(split: str, label: int, image: np.ndarray) -> Example:
    return Example(split, label, (grey_levels(image).reshape(-1),))


def _binary_batch(where: str, content: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """Labels and images `[32, 32, 3]`: records of a label and a plane for each colour, in bytes."""
    size = 1 + 3 * _CIFAR_SIDE**2
    if not content or len(content) % size:
        raise ArenaError(f"{where}: expected records of {size} bytes, found {len(content)}")
    for record in np.frombuffer(content, np.uint8).reshape(-1, size):
        label = int(record[0])
        if label >= _IMAGE.num_classes:
            raise ArenaError(
                f"{where}: expected labels from 0 to {_IMAGE.num_classes - 1}, found {label}"
            )
        yield label, record[1:].reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0)


def read_pathfinder(
    task: ArenaTask, source: Path, skipped: list[str], seed: int
) -> Iterator[Example]:
    """Images of the release, divided by a seeded shuffle into 80, 10 and 10 per cent.

    Args:
        task: `pathfinder` or `pathx`.
        source: the release, its folder `pathfinder32` (`pathfinder128`), or the folder
            `curv_contour_length_14` in it.
        skipped: gets the names of empty image files, of which the release has some.
        seed: of the shuffle.

    Raises:
        ArenaError: an image is missing or damaged, or a line of the metadata is none.
    """
    side = round(task.max_tokens**0.5)
    names = ("metadata", _METADATA, f"pathfinder{side}/{_METADATA}")
    rows = []
    for where, path, label in _metadata(_find_in_release(source, *names)):
        if not path.is_file():
            raise ArenaError(f"{where}: the image {path} is missing")
        if path.stat().st_size:
            rows.append((path, label))
        else:
            skipped.append(f"{path}: empty file")
    ranks = np.random.default_rng(seed).permutation(len(rows))
    bounds = (len(rows) * 8 // 10, len(rows) * 9 // 10)
    places = np.searchsorted(bounds, ranks, side="right")
    for (path, label), place in zip(rows, places, strict=True):
        pixels = _decode_image(str(path), path.read_bytes(), "L", side)
        yield Example(("train", "dev", "test")[place], label, (pixels.reshape(-1),))


def _metadata(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Place, image and label of each line of `0.npy`, `1.npy`, ..., which are text files."""
    files = [path for path in folder.iterdir() if re.fullmatch(r"\d+\.npy", path.name)]
    for file in sorted(files, key=lambda path: int(path.stem)):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except UnicodeDecodeError as error:
            raise ArenaError(f"{file}: expected lines of text ({error})") from error
        for number, line in enumerate(lines, start=1):
            where, fields = f"{file}, line {number}", line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ArenaError(
                    f"{where}: expected folder, file, number, label (0 or 1), found {line[:60]!r}"
                )
            yield where, folder.parent / fields[0] / fields[1], int(fields[3])


def load_hub(name: str, advice: str) -> Any:
    """A data set of the Hugging Face hub with all its splits, downloaded or from the local cache.

    Raises:
        ArenaError: it cannot be had; the message ends with `advice`.
    """
    # a second to import, and needed by this kind of source only
    import datasets

    # their own handlers print already: each retry would be there twice
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).propagate = False
    try:
        return datasets.load_dataset(name)
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise ArenaError(f"the hub's {name} cannot be loaded ({error}); {advice}") from error


def _find_in_release(source: Path, *names: str) -> Path:
    """A file or folder of the published release, at one of the paths that it may have."""
    if not source.is_dir():
        raise ArenaError(f"{source}: expected a folder; an archive must be unpacked first")
    places = [source / base / name for base in _RELEASE for name in names]
    found = [place for place in places if place.exists()]
    if not found:
        raise ArenaError(
            f"{source}: expected {' or '.join(names)} in it or in lra_release below it"
        )
    if len(found) > 1:
        ignored = ", ".join(map(str, found[1:]))
        logger.warning("reading %s, not %s; --source chooses", found[0], ignored)
    return found[0]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place for messages, and line, of a file, which may be compressed (`.gz`, `.xz`)."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line.rstrip(b"\r\n")
    except _DAMAGE as error:
        raise ArenaError(f"{path}: cannot be read ({error})") from error


def _fields(where: str, line: bytes, *names: str) -> list[bytes]:
    """Fields of a line of an unquoted TSV file."""
    fields = line.split(b"\t")
    if len(fields) != len(names):
        raise ArenaError(
            f"{where}: expected {len(names)} columns ({', '.join(names)}), found {len(fields)}"
        )
    return fields


def _rows_below_header(path: Path, *columns: str) -> Iterator[tuple[str, list[bytes]]]:
    """Place and fields of each line of an unquoted TSV file that names its columns."""
    lines = _lines(path)
    where, header = next(lines, (str(path), b""))
    if header != "\t".join(columns).encode():
        found = header[:40].decode(errors="replace")
        raise ArenaError(f"{where}: expected the columns {', '.join(columns)}, found {found!r}")
    for where, line in lines:
        yield where, _fields(where, line, *columns)


def _label(where: str, field: bytes, num_classes: int) -> int:
    """A label, also one written as 1.0."""
    text = field.removesuffix(b".0")
    if text.isdigit() and int(text) < num_classes:
        return int(text)
    found = field[:40].decode(errors="replace")
    raise ArenaError(f"{where}: expected a label from 0 to {num_classes - 1}, found {found!r}")


def _records(path: Path, *fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of a file, one per line, that have all fields; `text` is a string."""
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ArenaError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or not set(fields) <= record.keys():
            raise ArenaError(f"{where}: expected an object with {', '.join(fields)}")
        if not isinstance(record["text"], str):
            found = type(record["text"]).__name__
            raise ArenaError(f"{where}: expected a string in text, found {found}")
        yield where, record


def _members(source: Path, pattern: str) -> Iterator[_Member]:
    """Files whose names match, `/` between folders: of an archive, a folder of files, or a folder
    that holds archives, which are read.
    """
    wanted = re.compile(pattern)
    if _is_archive(source):
        yield from _archive_members(source, wanted)
    elif not source.is_dir():
        raise ArenaError(f"{source}: expected a folder or a tar archive")
    elif archives := sorted(filter(_is_archive, source.iterdir())):
        for archive in archives:
            yield from _archive_members(archive, wanted)
    else:
        paths = ((path, path.relative_to(source).as_posix()) for path in source.rglob("*"))
        matches = ((path, wanted.search(name)) for path, name in paths)
        for path, match in sorted((path, match) for path, match in matches if match):
            yield str(path), match, path.read_bytes()


def _is_archive(path: Path) -> bool:
    return bool(re.search(r"\.(tar|tgz|tar\.\w+)$", path.name)) and path.is_file()


def _archive_members(archive: Path, wanted: re.Pattern[str]) -> Iterator[_Member]:
    try:
        with tarfile.open(archive, "r|*") as tar:
            for entry in tar:
                match = wanted.search(entry.name)
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
