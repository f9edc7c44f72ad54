"""Long Range Arena: ids by hand, and the readers on small files and on real data."""

import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from unittest.mock import patch

import datasets
import numpy as np
import pytest
from PIL import Image

from lra.sources import encode_bytes, encode_listops, examples_of_hub, grey_levels, read_source
from lra.store import ArenaError
from lra.tasks import TASKS

SPLITS = ("train", "dev", "test")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pack(archive, folder):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def plain(examples):
    """Examples as comparable values."""
    return [(e.split, e.label, *(ids.tolist() for ids in e.inputs)) for e in examples]


def read(name, source, skipped=None, seed=0):
    return plain(read_source(TASKS[name], source, [] if skipped is None else skipped, seed))


def hub(name, rows):
    with patch.object(datasets, "load_dataset", lambda _: rows):
        return plain(examples_of_hub(TASKS[name], ""))


def test_ids_by_hand():
    # in the documented order, without parentheses
    ids = encode_listops("( ( ( [MIN 0 ) ( ( ( [SM 9 ) 4 ) ] ) ) ] )", 100)
    assert ids.tolist() == [11, 1, 14, 10, 5, 15, 15]
    assert encode_listops("[MAX 1 [MED 2 3 ] ]", 100).tolist() == [12, 2, 13, 3, 4, 15, 15]
    assert encode_listops("1 2 3 4", 3).tolist() == [2, 3, 4]
    assert encode_bytes("A\u00e9\n".encode(), 10).tolist() == [66, 0xC4, 0xAA, 11]
    assert encode_bytes(b"\x00\xff", 10).tolist() == [1, 256]
    assert encode_bytes(b"abcd", 3).tolist() == [98, 99, 100]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (10, 20, 30)]
    # rounded down as TensorFlow does: 76.37, 149.98, 29.13, 255.47, 0 and 18.18
    assert grey_levels(np.array(colours, np.uint8)).tolist() == [76, 149, 29, 255, 0, 18]
    for task in TASKS.values():
        used = 15 if task.name == "listops" else {"tokens": 256, "pixels": 255}[task.kind]
        assert used < task.mask_id < task.vocab_size
        assert task.max_tokens <= task.seq_len


@pytest.mark.parametrize("place", [".", "{}", "lra_release/{}", "lra_release/lra_release/{}"])
def test_expressions_and_pairs_are_found_where_the_release_has_them(tmp_path, place):
    content = "Source\tTarget\r\n( ( ( [MIN 4 ) 5 ) ] )\t4\r\n7\t7\r\n"
    for name in ("train", "val", "test"):
        write(tmp_path / place.format("listops-1000") / f"basic_{name}.tsv", content)
    rows = [(4, [11, 5, 6, 15]), (7, [8])]
    assert read("listops", tmp_path) == [(split, *row) for split in SPLITS for row in rows]
    # pairs are unquoted bytes
    content = b'1\tA1\tB1\tsay "a\t\xff"b\n0.0\tA2\tB2\tx\ty\r\n1\tA3\tB3\t\ty\n'
    for name in ("train", "eval", "test"):
        write(tmp_path / place.format("tsv_data") / f"new_aan_pairs.{name}.tsv", content)
    texts, skipped = [(b'say "a', b'\xff"b'), (b"x", b"y")], []
    ids = [[[byte + 1 for byte in text] for text in pair] for pair in texts]
    expected = [(split, label, *ids[1 - label]) for split in SPLITS for label in (1, 0)]
    assert read("retrieval", tmp_path, skipped) == expected
    assert len(skipped) == 3
    assert skipped[0].endswith("new_aan_pairs.train.tsv, line 3: empty text")


REVIEWS = {
    "train/pos/0_9.txt": b"Good <br />",
    "train/neg/0_2.txt": "caf\u00e9".encode(),
    "test/pos/1_8.txt": b"fine",
    "test/neg/1_1.txt": b"x" * 5000,
}


def test_reviews_are_the_same_from_folder_archive_json_and_hub(tmp_path):
    folder, rows, skipped = tmp_path / "aclImdb", {"train": [], "test": []}, []
    for name, content in REVIEWS.items():
        write(folder / name, content)
        split, polarity, _ = name.split("/")
        rows[split].append({"text": content.decode(), "label": int(polarity == "pos")})
    write(folder / "train/unsup/0_0.txt", "no label")
    write(folder / "train/pos/notes.feat", "no review")
    (tmp_path / "json").mkdir()
    for split, opener, suffix in (("train", lzma.open, "xz"), ("test", gzip.open, "gz")):
        with opener(tmp_path / "json" / f"{split}.jsonl.{suffix}", "wb") as file:
            file.write("\n".join(map(json.dumps, rows[split])).encode())
    expected = sorted(read("text", folder, skipped))
    assert len(expected) == 4
    assert ("train", 0, [100, 98, 103, 0xC4, 0xAA]) in expected
    assert ("test", 0, [121] * 4000) in expected
    for source in (pack(tmp_path / "aclImdb_v1.tar.gz", folder), tmp_path / "json"):
        assert sorted(read("text", source, skipped)) == expected
    assert sorted(hub("text", rows)) == expected
    assert skipped == []
    empty = write(folder / "train/neg/7_1.txt", b"")
    assert sorted(read("text", folder, skipped)) == expected
    assert skipped == [f"{empty}: empty text"]


def test_a_collection_keeps_three_files_and_divides_two_between_papers(tmp_path):
    papers = [json.dumps({"id": f"P{n}", "text": f"paper {n}"}) for n in range(101)]
    write(tmp_path / "papers.jsonl.xz", lzma.compress("\n".join(papers).encode()))
    texts = [encode_bytes(f"paper {n}".encode(), 100).tolist() for n in range(101)]
    for name, first, end in (("train", 0, 160), ("val", 160, 180), ("test", 180, 200)):
        lines = [f"{n % 2}\tP{n // 2}\tP{n // 2 + 1}" for n in range(first, end)]
        write(tmp_path / f"pairs.{name}.tsv", "\n".join(["label\tpaper1\tpaper2", *lines]))
    pairs = [(n % 2, texts[n // 2], texts[n // 2 + 1]) for n in range(200)]
    splits = ["train"] * 160 + ["dev"] * 20 + ["test"] * 20
    assert read("retrieval", tmp_path) == [(s, *p) for s, p in zip(splits, pairs, strict=True)]
    (tmp_path / "pairs.test.tsv").unlink()
    divided = read("retrieval", tmp_path)
    assert Counter(split for split, *_ in divided) == {"train": 144, "dev": 16, "test": 20}
    assert sorted(pair for _, *pair in divided) == sorted(map(list, pairs[:180]))
    # no paper cites in two splits
    assert len({(split, bytes(first)) for split, _, first, _ in divided}) == 90


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
CLASSES = [3, 9, 0, 1, 5, 3]


def png(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_cifar_is_the_same_from_batches_images_archives_and_hub(tmp_path):
    expected, rows = [], {"train": [], "test": []}
    for number, (pixels, label) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        split = "train" if number < 5 else "test"
        name = TASKS["image"].class_names[label]
        write(tmp_path / "png" / split / name / f"{number}.png", png(pixels))
        rows[split].append({"img": Image.fromarray(pixels), "label": label})
        expected.append((split, label, grey_levels(pixels).reshape(-1).tolist()))
    batches = tmp_path / "cifar-10-batches-bin"
    parts = {"data_batch_1": [0, 1, 2], "data_batch_2": [3, 4], "test_batch": [5]}
    for name, part in parts.items():
        records = [bytes([CLASSES[n]]) + PIXELS[n].transpose(2, 0, 1).tobytes() for n in part]
        write(batches / f"{name}.bin", b"".join(records))
    write(batches / "batches.meta.txt", b"ignored")
    for source in (batches, pack(tmp_path / "cifar-10-binary.tar.gz", batches)):
        assert read("image", source) == expected
    assert hub("image", rows) == expected
    (tmp_path / "packed").mkdir()
    for split in ("train", "test"):
        pack(tmp_path / "packed" / f"{split}.tar.gz", tmp_path / "png" / split)
    for source in (tmp_path / "png", tmp_path / "packed"):
        assert sorted(read("image", source)) == sorted(expected)


def pathfinder_release(folder, num, side=32):
    """Images whose first pixels spell their number; labels are its last bit."""
    hard = folder / f"pathfinder{side}" / "curv_contour_length_14"
    lines = {"0.npy": [], "10.npy": [], "2.npy": []}
    for number in range(num):
        pixels = np.zeros((side, side), np.uint8)
        pixels[0, :2] = divmod(number, 256)
        place = f"imgs/{number % 3}"
        write(hard / place / f"sample_{number}.png", png(pixels))
        file = list(lines)[number % 3]
        lines[file].append(f"{place} sample_{number}.png {number} {number % 2} 2.0 0.75")
    for name, content in lines.items():
        write(hard / "metadata" / name, "\n".join(content) + "\n")
    return hard


@pytest.mark.parametrize(("name", "side"), [("pathfinder", 32), ("pathx", 128)])
def test_pathfinder_images_divide_into_80_10_10_without_empty_files(tmp_path, name, side):
    release, skipped = tmp_path / "lra_release" / "lra_release", []
    hard = pathfinder_release(release, 301, side)
    empty = write(hard / "imgs/1/sample_1.png", b"")
    examples = read(name, tmp_path, skipped)
    splits, labels, images = zip(*examples, strict=True)
    assert Counter(splits) == {"train": 240, "dev": 30, "test": 30}
    numbers = [pixels[0] * 256 + pixels[1] for pixels in images]
    assert sorted(numbers) == [0, *range(2, 301)]
    assert labels == tuple(number % 2 for number in numbers)
    assert set(map(len, images)) == {side**2}
    for place in (release, hard.parent, hard):
        assert read(name, place, skipped) == examples
    assert skipped == [f"{empty}: empty file"] * 4
    assert read(name, tmp_path, seed=1) != examples


LISTOPS, REVIEW, PAIRS = "basic_train.tsv", "train.jsonl", "new_aan_pairs.train.tsv"
HEADER, PAPERS = "Source\tTarget\n7\t7\n", {"papers.jsonl": '{"id": "P1", "text": "a"}'}
STRANGER = dict.fromkeys(("pairs.train.tsv", "pairs.val.tsv"), "label\tpaper1\tpaper2\n1\tP1\tP9")
METADATA = "metadata/0.npy"
REFUSED = [
    ("listops", {LISTOPS: HEADER + "[MIN 4 5 ]\t10"}, "line 3: .* a label from 0 to 9, found"),
    ("listops", {LISTOPS: HEADER + "[AVG 4 5 ]\t4"}, r"line 3: token '\[AVG'"),
    ("listops", {LISTOPS: HEADER + "( )\t4"}, r"train\.tsv, line 3: the expression is empty"),
    ("listops", {LISTOPS: "4\t[MIN 4 5 ]"}, "line 1: expected the columns Source, Target, found"),
    ("listops", {"other": ""}, r"expected basic_train.tsv or listops-1000"),
    ("text", {REVIEW: '{"text": "a"}'}, "line 1: expected an object with text, label"),
    ("text", {REVIEW: '{"text": null, "label": 1}'}, "expected a string in text, found None"),
    ("text", {REVIEW: "text,label"}, r"train\.jsonl, line 1: not JSON"),
    ("text", {"train.jsonl.xz": b"not xz"}, r"train\.jsonl\.xz: cannot be read"),
    ("text", {"aclImdb_v1.tar.gz": b"no tar"}, r"aclImdb_v1\.tar\.gz: not a readable archive"),
    ("retrieval", {PAIRS: "2\tA\tB\tx\ty"}, "line 1: expected a label from 0 to 1, found '2'"),
    ("retrieval", PAPERS, r"expected pairs\.train\.tsv and pairs\.val\.tsv"),
    ("retrieval", PAPERS | STRANGER, r"train\.tsv, line 2: the paper 'P9' is not in"),
    ("image", {"train/unicorn/1.png": b""}, "unknown class 'unicorn', expected airplane"),
    ("image", {"train/cat/1.png": png(PIXELS[0])[:-400]}, r"1\.png: not a readable image"),
    ("image", {"train/cat/1.png": png(PIXELS[0][:16])}, r"expected .* 32 x 32 .* found 32 x 16"),
    ("image", {"data_batch_1": b"\x80\x02}"}, "a pickle, which could run code; take the binary"),
    ("image", {"test_batch.bin": b"\x01" * 3072}, "expected records of 3073 bytes, found 3072"),
    ("image", {"test_batch.bin": b"\x0a" * 3073}, "expected labels from 0 to 9, found 10"),
    ("pathfinder", {METADATA: "imgs/0 a.png 0 1"}, r"0\.npy, line 1: the image .* missing"),
    ("pathfinder", {METADATA: b"\x93NUMPY"}, r"0\.npy, line 1: expected folder, file, number"),
]


@pytest.mark.parametrize(("task", "files", "message"), REFUSED)
def test_files_that_are_none_of_the_task_are_named(tmp_path, task, files, message):
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ArenaError, match=message):
        read(task, tmp_path)
