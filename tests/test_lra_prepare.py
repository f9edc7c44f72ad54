"""Long Range Arena: prepared tasks on disk, and the command that prepares them."""

import json
import resource
from pathlib import Path

import datasets
import numpy as np
import pytest

from lra.prepare import main, prepare_task
from lra.store import MANIFEST, ArenaError, Example, draw_tenth, load_arena_data, write_task
from lra.tasks import COMPARED, TASKS, tasks_named


def drawn(task, per_split, seed=0):
    """Random ragged examples of the splits that the task's source has."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test") if task.dev_from != "source" else ("train", "dev", "test"):
        for _ in range(per_split):
            lengths = rng.integers(1, task.max_tokens, task.num_inputs)
            ids = [rng.integers(1, min(task.vocab_size // 2, 256), n) for n in lengths]
            yield Example(split, int(rng.integers(task.num_classes)), tuple(map(np.array, ids)))


def written(folder, examples, source="random"):
    """The task is named by the folder."""
    return write_task(folder, TASKS[folder.name], examples, source=source)


@pytest.fixture
def text_folder(tmp_path):
    return written(tmp_path / "text", drawn(TASKS["text"], 100))


@pytest.mark.parametrize("name", TASKS)
def test_what_was_written_is_read(tmp_path, name):
    task = TASKS[name]
    examples = list(drawn(task, 30))
    folder = write_task(tmp_path / name, task, examples, source="random", skipped=["line 3: empty"])
    data = load_arena_data(name, folder, verify=True)
    assert data.manifest["skipped"] == {"records": 1, "first": ["line 3: empty"]}
    expected = [e for e in examples if e.split == "test"]
    assert len(data.test) == len(expected) == 30
    assert data.test.labels.tolist() == [e.label for e in expected]
    for index, example in enumerate(expected):
        inputs = data.test.ids(index)
        assert len(inputs) == task.num_inputs
        for found, ids in zip(inputs, example.inputs, strict=True):
            assert found.dtype.kind == "u"
            np.testing.assert_array_equal(found, ids)
        assert data.test.lengths[index].tolist() == [len(ids) for ids in example.inputs]
    counts = np.bincount(data.test.labels, minlength=task.num_classes)
    assert data.manifest["splits"]["test"]["label_counts"] == counts.tolist()
    assert data.test.majority_rate == data.manifest["splits"]["test"]["majority_rate"]
    assert data.test.majority_rate == counts.max() / 30


def test_equal_sequences_are_stored_once(tmp_path):
    first, second = np.array([1, 2, 3]), np.array([256])
    inputs = [(first, second), (second, first), (first, first)]
    splits = ("train", "dev", "test")
    examples = [Example(s, 1, pair) for s, pair in zip(splits, inputs, strict=True)]
    data = load_arena_data("retrieval", written(tmp_path / "retrieval", examples))
    assert data.manifest["sequences"] == 2
    assert [ids.tolist() for ids in data.dev.ids(0)] == [[256], [1, 2, 3]]


def test_text_has_a_published_and_a_clean_development_set(text_folder):
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
    assert clean.manifest["digest"] == published.manifest["digest"]
    assert clean.manifest["splits"]["dev"]["examples"] == len(clean.dev)


def test_other_tasks_have_one_development_set(tmp_path):
    folder = written(tmp_path / "image", drawn(TASKS["image"], 200))
    for variant in ("published", "clean"):
        data = load_arena_data("image", folder, variant)
        assert len(data.train) + len(data.dev) == 200
        assert 15 <= len(data.dev) <= 25


def test_a_tenth_is_drawn_of_each_group():
    groups = np.repeat([7, 3, 5], [100, 40, 4])
    chosen = draw_tenth(groups, seed=0)
    assert [int(chosen[groups == g].sum()) for g in (7, 3, 5)] == [10, 4, 1]
    np.testing.assert_array_equal(chosen, draw_tenth(groups, seed=0))
    assert (chosen != draw_tenth(groups, seed=1)).any()


def test_the_digest_tells_examples_apart_and_forgets_their_origin(tmp_path):
    digests = []
    for source, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = written(tmp_path / source / "text", drawn(TASKS["text"], 20, seed), source)
        digests.append(load_arena_data("text", folder).manifest["digest"])
    assert digests[0] == digests[1] != digests[2]


ONLY = [Example("train", 1, (np.array([5]),))] * 30
LARGE = list(drawn(TASKS["text"], 50))


def broken():
    yield from ONLY
    raise ArenaError("the tenth line is bad")


@pytest.mark.parametrize(
    ("name", "examples", "message"),
    [
        ("text", broken(), "the tenth line is bad"),
        ("text", LARGE, r"cannot be written \(\d+ MiB free\): File too large.*text"),
        ("text", ONLY, "some place: no example for test"),
        ("listops", ONLY, "no example for test, dev"),
    ],
)
def test_nothing_is_left_of_a_preparation_that_fails(tmp_path, name, examples, message):
    # as on a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError if "written" in message else ArenaError, match=message):
            written(tmp_path / name, examples, "some place")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def change(**entries):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ids.npy", cut, r"ids\.npy: has .* bytes, expected .*delete the folder"),
        ("ids.npy", Path.unlink, r"ids\.npy: is missing"),
        (
            "labels.npy",
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            r"labels\.npy: damaged",
        ),
        (MANIFEST, change(task="image"), "holds the task image, expected text"),
        (MANIFEST, change(format_version=0), "format 0, expected 1; delete the folder"),
        (MANIFEST, change(files={}), "was changed after it was written"),
        (MANIFEST, lambda path: path.write_text("{}"), "not a readable manifest"),
        (MANIFEST, lambda path: path.write_text('"text"'), "not a readable manifest"),
        (MANIFEST, Path.unlink, r"not a prepared task, manifest\.json is missing"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(text_folder, name, damage, message):
    damage(text_folder / name)
    with pytest.raises(ArenaError, match=message):
        load_arena_data("text", text_folder)


def test_changed_bytes_are_found_when_asked_and_not_written_over(text_folder):
    content = bytearray((text_folder / "ids.npy").read_bytes())
    content[-1] ^= 1
    (text_folder / "ids.npy").write_bytes(content)
    load_arena_data("text", text_folder)
    with pytest.raises(ArenaError, match="already exists; delete it"):
        written(text_folder, ONLY)
    with pytest.raises(ArenaError, match=r"ids\.npy: other bytes than were written"):
        load_arena_data("text", text_folder, verify=True)


@pytest.mark.parametrize(
    ("name", "shortest", "longest"),
    [("listops", 501, 1999), ("pathfinder", 1024, 1024), ("pathx", 16_384, 16_384)],
)
def test_generated_tasks(tmp_path, name, shortest, longest):
    loaded = []
    for number, seed in enumerate((0, None, 1) if name == "listops" else (0,)):
        settings = {"num_examples": 64, "seed": seed, "workers": 1}
        folder = prepare_task(name, tmp_path / str(number), **settings)
        loaded.append(load_arena_data(name, folder, verify=True))
    assert loaded[0].sizes == (52, 6, 6)
    assert loaded[0].train.lengths.min() >= shortest
    assert loaded[0].train.lengths.max() <= longest
    assert loaded[0].manifest["source"] == "generated"
    assert not loaded[0].is_whole
    digests = {data.manifest["digest"] for data in loaded}
    assert len(digests) == (2 if name == "listops" else 1)


def review_source(folder):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "label": n % 2} for n in range(40)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def refused(message, *args, **settings):
    with pytest.raises(ArenaError, match=message):
        prepare_task(*args, **settings)


def test_what_is_prepared_is_kept_and_not_confused(tmp_path):
    source = review_source(tmp_path / "data" / "raw" / "text")
    folder = prepare_task("text", tmp_path / "data")
    data = load_arena_data("text", folder)
    assert (len(data.train), data.manifest["source"]) == (40, str(source))
    given = load_arena_data("text", prepare_task("text", tmp_path / "other", source))
    assert given.manifest["digest"] == data.manifest["digest"]
    (source / "train.jsonl").unlink()
    assert prepare_task("text", tmp_path / "data") == folder
    assert prepare_task("text", tmp_path / "data", source) == folder
    text = "text", tmp_path / "data"
    refused("was prepared with seed 0, asked for 3; delete", *text, seed=3)
    refused("was prepared with source", *text, tmp_path)
    listops = "listops", tmp_path / "data"
    generated = prepare_task(*listops, num_examples=20, workers=1)
    assert prepare_task(*listops) == generated
    refused("was prepared with num_examples 20, asked for 30", *listops, num_examples=30)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    raw = r"give --source PATH, or put at .*raw/retrieval: .*lra_rel"
    refused(raw, "retrieval", tmp_path)
    nowhere = r"--source .*nowhere: not found; expected aclImdb"
    refused(nowhere, "text", tmp_path, tmp_path / "nowhere")
    refused("--task: expected one of listops, text", "audio", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused(r"uoft-cs/cifar10 cannot be loaded .*cifar-10-binary", "image", tmp_path)


def offline(name):
    raise ConnectionError(f"offline, no {name}")


def test_all_tasks_from_the_command_line(tmp_path, monkeypatch, capsys):
    review = {"text": "good", "label": 1}
    reviews = {"train": [review, {"text": "bad", "label": 0}] * 20, "test": [review]}
    hub = {"stanfordnlp/imdb": reviews}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub.get(name) or offline(name))
    flags = ["--data-dir", str(tmp_path), "--num-examples", "10", "--workers", "1", "--verify"]
    assert main(["--task", "all", *flags]) == 1
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(output["prepared"]) == {"listops", "text", "pathfinder"}
    assert set(output["failed"]) == {"retrieval", "image"}
    assert output["prepared"]["pathfinder"]["splits"]["train"]["examples"] == 8
    assert output["prepared"]["text"]["splits"]["train"]["examples"] == 40
    assert main(["--task", "listops", "text", "--data-dir", str(tmp_path)]) == 0
    # all does not hide what stands beside it
    names = [task.name for task in tasks_named(["all", "pathx", "text"])]
    assert names == [*COMPARED, "pathx"]


@pytest.mark.parametrize(
    "flags", [["--num-examples", "9"], ["--workers", "0"], ["--seed", "-1"], ["--task", "audio"]]
)
def test_bad_flags(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--task", "listops", "--data-dir", str(tmp_path), *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
