"""Tasks, their files, and their examples as tokens and batches."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from glue import encoding
from glue.data import (
    DataError,
    OwnFiles,
    TextExamples,
    class_counts,
    cut,
    label_names,
    load_own,
    load_task,
    read_hub,
    read_table,
)
from glue.encoding import (
    BatchesOfSimilarLength,
    ExampleEncoder,
    batches_of_all,
    collect_examples,
)
from glue.tasks import NINE_COLUMNS, TASKS, FileColumns, Segments
from ponet import PoNetConfig
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = (*SPECIAL_TOKENS, *"abcdefgh", "one", "two", "three", "##s", ".", ",", "!")
PAIR = FileColumns(file="x.tsv", texts=("a", "b"), label="l", index="id")
HEADER = "id\ta\tb\tl\n"
ONE = FileColumns(file="x.csv", texts=("t",), label="l")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bert_tokenizer({word: number for number, word in enumerate(WORDS)})


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def rows(*texts: list[str], labels: list[int] | None = None) -> TextExamples:
    return TextExamples(
        texts=texts,
        labels=None if labels is None else np.array(labels),
        indices=[str(i) for i in range(len(texts[0]))],
        columns=("text",),
        origin="a test",
    )


def own(train: Path, texts: tuple[str, ...], label: str, test: Path | None = None) -> OwnFiles:
    return OwnFiles(train=train, dev=None, test=test, texts=texts, label=label, is_regression=False)


def encoder(tokenizer: Tokenizer, max_length: int = 20, segments: Segments = "texts") -> Any:
    return ExampleEncoder(tokenizer, max_length=max_length, segments=segments)


@pytest.fixture
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("no data beside this checkout")
    return DATA


@pytest.mark.parametrize(
    ("name", "train", "dev", "differences"),
    [
        ("cola", 8551, 1043, 0),
        ("sst2", 67349, 872, 0),
        ("mrpc", 4076 - 408, 408, 2),
        ("stsb", 5749, 1500, 0),
        ("rte", 2490 - 249, 249, 1),
        ("wnli", 635, 71, 0),
        ("hnd", 516, 64, 0),
    ],
)
def test_shared_tasks(shared_data, name, train, dev, differences):
    """The files beside this checkout have the rows that their README states."""
    data = load_task(TASKS[name], shared_data)
    (found,) = data.evaluation.values()
    assert (len(data.train), len(found)) == (train, dev)
    assert len(data.differences) == differences


@pytest.mark.parametrize(
    ("path", "texts", "label", "rows", "counts"),
    [
        ("QNLI/dev_part1.tsv", ("question", "sentence"), "label", 4000, [1991, 2009]),
        ("QQP/dev_subset.tsv", ("question1", "question2"), "is_duplicate", 20000, [12577, 7423]),
        ("MNLI/mnli_train_20k.tsv", ("sentence1", "sentence2"), "label", 20000, None),
        ("../yelp5/dev_5000.csv.xz", ("text",), "label2", 5000, None),
    ],
)
def test_shared_files_as_own_tasks(shared_data, path, texts, label, rows, counts):
    """Parts of official sets load by the names of their columns; a cut keeps the label shares."""
    file = shared_data / "glue" / path
    data = load_own("part", own(file, texts, label))
    train, dev = data.train.labels, data.evaluation["dev"].labels
    assert (len(train), len(dev)) == (rows - rows // 10, rows // 10)
    whole = np.bincount(np.concatenate([train, dev]))
    assert counts is None or whole.tolist() == counts
    # a cut that is left to chance had 5 points more of one class in MRPC
    assert np.abs(np.bincount(dev) - whole / 10).max() < 1


def test_shared_similarities(shared_data):
    data = load_task(TASKS["stsb"], shared_data)
    labels = data.train.labels
    assert (labels.dtype, labels.min(), labels.max()) == (np.float64, 0.0, 5.0)
    assert labels[:3].tolist() == [5.0, 3.8, 3.8]
    assert data.train.texts[1][0] == "An air plane is taking off."
    assert class_counts(data.task, data.train) == "labels from 0 to 5"


def test_every_task_is_whole():
    official = "cola sst2 mrpc stsb qqp mnli qnli rte wnli ax"
    assert set(TASKS) == {*official.split(), "hnd", "imdb", "yelp5", "arxiv11"}
    assert len(NINE_COLUMNS) == 9
    submitted = {name for task in TASKS.values() for name in task.submissions}
    assert submitted == set("CoLA SST-2 MRPC STS-B MNLI-m MNLI-mm QNLI QQP RTE WNLI AX".split())
    for task in TASKS.values():
        for files in task.files:
            assert set(task.evaluation) & set(files.splits) or "train" in files.splits
        assert (task.max_length == 4096) == (task.segments != "texts")


class TestReading:
    def test_unquoted_tsv(self, tmp_path):
        """Quotes, other line separators and words that stand for nothing elsewhere are text."""
        lines = '7\t"one\ttwo " three\tyes\n8\tNA\tnull\u2028x\x85y\tno\r\n\n'
        path = written(tmp_path / "x.tsv", f"\ufeff{HEADER}{lines}")
        found = read_table(path, PAIR, ("no", "yes"))
        assert found.texts == (['"one', "NA"], ['two " three', "null\u2028x\x85y"])
        assert (found.labels.tolist(), found.indices) == ([1, 0], ["7", "8"])

    def test_quoted_csv(self, tmp_path):
        long = "word " * 40_000
        path = written(tmp_path / "x.csv", f't,l\n"a ""b"", c\nd",1\n{long},0\n')
        assert read_table(path, ONE, ("0", "1")).texts == (['a "b", c\nd', long],)

    def test_labels(self, tmp_path):
        """Names and numbers, each in their order; the ending of a name may be in capitals."""
        lines = [{"t": "x", "l": True, "more": [1]}, {"t": "y", "l": 2}, {"t": "z", "l": "a"}]
        path = written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
        assert label_names(path, ONE) == ("2", "a", "true")
        assert read_table(path, ONE, ("a", "2", "true")).labels.tolist() == [2, 1, 0]
        path = written(tmp_path / "C.TSV", "t\tl\nx\t10.0\nx\t2.0\nx\t1.0\nx\t11.0\n")
        assert label_names(path, ONE) == ("1.0", "2.0", "10.0", "11.0")
        with pytest.raises(DataError, match="expected a number as label, found 'nan'"):
            read_table(written(tmp_path / "y.csv", "t,l\nx,nan\n"), ONE, ())
        with pytest.raises(DataError, match="at least two labels in 'l', found \\['1'\\]"):
            label_names(written(tmp_path / "z.csv", "t,l\nx,1\n"), ONE)

    @pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
    def test_compressed(self, tmp_path, ending, pack):
        path = tmp_path / f"x.v1.csv{ending}"
        path.write_bytes(pack(b"t,l\nhello,0\n"))
        assert read_table(path, ONE, ("0",)).texts == (["hello"],)
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(DataError, match=r"x\.v1\.csv.*cannot be read"):
            read_table(path, ONE, ("0",))

    def test_columns_by_place_and_a_number(self, tmp_path):
        path = written(tmp_path / "x.tsv", "g\t2.5\tone\ng\t0\ttwo\tmore\n")
        found = read_table(path, FileColumns(file="x.tsv", texts=(2,), label=1), ())
        assert (found.labels.tolist(), found.texts) == ([2.5, 0.0], (["one", "two"],))

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("x.tsv", "id\ta\tl\n", r"x\.tsv: no column 'b'; its header has id, a, l"),
            ("x.tsv", "", r"no column 'a'; its header has nothing"),
            ("x.tsv", HEADER, "holds no examples"),
            ("x.tsv", f"{HEADER}1\tx\ty\t2\n", "line 2: unknown label '2', expected one of 0, 1"),
            ("x.tsv", f"{HEADER}1\tx\ty\n", "line 2: no column 'l'; it has id, a, b"),
            ("x.tsv", f"{HEADER}1\tx\ty\t0\tz\n", "line 2: 5 columns, but 4 in the header"),
            (
                "x.tsv",
                f"{HEADER}1\tx\ty\t0\n2\t \ty\t0\n",
                "line 3: the text in column 'a' is empty",
            ),
            ("x.csv", 't,l\n"a,1\n', "not a CSV file"),
            ("x.csv", "t,l\ncaf\udce9,1\n", "cannot be read"),
            ("x.jsonl", '{"t": "x", "l": 1}\n{"t"', "line 2: not a JSON document"),
            ("x.jsonl", "[1]", "expected a JSON object, found list"),
            ("x.jsonl", '{"t": "x", "l": null}', "line 1: no column 'l'; it has t"),
            ("x.xlsx", "", "expected a name that ends in .tsv"),
        ],
    )
    def test_complaints(self, tmp_path, name, text, message):
        columns = PAIR if name == "x.tsv" else ONE
        with pytest.raises(DataError, match=message):
            read_table(written(tmp_path / name, text), columns, ("0", "1"))

    def test_empty_labels_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="line 3: the label in column 'l' is empty"):
            label_names(written(tmp_path / "e.csv", "t,l\nx,1\ny,\nz,0\n"), ONE)

    def test_incomplete_rows_are_counted_where_they_are_known(self, tmp_path, caplog):
        folder = tmp_path / "QQP"
        header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        good = "1\t1\t2\twhat ?\twho ?\t1\n" * 3
        written(folder / "train.tsv", header + good + "2\t3\t4\thalf\n" + "3\t1\t1\tx\t\t0\n")
        written(folder / "dev.tsv", header + good)
        written(folder / "test.tsv", "id\tquestion1\tquestion2\n9\t\twhy ?\n")
        data = load_task(TASKS["qqp"], tmp_path)
        assert len(data.train) == 3
        assert "left out 2 rows" in caplog.text
        # every row of a submission needs a prediction
        found = data.submissions["QQP"]
        assert (found.texts, found.indices) == (([""], ["why ?"]), ["9"])


class TestSources:
    def test_counts_are_compared_with_the_published_ones(self, tmp_path, caplog):
        for split, size in (("train", 4), ("dev", 2)):
            written(tmp_path / "CoLA" / f"{split}.tsv", "gj04\t1\t\tThat is so.\n" * size)
        written(tmp_path / "CoLA" / "test.tsv", "index\tsentence\n0\tIs it ?\n")
        found = ", ".join(load_task(TASKS["cola"], tmp_path).differences)
        expected = "train has 4 of 8,551 rows, dev has 2 of 1,043 rows, test has 1 of 1,063 rows"
        assert found == expected
        assert "train.tsv: train has 4 of 8,551 rows: figures do not compare" in caplog.text

    def test_cut_is_the_same_every_time(self, tmp_path):
        lines = "".join(f"{i}\tpremise {i}\thypothesis\tentailment\n" for i in range(50))
        header = "index\tsentence1\tsentence2\tlabel\n"
        written(tmp_path / "glue" / "RTE" / "train.tsv", header + lines)
        first, second = (load_task(TASKS["rte"], tmp_path) for _ in range(2))
        assert first.digest == second.digest
        assert (len(first.train), len(first.evaluation["dev"])) == (45, 5)
        both = first.train.texts[0] + first.evaluation["dev"].texts[0]
        assert sorted(both) == sorted(f"premise {i}" for i in range(50))

    def test_reviews_by_place_in_quoted_files(self, tmp_path):
        for split in ("train", "test"):
            file = tmp_path / "yelp_review_full_csv" / f"{split}.csv"
            written(file, '"5","So ""good"".\\nYes"\n"1","Bad, bad"\n')
        data = load_task(TASKS["yelp5"], tmp_path)
        assert data.train.texts == (['So "good".\\nYes', "Bad, bad"],)
        assert data.train.labels.tolist() == [4, 0]
        assert "train has 2 of 650,000 rows" in data.differences

    def test_no_data(self, tmp_path):
        for task, message in (
            ("hnd", r"expected train\.jsonl in"),
            ("rte", r"no train\.tsv .*the hub"),
        ):
            with pytest.raises(DataError, match=f"--task {task} has no data: {message}"):
                load_task(TASKS[task], tmp_path)

    def test_hub(self, tmp_path, monkeypatch):
        """Splits, columns and names of rows of the hub; labels that are kept secret are none."""
        asked = []

        def load(name: str, config: str | None, split: str) -> datasets.Dataset:
            asked.append((name, config, split))
            if config == "ax":
                raise ConnectionError("no network")
            size = {"train": 30, "test_matched": 2}.get(split, 4)
            label = -1 if split.startswith("test") else 2
            row = {"premise": "p", "hypothesis": "h", "label": label}
            return datasets.Dataset.from_list([row | {"idx": i + 5} for i in range(size)])

        monkeypatch.setattr(datasets, "load_dataset", load)
        data = load_task(TASKS["mnli"], tmp_path)
        assert ("nyu-mll/glue", "mnli", "validation_mismatched") in asked
        assert data.train.labels.tolist() == [2] * 30
        assert set(data.evaluation) == {"matched", "mismatched"}
        found = data.submissions["MNLI-m"]
        assert (found.labels, found.indices) == (None, ["5", "6"])
        assert "train has 30 of 392,702 rows" in data.differences
        with pytest.raises(DataError, match=r"mnli.*expected labels from 0 to 1, found 2 to 2"):
            read_hub(TASKS["mnli"].hub, "train", ("0", "1"))

    def test_own_files(self, tmp_path):
        lines = "".join(f"good thing {i},so,fine\nbad thing {i},so,poor\n" for i in range(10))
        train = written(tmp_path / "mine.csv", "x,y,z\n" + lines)
        test = written(tmp_path / "test.csv", "y,x\nso,what\n")
        data = load_own("mine", own(train, ("x", "y"), "z", test))
        assert data.task.labels == ("fine", "poor")
        assert data.task.metrics == ("accuracy", "f1")
        assert (len(data.train), len(data.evaluation["dev"])) == (18, 2)
        found = data.submissions["mine"]
        assert (found.texts, found.labels) == ((["what"], ["so"]), None)


class TestCut:
    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.integers(0, 3), min_size=2, max_size=300))
    def test_each_class_has_its_share(self, labels):
        whole = rows([str(i) for i in range(len(labels))], labels=labels)
        train, dev = cut(whole)
        assert len(dev) == max(1, round(len(labels) / 10))
        assert sorted((*train.texts[0], *dev.texts[0])) == sorted(whole.texts[0])
        for part in (train, dev):
            places = [int(text) for text in part.texts[0]]
            assert places == sorted(places)
            assert part.labels.tolist() == [labels[place] for place in places]
        for label in set(labels):
            share = labels.count(label) * len(dev) / len(labels)
            assert abs(int((dev.labels == label).sum()) - share) <= 1

    def test_one_row(self):
        with pytest.raises(DataError, match=r"a test: one row"):
            cut(rows(["a"], labels=[0]))


class TestEncoding:
    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_pairs_equal_the_library(self, data):
        """Ids, token types and cutting are those of the tokenizer's own template."""
        tokenizer = bert_tokenizer({word: number for number, word in enumerate(WORDS)})
        text = st.lists(st.sampled_from(["a", "bs", "One", "zz", "two,"]), max_size=9)
        first, second = (" ".join(data.draw(text)) for _ in range(2))
        length = data.draw(st.integers(5, 16))
        tokenizer.enable_truncation(length, strategy="longest_first")
        expected = tokenizer.encode(first, second)
        encode = encoder(tokenizer, length).encode
        encoded = encode(rows([first], [second]))
        assert encoded.ids.tolist() == expected.ids
        types = np.arange(len(encoded.ids)) >= encoded.second[0]
        assert types.tolist() == [bool(kind) for kind in expected.type_ids]
        single = encode(rows([first]))
        assert single.ids.tolist() == tokenizer.encode(first).ids
        assert single.second.tolist() == single.lengths.tolist()

    def test_special_tokens_in_text_are_text(self, tokenizer):
        assert 3 not in encoder(tokenizer).encode(rows(["a [SEP] b"])).ids[1:-1]

    def test_sentences_and_paragraphs(self, tokenizer):
        one = ["One two three. One two!\n\nThree."]
        pairs = [*one, "a"], ["One! Two!", ""]
        for kind, length, texts, numbers in (
            ("sentences", 20, [one], [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4]),
            ("paragraphs", 20, [one], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]),
            # 3 tokens are left of each text of the first pair
            ("sentences", 9, pairs, [0, 1, 1, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3]),
        ):
            encoded = encoder(tokenizer, length, kind).encode(rows(*texts))
            assert encoded.segments.tolist() == numbers

    def test_texts_are_encoded_a_few_at_a_time(self, tokenizer, monkeypatch):
        texts = rows(list("abcde"), ["one", "two one", "", "three", "two"])
        whole = encoder(tokenizer).encode(texts)
        monkeypatch.setattr(encoding, "_CHUNK", 2)
        parts = encoder(tokenizer).encode(texts)
        assert parts.ids.tolist() == whole.ids.tolist()
        assert parts.offsets.tolist() == whole.offsets.tolist() == [0, 5, 11, 15, 20, 25]

    def test_batch(self, tokenizer):
        texts = (["a", "One two. Three", ""], ["b", "d", "e"])
        encoded = encoder(tokenizer, segments="sentences").encode(rows(*texts, labels=[4, 5, 6]))
        config = PoNetConfig(cls_token_id=2, sep_token_id=3)
        batch = collect_examples(encoded, np.array([2, 0]), config).to(torch.device("cpu"))
        assert batch["input_ids"].tolist() == [2, 3, 9, 3, 2, 5, 3, 6, 3]
        assert batch["layout"].cu_seqlens.tolist() == [0, 4, 9]
        assert batch["token_type_ids"].tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]
        # every token is a segment of its own
        assert batch["layout"].cu_segments.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert batch["labels"].tolist() == [6, 4]
        two_sentences = collect_examples(encoded, np.array([1]), config.replace(type_vocab_size=1))
        batch = two_sentences.to(torch.device("cpu"))
        assert batch.keys() == {"input_ids", "labels", "layout"}
        assert batch["layout"].cu_segments.tolist() == [0, 1, 4, 5, 6, 7, 8]


class TestBatches:
    def test_every_pass_holds_every_example_once(self):
        lengths = np.random.default_rng(0).integers(1, 50, 103)
        batches = BatchesOfSimilarLength(lengths, 8, seed=3)
        assert batches.per_pass == 13
        passes = [[batches.indices(t * 13 + i) for i in range(13)] for t in range(2)]
        for turn in passes:
            assert sorted(np.concatenate(turn).tolist()) == list(range(103))
            assert sorted(map(len, turn)) == [7] + [8] * 12
        assert [x.tolist() for x in passes[0]] != [x.tolist() for x in passes[1]]
        again = BatchesOfSimilarLength(lengths, 8, seed=3)
        assert again.indices(17).tolist() == passes[1][4].tolist()
        # examples of a batch are of similar length
        spread = np.mean([np.ptp(lengths[batch]) for batch in passes[0]])
        assert spread < 10

    def test_all_rows_within_a_budget(self):
        lengths = np.array([5, 60, 3, 5, 4, 5])
        batches = batches_of_all(lengths, 15)
        assert [batch.tolist() for batch in batches] == [[2, 4, 0], [3, 5], [1]]
