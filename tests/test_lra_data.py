"""Long Range Arena: ids by hand, and the readers on small files and on real data."""

import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lra.sources import (
    LISTOPS_TOKENS,
    cifar_of_hub,
    encode_bytes,
    encode_listops,
    grey_levels,
    read_cifar,
    read_listops,
    read_pairs,
    read_pathfinder,
    read_reviews,
    reviews_of_hub,
)
from lra.store import ArenaError
from lra.tasks import TASKS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return path


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


def test_listops_ids_follow_the_documented_order_and_ignore_parentheses():
    ids = encode_listops("( ( ( [MIN 0 ) ( ( ( [SM 9 ) 4 ) ] ) ) ] )", 100)
    assert ids.tolist() == [11, 1, 14, 10, 5, 15, 15]
    assert encode_listops("[MAX 1 [MED 2 3 ] ]", 100).tolist() == [12, 2, 13, 3, 4, 15, 15]
    assert encode_listops("1 2 3 4", 3).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match=r"\[FIRST"):
        encode_listops("[FIRST 1 2 ]", 100)


def test_text_ids_are_bytes_plus_one():
    assert encode_bytes("A\u00e9\n".encode(), 10).tolist() == [66, 0xC4, 0xAA, 11]
    assert encode_bytes(b"\x00\xff", 10).tolist() == [1, 256]
    assert encode_bytes(b"abcd", 3).tolist() == [98, 99, 100]


def test_grey_levels_round_down_as_tensorflow_does():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (10, 20, 30)]
    # 76.37, 149.98, 29.13, 255.47, 0 and 255.5 / 255 * 18.149 = 18.18
    assert grey_levels(np.array(colours, np.uint8)).tolist() == [76, 149, 29, 255, 0, 18]


def test_ids_of_a_task_leave_its_mask_id_free():
    longest = {"tokens": 256, "pixels": 255}
    for task in TASKS.values():
        used = len(LISTOPS_TOKENS) if task.name == "listops" else longest[task.kind]
        assert used < task.mask_id < task.vocab_size
        assert task.max_tokens <= task.seq_len


def listops_release(folder, rows, end="\r\n"):
    """The files of the release, all three with the same rows."""
    text = end.join(["Source\tTarget", *rows, ""])
    for name in ("train", "val", "test"):
        write(folder / f"basic_{name}.tsv", text)


@pytest.mark.parametrize("place", [".", "listops-1000", "lra_release/lra_release/listops-1000"])
def test_listops_files_are_found_where_the_release_has_them(tmp_path, place):
    listops_release(tmp_path / place, ["( ( ( [MIN 4 ) 5 ) ] )\t4", "7\t7"])
    expected = [(s, *row) for s in ("train", "dev", "test") for row in ((4, [11, 5, 6, 15]),)]
    assert [row for row in plain(read_listops(tmp_path)) if row[1] == 4] == expected


def test_real_listops_survive_the_way_through_the_ids(tmp_path):
    with lzma.open(shared("listops/d20s_8k.tsv.xz"), "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    listops_release(tmp_path, [f"{text}\t{label}" for label, text in rows], "\n")
    examples = [e for e in read_listops(tmp_path) if e.split == "dev"]
    assert len(examples) == 8000
    for (label, text), example in zip(rows, examples, strict=True):
        tokens = [LISTOPS_TOKENS[number - 1] for number in example.inputs[0]]
        assert example.label == int(label)
        assert tokens == [token for token in text.split() if token not in "()"]


REVIEWS = {
    "train/pos/0_9.txt": b"Good <br />",
    "train/neg/0_2.txt": "caf\u00e9".encode(),
    "test/pos/1_8.txt": b"fine",
    "test/neg/1_1.txt": b"x" * 5000,
}


@pytest.fixture
def acl_imdb(tmp_path):
    folder = tmp_path / "aclImdb"
    for name, content in REVIEWS.items():
        write(folder / name, content)
    write(folder / "train/unsup/0_0.txt", "no label")
    write(folder / "train/pos/notes.feat", "no review")
    return folder


def test_reviews_are_the_same_from_folder_archive_json_and_hub(acl_imdb, tmp_path):
    rows = {"train": [], "test": []}
    for name, content in REVIEWS.items():
        split, polarity, _ = name.split("/")
        rows[split].append({"text": content.decode(), "label": int(polarity == "pos")})
    for split, opener in (("train", lzma.open), ("test", gzip.open)):
        suffix = "xz" if opener is lzma.open else "gz"
        (tmp_path / "json").mkdir(exist_ok=True)
        with opener(tmp_path / "json" / f"{split}.jsonl.{suffix}", "wb") as file:
            file.write("\n".join(map(json.dumps, rows[split])).encode())
    skipped = []
    expected = sorted(plain(read_reviews(acl_imdb, skipped)))
    assert len(expected) == 4
    assert ("train", 0, [100, 98, 103, 0xC4, 0xAA]) in expected
    assert [len(ids) for split, label, ids in expected if (split, label) == ("test", 0)] == [4000]
    archive = pack(tmp_path / "aclImdb_v1.tar.gz", acl_imdb)
    assert sorted(plain(read_reviews(archive, skipped))) == expected
    assert sorted(plain(read_reviews(tmp_path / "json", skipped))) == expected
    assert sorted(plain(reviews_of_hub(rows, skipped))) == expected
    assert skipped == []


def test_empty_reviews_are_skipped_and_named(acl_imdb):
    write(acl_imdb / "train/neg/7_1.txt", b"")
    skipped = []
    assert len(list(read_reviews(acl_imdb, skipped))) == 4
    assert skipped == [f"{acl_imdb / 'train/neg/7_1.txt'}: empty text"]


def test_real_reviews():
    folder = shared("imdb")
    skipped = []
    counts, longest = Counter(), 0
    for example in read_reviews(folder, skipped):
        counts[example.split, example.label] += 1
        longest = max(longest, len(example.inputs[0]))
    assert counts == {
        ("train", 0): 12_500,
        ("train", 1): 12_500,
        ("test", 0): 11_500,
        ("test", 1): 11_500,
    }
    assert longest == 4000
    assert skipped == []


def pairs_release(folder, rows):
    for name in ("train", "eval", "test"):
        write(folder / f"new_aan_pairs.{name}.tsv", b"".join(rows))


@pytest.mark.parametrize("place", [".", "tsv_data", "lra_release/tsv_data"])
def test_pairs_of_the_release_are_unquoted_bytes(tmp_path, place):
    rows = [b'1\tA1\tB1\tsay "a\t\xff"b\n', b"0.0\tA2\tB2\tx\ty\r\n", b"1\tA3\tB3\t\ty\n"]
    pairs_release(tmp_path / place, rows)
    skipped = []
    examples = plain(read_pairs(tmp_path, skipped, seed=0))
    first = [byte + 1 for byte in b'say "a'], [byte + 1 for byte in b'\xff"b']
    second = [ord("x") + 1], [ord("y") + 1]
    expected = [(s, *r) for s in ("train", "dev", "test") for r in ((1, *first), (0, *second))]
    assert examples == expected
    assert len(skipped) == 3
    assert skipped[0].endswith("new_aan_pairs.train.tsv, line 3: empty text")


def collection(folder, **pairs):
    """Twenty papers, and pairs given as rows."""
    papers = [json.dumps({"id": f"P{n}", "text": f"paper {n}"}) for n in range(20)]
    write(folder / "papers.jsonl", "\n".join(papers))
    for name, rows in pairs.items():
        lines = ["label\tpaper1\tpaper2", *rows, ""]
        write(folder / f"pairs.{name}.tsv", "\n".join(lines))


def test_a_collection_with_three_files_keeps_them(tmp_path):
    collection(tmp_path, train=["1\tP1\tP2"], val=["0\tP3\tP4"], test=["1\tP5\tP6"])
    examples = list(read_pairs(tmp_path, [], seed=0))
    assert [(e.split, e.label) for e in examples] == [("train", 1), ("dev", 0), ("test", 1)]
    texts = [bytes((ids - 1).tolist()).decode() for ids in examples[1].inputs]
    assert texts == ["paper 3", "paper 4"]


def test_real_pairs_divide_between_citing_papers():
    folder = shared("acl-citation-pairs")
    examples = list(read_pairs(folder, [], seed=0))
    by_split = {s: [e for e in examples if e.split == s] for s in ("train", "dev", "test")}
    assert len(by_split["train"]) + len(by_split["dev"]) == 4246
    assert len(by_split["test"]) == 560
    assert 0.05 < len(by_split["dev"]) / 4246 < 0.16
    citing = {s: {e.inputs[0].tobytes() for e in by_split[s]} for s in by_split}
    assert not citing["train"] & citing["dev"]
    assert not (citing["train"] | citing["dev"]) & citing["test"]
    share = np.mean([example.label for example in examples])
    assert 0.48 < share < 0.52


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
CLASSES = [3, 9, 0, 1, 5, 3]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_cifar_is_the_same_from_batches_images_archives_and_hub(tmp_path):
    names = TASKS["image"].class_names
    hub = {"train": [], "test": []}
    for number, (pixels, label) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        split = "train" if number < 5 else "test"
        write(tmp_path / "png" / split / names[label] / f"{number}.png", png(pixels))
        hub[split].append({"img": Image.fromarray(pixels), "label": label})
    batches = tmp_path / "cifar-10-batches-bin"
    for name, rows in (("data_batch_1", [0, 1, 2]), ("data_batch_2", [3, 4]), ("test_batch", [5])):
        records = [bytes([CLASSES[n]]) + PIXELS[n].transpose(2, 0, 1).tobytes() for n in rows]
        write(batches / f"{name}.bin", b"".join(records))
    write(batches / "batches.meta.txt", b"ignored")
    expected = plain(read_cifar(batches))
    assert [(split, label) for split, label, _ in expected] == [
        *(("train", label) for label in CLASSES[:5]),
        ("test", CLASSES[5]),
    ]
    assert expected[1][2] == grey_levels(PIXELS[1]).reshape(-1).tolist()
    archive = pack(tmp_path / "cifar-10-binary.tar.gz", batches)
    assert plain(read_cifar(archive)) == expected
    assert plain(cifar_of_hub(hub)) == expected
    assert sorted(plain(read_cifar(tmp_path / "png"))) == sorted(expected)
    (tmp_path / "packed").mkdir()
    for split in ("train", "test"):
        pack(tmp_path / "packed" / f"{split}.tar.gz", tmp_path / "png" / split)
    assert sorted(plain(read_cifar(tmp_path / "packed"))) == sorted(expected)


def test_real_cifar():
    counts, total, images = Counter(), 0.0, 0
    for example in read_cifar(shared("cifar10/test_9k_jpg.tar.xz")):
        counts[example.split, example.label] += 1
        assert example.inputs[0].shape == (1024,)
        total += example.inputs[0].mean()
        images += 1
    assert counts == {("test", label): 900 for label in range(10)}
    # known means of red, green and blue of the set, weighted
    known = 255 * (0.2989 * 0.4914 + 0.5870 * 0.4822 + 0.1140 * 0.4465)
    assert total / images == pytest.approx(known, rel=0.02)


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


@pytest.mark.parametrize("place", [".", "lra_release/lra_release"])
def test_pathfinder_images_divide_into_80_10_10(tmp_path, place):
    pathfinder_release(tmp_path / place, 300)
    task = TASKS["pathfinder"]
    examples = list(read_pathfinder(task, tmp_path, [], seed=0))
    assert Counter(e.split for e in examples) == {"train": 240, "dev": 30, "test": 30}
    numbers = [int(e.inputs[0][0]) * 256 + int(e.inputs[0][1]) for e in examples]
    assert sorted(numbers) == list(range(300))
    assert all(e.label == n % 2 for e, n in zip(examples, numbers, strict=True))
    assert {len(e.inputs[0]) for e in examples} == {1024}
    again = read_pathfinder(task, tmp_path, [], seed=0)
    assert [e.split for e in again] == [e.split for e in examples]
    other = read_pathfinder(task, tmp_path, [], seed=1)
    assert [e.split for e in other] != [e.split for e in examples]


def test_pathfinder_from_the_folders_in_the_release(tmp_path):
    hard = pathfinder_release(tmp_path, 20, side=128)
    found = [plain(read_pathfinder(TASKS["pathx"], p, [], 0)) for p in (hard, hard.parent)]
    assert found[0] == found[1]
    assert len(found[0]) == 20
    assert {np.size(row[2]) for row in found[0]} == {128 * 128}


def test_empty_image_files_are_skipped_and_named(tmp_path):
    hard = pathfinder_release(tmp_path, 20)
    empty = write(hard / "imgs/1/sample_1.png", b"")
    skipped = []
    assert len(list(read_pathfinder(TASKS["pathfinder"], tmp_path, skipped, 0))) == 19
    assert skipped == [f"{empty}: empty file"]


READERS = {
    "listops": read_listops,
    "text": lambda source: read_reviews(source, []),
    "retrieval": lambda source: read_pairs(source, [], 0),
    "image": read_cifar,
    "pathfinder": lambda source: read_pathfinder(TASKS["pathfinder"], source, [], 0),
}
LISTOPS, REVIEWS_FILE, PAIRS = "basic_train.tsv", "train.jsonl", "new_aan_pairs.train.tsv"
HEADER, PAPERS = "Source\tTarget\n7\t7\n", {"papers.jsonl": '{"id": "P1", "text": "a"}'}
REFUSED = [
    (
        "listops",
        {LISTOPS: HEADER + "[MIN 4 5 ]\t10"},
        "line 3: expected a label from 0 to 9, found",
    ),
    ("listops", {LISTOPS: HEADER + "[MIN 4 5 ]"}, r"line 3: expected 2 columns .*, found 1"),
    ("listops", {LISTOPS: HEADER + "[AVG 4 5 ]\t4"}, r"line 3: token '\[AVG'"),
    ("listops", {LISTOPS: HEADER + "( )\t4"}, r"train\.tsv, line 3: the expression is empty"),
    ("listops", {LISTOPS: "4\t[MIN 4 5 ]"}, "line 1: expected the columns Source, Target, found"),
    ("listops", {"other": ""}, r"expected basic_train.tsv or listops-1000"),
    ("text", {REVIEWS_FILE: '{"text": "a", "label": 2}'}, "line 1: expected a label from 0 to 1"),
    ("text", {REVIEWS_FILE: '{"text": "a"}'}, "line 1: expected an object with text, label"),
    ("text", {REVIEWS_FILE: '{"text": null, "label": 1}'}, "expected a string in text, found None"),
    ("text", {REVIEWS_FILE: "text,label"}, r"train\.jsonl, line 1: not JSON"),
    ("text", {"train.jsonl.xz": b"not xz"}, r"train\.jsonl\.xz: cannot be read"),
    ("text", {"aclImdb_v1.tar.gz": b"no tar"}, r"aclImdb_v1\.tar\.gz: not a readable archive"),
    ("retrieval", {PAIRS: "1\tA\tB\ttext"}, r"train\.tsv, line 1: expected 5 columns .*, found 4"),
    ("retrieval", {PAIRS: "2\tA\tB\tx\ty"}, "line 1: expected a label from 0 to 1, found '2'"),
    ("retrieval", PAPERS, r"expected pairs\.train\.tsv and pairs\.val\.tsv"),
    ("retrieval", PAPERS | {"pairs.train.tsv": "1\tP1\tP2"}, "expected the columns label, paper1"),
    ("image", {"train/unicorn/1.png": b""}, "unknown class 'unicorn', expected airplane"),
    ("image", {"train/cat/1.png": b"nothing"}, r"1\.png: not a readable image"),
    ("image", {"train/cat/1.png": png(PIXELS[0])[:-400]}, r"1\.png: not a readable image"),
    ("image", {"train/cat/1.png": png(PIXELS[0][:16])}, r"expected .* 32 x 32 .* found 32 x 16"),
    ("image", {"data_batch_1": b"\x80\x02}"}, "a pickle, which could run code; take the binary"),
    ("image", {"test_batch.bin": b"\x01" * 3072}, "expected records of 3073 bytes, found 3072"),
    ("image", {"test_batch.bin": b"\x0a" * 3073}, "expected labels from 0 to 9, found 10"),
    ("pathfinder", {"metadata/0.npy": "imgs/0 a.png 0 1"}, r"0\.npy, line 1: the image .* missing"),
    (
        "pathfinder",
        {"metadata/0.npy": "imgs/0 a.png 0 yes"},
        "line 1: expected folder, file, number",
    ),
    ("pathfinder", {"metadata/0.npy": b"\x93NUMPY"}, r"0\.npy: expected lines of text"),
]


@pytest.mark.parametrize(("task", "files", "message"), REFUSED)
def test_files_that_are_none_of_the_task_are_named(tmp_path, task, files, message):
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ArenaError, match=message):
        list(READERS[task](tmp_path))


def test_papers_that_are_not_there_are_named(tmp_path):
    collection(tmp_path, train=["1\tP1\tP99"], val=["1\tP1\tP2"])
    with pytest.raises(ArenaError, match=r"pairs\.train\.tsv, line 2: the paper 'P99' is not in"):
        list(read_pairs(tmp_path, [], seed=0))
