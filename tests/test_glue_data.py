"""Tasks, their files, and their examples as tokens and batches."""

import gzip
import json
import lzma
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glue import encoding
from glue.data import (
    DataError,
    TextExamples,
    class_counts,
    cut,
    label_names,
    load_task,
    read_hub,
    read_table,
)
from glue.encoding import BatchesOfSimilarLength, ExampleEncoder, batches_of_all, collect_examples
from glue.tasks import TASKS, FileColumns
from ponet import PoNetConfig
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer

WORDS = (*SPECIAL_TOKENS, *"abcdefgh", "one", "two", "three", "##s", ".", ",", "!")
TOKENIZER = bert_tokenizer({word: number for number, word in enumerate(WORDS)})
PAIR = FileColumns(texts=("a", "b"), label="l", index="id")
HEADER = "id\ta\tb\tl\n"
ONE = FileColumns(texts=("t",), label="l")
CPU = torch.device("cpu")


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


def encode(examples: TextExamples, length=20, segments="texts") -> encoding.EncodedExamples:
    return ExampleEncoder(TOKENIZER, max_length=length, segments=segments).encode(examples)


class TestSharedData:
    @pytest.mark.parametrize(
        ("name", "train", "dev", "differences"),
        [
            ("cola", 8551, 1043, 0),
            ("sst2", 67349, 872, 0),
            ("mrpc", 4076 - 408, 408, 2),
            ("stsb", 5749, 1500, 0),
            ("rte", 2490 - 249, 249, 1),
            ("hnd", 516, 64, 0),
        ],
    )
    def test_tasks(self, shared_data, name, train, dev, differences):
        """The files have the rows that their README states."""
        data = load_task(TASKS[name], shared_data)
        (found,) = data.evaluation.values()
        assert (len(data.train), len(found), len(data.differences)) == (train, dev, differences)
        if name == "stsb":
            assert data.train.labels[:3].tolist() == [5.0, 3.8, 3.8]
            assert data.train.texts[1][0] == "An air plane is taking off."
            assert class_counts(data.task, data.train) == "labels from 0 to 5"


class TestReading:
    def test_unquoted_tsv(self, tmp_path):
        """Quotes, other line separators and words that stand for nothing elsewhere are text."""
        lines = '7\t"one\ttwo " three\tyes\n8\tNA\tnull\u2028x\x85y\tno\r\n\n'
        path = written(tmp_path / "x.tsv", f"\ufeff{HEADER}{lines}")
        found = read_table(path, PAIR, ("no", "yes"))
        assert found.texts == (['"one', "NA"], ['two " three', "null\u2028x\x85y"])
        assert (found.labels.tolist(), found.indices) == ([1, 0], ["7", "8"])
        path = written(tmp_path / "y.tsv", "g\t2.5\tone\ng\t0\ttwo\tmore\n")
        found = read_table(path, FileColumns(texts=(2,), label=1), ())
        assert (found.labels.tolist(), found.texts) == ([2.5, 0.0], (["one", "two"],))

    @pytest.mark.parametrize(
        ("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
    )
    def test_quoted_csv(self, tmp_path, ending, pack):
        long = "word " * 40_000
        path = tmp_path / f"x.v1.csv{ending}"
        path.write_bytes(pack(f't,l\n"a ""b"", c\nd",1\n{long},0\n'.encode()))
        assert read_table(path, ONE, ("0", "1")).texts == (['a "b", c\nd', long],)
        path.write_bytes(path.read_bytes()[:16])
        with pytest.raises(DataError, match=r"x\.v1\.csv.*(cannot be read|not a CSV file)"):
            read_table(path, ONE, ("0",))

    def test_labels(self, tmp_path):
        """Names and numbers, each in their order; the ending of a name may be in capitals."""
        lines = [{"t": "x", "l": True, "more": [1]}, {"t": "y", "l": 2}, {"t": "z", "l": "a"}]
        path = written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
        assert label_names(path, ONE) == ("2", "a", "true")
        assert read_table(path, ONE, ("a", "2", "true")).labels.tolist() == [2, 1, 0]
        path = written(tmp_path / "C.TSV", "t\tl\nx\t10.0\nx\t2.0\nx\t1.0\nx\t11.0\n")
        assert label_names(path, ONE) == ("1.0", "2.0", "10.0", "11.0")
        for text, message in (
            ("t,l\nx,1\n", "expected at least two labels in 'l', found \\['1'\\]"),
            ("t,l\nx,1\ny,\nz,0\n", "line 3: the label in column 'l' is empty"),
        ):
            with pytest.raises(DataError, match=message):
                label_names(written(tmp_path / "z.csv", text), ONE)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("x.tsv", "id\ta\tl\n", r"x\.tsv, line 1: no column 'b'; it has id, a, l"),
            ("x.tsv", HEADER, "holds no examples"),
            ("x.tsv", f"{HEADER}1\tx\ty\t2\n", "line 2: expected one of 0, 1 as label, found '2'"),
            ("x.tsv", f"{HEADER}1\tx\ty\n", "line 2: no column 'l'; it has id, a, b"),
            ("x.tsv", f"{HEADER}1\tx\ty\t0\tz\n", "line 2: 5 columns, but 4 in the header"),
            ("x.tsv", f"{HEADER}1\t \ty\t0\n", "line 2: the text in column 'a' is empty"),
            ("x.tsv", "a,b,l\n", "it has a,b,l as one column: separate columns by commas in .csv"),
            ("x.csv", 't,l\n"a,1\n', "not a CSV file"),
            ("x.csv", "t,l\ncaf\udce9,1\n", "cannot be read"),
            ("x.jsonl", '{"t": "x", "l": 1}\n{"t"', "line 2: not a JSON document"),
            ("x.jsonl", "[1]", "expected a JSON object, found list"),
            ("x.jsonl", '{"t": "x", "l": null}', "line 1: no column 'l'; it has t"),
            ("x.xlsx", "", "expected a name that ends in .tsv"),
            ("n.csv", "t,l\nx,nan\n", "line 2: expected a number as label, found 'nan'"),
        ],
    )
    def test_complaints(self, tmp_path, name, text, message):
        columns, labels = PAIR if name == "x.tsv" else ONE, () if name == "n.csv" else ("0", "1")
        with pytest.raises(DataError, match=message):
            read_table(written(tmp_path / name, text), columns, labels)


class TestSources:
    def test_incomplete_rows_are_counted_where_they_are_known(self, tmp_path, caplog):
        folder = tmp_path / "glue" / "QQP"
        header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        good = "1\t1\t2\twhat ?\twho ?\t1\n" * 3
        written(folder / "train.tsv", header + good + "2\t3\t4\thalf\n" + "3\t1\t1\tx\t\t0\n")
        written(folder / "dev.tsv", header + good)
        written(folder / "test.tsv", "id\tquestion1\tquestion2\n9\t\twhy ?\n")
        data = load_task(TASKS["qqp"], tmp_path)
        assert "left out 2 rows" in caplog.text
        short = "train has 3 of 363,846 rows, dev has 3 of 40,430 rows, test has 1 of 390,965 rows"
        assert ", ".join(data.differences) == short
        assert "train.tsv: train has 3 of 363,846 rows: figures do not compare" in caplog.text
        # every row of a submission needs a prediction
        found = data.submissions["QQP"]
        assert (found.texts, found.indices) == (([""], ["why ?"]), ["9"])

    def test_hub(self, tmp_path, monkeypatch):
        """Splits, columns and names of rows of the hub; labels that are kept secret are none."""
        asked = []

        def load(name: str, config: str | None, split: str) -> datasets.Dataset:
            asked.append((name, config, split))
            if config in ("ax", "rte"):
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
        with pytest.raises(DataError, match=r"--task rte has no data: no train\.tsv .*no network"):
            load_task(TASKS["rte"], tmp_path)

    def test_yelp_is_cut_as_published(self, tmp_path):
        """The first tenth to develop on, the last eight to learn from, and the test set."""
        folder = tmp_path / "yelp_review_full_csv"
        for split, size in (("train", 30), ("test", 4)):
            written(
                folder / f"{split}.csv", "".join(f'"{i % 5 + 1}","no {i}"\n' for i in range(size))
            )
        data = load_task(TASKS["yelp5"], tmp_path)
        assert data.evaluation["dev"].texts[0] == ["no 0", "no 1", "no 2"]
        assert data.train.texts[0] == [f"no {i}" for i in range(6, 30)]
        assert data.train.labels.tolist() == [i % 5 for i in range(6, 30)]
        assert data.tests["test"].texts[0] == [f"no {i}" for i in range(4)]
        short = "train has 24 of 520,000 rows, dev has 3 of 65,000 rows, test has 4 of 50,000 rows"
        assert sorted(data.differences) == sorted(short.split(", "))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=300))
def test_each_class_has_its_share_in_a_cut(labels):
    whole = rows([str(i) for i in range(len(labels))], labels=labels)
    train, dev = cut(whole)
    assert len(dev) == max(1, round(len(labels) / 10))
    assert sorted((*train.texts[0], *dev.texts[0])) == sorted(whole.texts[0])
    for part in (train, dev):
        places = [*map(int, part.texts[0])]
        assert places == sorted(places)
        assert part.labels.tolist() == [labels[place] for place in places]
    for label in set(labels):
        share = labels.count(label) * len(dev) / len(labels)
        assert abs(int((dev.labels == label).sum()) - share) <= 1
    with pytest.raises(DataError, match=r"a test: one row"):
        cut(rows(["a"], labels=[0]))


class TestEncoding:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 9), st.integers(0, 9), st.integers(5, 16))
    def test_the_longer_text_of_a_pair_is_cut_first(self, first, second, length):
        kept, room = [first, second], length - 3
        if first + second > room:
            shorter = min(first, second, room // 2)
            kept = [shorter, room - shorter] if first <= second else [room - shorter, shorter]
        encoded = encode(rows(["a " * first], ["b " * second]), length)
        assert encoded.ids.tolist() == [2, *[5] * kept[0], 3, *[6] * kept[1], 3]
        assert encoded.second.tolist() == [kept[0] + 2]
        assert encoded.num_truncated == (kept != [first, second])
        # special tokens in a text are text
        assert 3 not in encode(rows(["a [SEP] b"]), length).ids[1:-1]
        single = encode(rows(["a " * first]), length)
        assert single.ids.tolist() == [2, *[5] * min(first, length - 2), 3]
        assert single.second.tolist() == single.lengths.tolist()

    def test_sentences_and_paragraphs(self):
        one = ["One two three. One two!\n\nThree."]
        pairs = [*one, "a"], ["One! Two!", ""]
        for kind, length, texts, numbers in (
            ("sentences", 20, [one], [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4]),
            ("paragraphs", 20, [one], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]),
            # 3 tokens are left of each text of the first pair
            ("sentences", 9, pairs, [0, 1, 1, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3]),
        ):
            assert encode(rows(*texts), length, kind).segments.tolist() == numbers

    def test_batch(self, monkeypatch):
        # texts reach the tokenizer a few at a time
        monkeypatch.setattr(encoding, "_CHUNK", 2)
        texts = (["a", "One two. Three", ""], ["b", "d", "e"])
        encoded = encode(rows(*texts, labels=[4, 5, 6]), segments="sentences")
        assert encoded.offsets.tolist() == [0, 5, 13, 17]
        config = PoNetConfig(cls_token_id=2, sep_token_id=3)
        batch = collect_examples(encoded, np.array([2, 0]), config).to(CPU)
        assert batch["input_ids"].tolist() == [2, 3, 9, 3, 2, 5, 3, 6, 3]
        assert batch["layout"].cu_seqlens.tolist() == [0, 4, 9]
        assert batch["token_type_ids"].tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]
        # every token is a segment of its own
        assert batch["layout"].cu_segments.tolist() == [*range(10)]
        assert batch["labels"].tolist() == [6, 4]
        without_types = config.replace(type_vocab_size=1)
        batch = collect_examples(encoded, np.array([1]), without_types).to(CPU)
        assert batch.keys() == {"input_ids", "labels", "layout"}
        assert batch["layout"].cu_segments.tolist() == [0, 1, 4, 5, 6, 7, 8]


def test_every_pass_holds_every_example_once():
    lengths = np.random.default_rng(0).integers(1, 50, 103)
    batches = BatchesOfSimilarLength(lengths, 8, seed=3)
    assert batches.per_pass == 13
    first, second = ([batches.indices(t * 13 + i) for i in range(13)] for t in range(2))
    for turn in (first, second):
        assert sorted(np.concatenate(turn).tolist()) == list(range(103))
        assert sorted(map(len, turn)) == [7] + [8] * 12
    assert [x.tolist() for x in first] != [x.tolist() for x in second]
    again = BatchesOfSimilarLength(lengths, 8, seed=3)
    assert again.indices(17).tolist() == second[4].tolist()
    # examples of a batch are of similar length
    assert np.mean([np.ptp(lengths[batch]) for batch in first]) < 10
    # and of all examples, those within so many tokens, padding counted
    batches = batches_of_all(np.array([5, 60, 3, 5, 4, 5]), 15)
    assert [batch.tolist() for batch in batches] == [[2, 4, 0], [3, 5], [1]]
