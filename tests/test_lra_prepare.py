"""Long Range Arena: prepared tasks on disk, and the command that prepares them."""

import json
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest

from lra.prepare import main, prepare_task
from lra.store import MANIFEST, ArenaError, Example, load_arena_data, write_task
from lra.tasks import COMPARED, TASKS, tasks_named
from ponet.run.cli import UsageError


def drawn(task, per_split, seed=0):
    """Random ragged examples of the splits that the task's source has."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test") if task.dev_from != "source" else ("train", "dev", "test"):
        for _ in range(per_split):
            lengths = rng.integers(1, task.max_tokens, task.num_inputs)
            ids = (rng.integers(1, min(task.vocab_size // 2, 256), n) for n in lengths)
            yield Example(split, int(rng.integers(task.num_classes)), tuple(ids))


def written(folder, examples, **options):
    """The task is named by the folder."""
    return write_task(folder, TASKS[folder.name], examples, **{"source": "random"} | options)


@pytest.fixture
def text_folder(tmp_path):
    return written(tmp_path / "text", drawn(TASKS["text"], 100), source="elsewhere")


@pytest.mark.parametrize("name", TASKS)
def test_what_was_written_is_read_and_equal_sequences_are_stored_once(tmp_path, name):
    task = TASKS[name]
    examples = [*drawn(task, 30), *drawn(task, 1)]
    folder = written(tmp_path / name, examples, skipped=["line 3: empty"])
    data = load_arena_data(name, folder, verify=True)
    assert data.manifest["skipped"] == {"records": 1, "first": ["line 3: empty"]}
    assert data.manifest["sequences"] == len({x.tobytes() for e in examples for x in e.inputs})
    expected, test = [e for e in examples if e.split == "test"], data.test
    assert test.labels.tolist() == [e.label for e in expected]
    for index, example in enumerate(expected):
        for found, ids in zip(test.ids(index), example.inputs, strict=True):
            assert found.dtype.kind == "u"
            np.testing.assert_array_equal(found, ids)
        assert test.lengths[index].tolist() == [len(ids) for ids in example.inputs]
    counts = np.bincount(test.labels, minlength=task.num_classes)
    described = data.manifest["splits"]["test"]
    assert described["label_counts"] == counts.tolist()
    assert test.majority_rate == described["majority_rate"] == counts.max() / 31


def test_text_has_a_published_and_a_clean_development_set(tmp_path, text_folder):
    published = load_arena_data("text", text_folder)
    clean = load_arena_data("text", text_folder, "clean")

    def contents(split):
        return [split.ids(index)[0].tobytes() for index in range(len(split))]

    assert contents(published.dev) == contents(published.test) == contents(clean.test)
    assert len(published.train) == 100
    assert sorted(contents(clean.train) + contents(clean.dev)) == sorted(contents(published.train))
    assert not set(contents(clean.dev)) & set(contents(clean.train))
    for label in (0, 1):
        of_label = (published.train.labels == label).sum()
        assert (clean.dev.labels == label).sum() == round(of_label / 10)
    assert clean.manifest["splits"]["dev"]["examples"] == len(clean.dev)
    # the digest tells examples apart and forgets their origin
    folders = [written(tmp_path / str(n) / "text", drawn(TASKS["text"], 100, n)) for n in (0, 1)]
    same, other = (load_arena_data("text", folder).manifest["digest"] for folder in folders)
    assert clean.manifest["digest"] == published.manifest["digest"] == same != other
    with pytest.raises(ArenaError, match="already exists; delete it"):
        written(text_folder, [])


ONLY = [Example("train", 1, (np.array([5]),))] * 30


def broken():
    yield from ONLY
    raise ArenaError("the tenth line is bad")


@pytest.mark.parametrize(
    ("name", "examples", "message"),
    [
        ("text", broken(), "the tenth line is bad"),
        ("text", drawn(TASKS["text"], 50), r"cannot be written \(\d+ MiB free\): File too"),
        ("text", ONLY, "some place: no example for test"),
        ("listops", ONLY, "no example for test, dev"),
    ],
)
def test_nothing_is_left_of_a_preparation_that_fails(tmp_path, name, examples, message):
    # as on a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises((OSError, ArenaError), match=message):
            written(tmp_path / name, examples, source="some place")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def altered(**entries):
    return rewrite(lambda content: json.dumps(json.loads(content) | entries).encode())


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ids.npy", rewrite(lambda b: b[:-2]), r"ids\.npy: cannot be read .*delete the folder"),
        ("ids.npy", rewrite(lambda b: b + b"x"), r"ids\.npy: other bytes than were written"),
        ("labels.npy", rewrite(lambda b: b[:-1] + bytes([b[-1] ^ 1])), r"labels\.npy: other bytes"),
        (MANIFEST, altered(task="image"), "holds the task image, expected text"),
        (MANIFEST, altered(format_version=0), "format 0, expected 1; delete the folder"),
        (MANIFEST, altered(files={}), "was changed after it was written"),
        (MANIFEST, rewrite(lambda _: b"{}"), "not a readable manifest"),
        (MANIFEST, Path.unlink, r"not a prepared task, manifest\.json is missing"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(text_folder, name, damage, message):
    damage(text_folder / name)
    with pytest.raises(ArenaError, match=message):
        load_arena_data("text", text_folder, verify=True)


LISTOPS = [("listops", None, "1f810d8509e20942"), ("listops", 1, "f421e5d252cce9ee")]


@pytest.mark.parametrize(("name", "seed", "digest"), [*LISTOPS, ("pathx", 0, None)])
def test_generated_tasks(tmp_path, name, seed, digest):
    folder = prepare_task(name, tmp_path, num_examples=64, seed=seed, workers=1)
    data = load_arena_data(name, folder, verify=True)
    assert (data.sizes, data.is_whole) == ((52, 6, 6), False)
    assert data.manifest["source"] == "generated"
    assert digest in (None, data.manifest["digest"])


def test_examples_of_a_former_law_stay_readable_and_are_named(tmp_path, monkeypatch):
    task = replace(TASKS["pathfinder"], split_sizes=(40, 5, 5))
    monkeypatch.setitem(TASKS, "pathfinder", task)
    notes = {2: None, 1: "generated by the former law, distractors placed 3.9 of 5"}
    notes[3] = "generated by law 3"
    digests = set()
    for law, note in notes.items():
        folder = tmp_path / str(law)
        examples = [Example(x.split, x.label, (x.inputs[0] % 256,)) for x in drawn(task, 40)]
        write_task(folder, replace(task, law=law), examples, source="generated")
        if law == 1:
            # as it was before there was another
            manifest = json.loads((folder / MANIFEST).read_bytes())
            del manifest["generator"]
            (folder / MANIFEST).write_text(json.dumps(manifest))
        data = load_arena_data("pathfinder", folder)
        assert data.describe().get("note") == note
        digests.add(data.manifest["digest"])
    assert len(digests) == 3


def test_what_is_prepared_is_kept_and_not_confused(tmp_path):
    text, listops = (partial(prepare_task, name, tmp_path / "data") for name in ("text", "listops"))
    source = tmp_path / "data" / "raw" / "text"
    source.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "label": n % 2} for n in range(40)]
        (source / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = text()
    data = load_arena_data("text", folder)
    assert (len(data.train), data.manifest["source"]) == (40, str(source))
    given = load_arena_data("text", prepare_task("text", tmp_path / "other", source))
    assert given.manifest["digest"] == data.manifest["digest"]
    (source / "train.jsonl").unlink()
    assert text() == text(source) == folder
    assert listops(num_examples=20, workers=1) == listops()
    for prepare, settings, message in (
        (text, {"seed": 3}, "was prepared with seed 0, asked for 3; delete"),
        (text, {"source": tmp_path}, "was prepared with source"),
        (text, {"source": tmp_path / "nowhere"}, "--source .*nowhere: not found; expected aclImdb"),
        (listops, {"num_examples": 30}, "was prepared with num_examples 20, asked for 30"),
    ):
        with pytest.raises(ArenaError, match=message):
            prepare(**settings)


def test_all_tasks_from_the_command_line(tmp_path, monkeypatch, capsys):
    review = {"text": "good", "label": 1}
    reviews = {"train": [review, {"text": "bad", "label": 0}] * 20, "test": [review]}
    # of two data sets the hub has the first
    hub = Mock(side_effect=[reviews, ConnectionError("offline")])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    flags = ["--data-dir", str(tmp_path), "--num-examples", "10", "--workers", "1", "--verify"]
    assert main(["--task", "all", *flags]) == 1
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = {name: x["splits"]["train"]["examples"] for name, x in output["prepared"].items()}
    assert sizes == {"listops": 8, "text": 40, "pathfinder": 8}
    assert set(output["failed"]) == {"retrieval", "image"}
    assert "give --source PATH, or put at" in output["failed"]["retrieval"]
    assert "uoft-cs/cifar10 cannot be loaded" in output["failed"]["image"]
    assert main(["--task", "listops", "text", "--data-dir", str(tmp_path)]) == 0
    # all does not hide what stands beside it
    names = [task.name for task in tasks_named(["all", "pathx", "text"])]
    assert names == [*COMPARED, "pathx"]
    for flag, value in (("--num-examples", "9"), ("--workers", "0"), ("--seed", "-1")):
        with pytest.raises(UsageError, match=f"{flag} must be at least"):
            main(["--task", "listops", flag, value])
