"""Labels from a saved model: as the model says, row by row, from files and standard input."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.data import DataError, TextExamples
from glue.model import LabelSpec, load_classifier, save_classifier
from glue.predict import Predictor, main, read_lines
from ponet import CheckpointError, PoNetConfig, PoNetForSequenceClassification, PoolerConfig
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer

WORDS = (*SPECIAL_TOKENS, "one", "two", "three", "four", ".")
IDS = {word: number for number, word in enumerate(WORDS)}
NLI = ("entailment", "neutral", "contradiction")


def saved(folder: Path, labels: tuple[str, ...], num_texts: int, pooler: str = "mha") -> Path:
    """A model folder as a run leaves it, with weights that tell inputs apart."""
    torch.manual_seed(0)
    config = PoNetConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        cls_token_id=IDS["[CLS]"],
        sep_token_id=IDS["[SEP]"],
        initializer_range=0.5,
        num_labels=len(labels) or 1,
        pooler=PoolerConfig(name=pooler, num_layers=2),
    )
    columns = ("a", "b")[:num_texts]
    spec = LabelSpec(
        task="a test", labels=labels, text_columns=columns, max_length=12, segments="texts"
    )
    save_classifier(folder, PoNetForSequenceClassification(config), bert_tokenizer(IDS), spec)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The program in this process: what it leaves on its streams, and its exit status."""
    # handlers of the test run stay
    monkeypatch.setattr("glue.predict.set_up_logging", lambda rank: None)

    def program(*arguments: Any, stdin: bytes = b"") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = 0
        try:
            main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return out, err, status

    return program


def predictor(folder: Path) -> Predictor:
    return Predictor(*load_classifier(folder, torch.device("cpu")))


def examples(*texts: list[str]) -> TextExamples:
    lines = ["\t".join(row) for row in zip(*texts, strict=True)]
    return read_lines(lines, len(texts), "a test")


@torch.inference_mode()
def expected(folder: Path, *texts: str) -> list[float]:
    """Logits of one example, given to the model as rows."""
    model = PoNetForSequenceClassification.from_pretrained(folder)
    ids, types = [IDS["[CLS]"]], [0]
    for number, text in enumerate(texts):
        words = [*(IDS.get(word, IDS["[UNK]"]) for word in text.split()), IDS["[SEP]"]]
        ids += words
        types += [number] * len(words)
    logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
    return logits[0].tolist()


def test_pairs_are_labelled_as_the_model_says(tmp_path: Path):
    folder = saved(tmp_path / "classes", NLI, 2)
    pairs = (["one two", "three"], ["four", "two two one"])
    header, *rows = predictor(folder).table(examples(*pairs))
    assert header == ["label", *(f"p({label})" for label in NLI)]
    for first, second, (label, *shares) in zip(*pairs, rows, strict=True):
        logits = torch.tensor(expected(folder, first, second))
        assert label == NLI[int(logits.argmax())]
        assert [float(x) for x in shares] == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    folder = saved(tmp_path / "numbers", (), 2)
    header, (value,) = predictor(folder).table(examples(["one"], ["two three"]))
    assert header == ["value"]
    assert float(value) == pytest.approx(expected(folder, "one", "two three")[0], abs=1e-4)


@pytest.mark.parametrize("pooler", ["cls", "maxseq_mha", "stochastic"])
def test_predictions_do_not_depend_on_other_rows(tmp_path: Path, pooler: str):
    model = predictor(saved(tmp_path, ("no", "yes"), 1, pooler))
    texts = ["one", "two three four one two three", "four ."] * 3
    together = model.outputs(examples(texts))
    for text, shares in zip(texts, together, strict=True):
        assert model.outputs(examples([text]))[0] == pytest.approx(shares, abs=1e-5)


def test_files_by_column_and_lines_give_the_same(tmp_path: Path, run: Any):
    """A text with a line break is one text in CSV and JSON; other columns are passed over."""
    folder = saved(tmp_path / "model", ("no", "y,es"), 2)
    pairs = [("one two", "thr\u00e9e \u2028 four"), ('two "one"', "four"), ("two\nthree", "one")]
    with (tmp_path / "new.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("a", "id", "b"), *((a, 7, b) for a, b in pairs)])
    lines = [json.dumps({"a": a, "b": b, "label": "no"}) for a, b in pairs]
    (tmp_path / "new.jsonl").write_text("\n".join(lines))
    out, err, status = run("--model", folder, tmp_path / "new.csv")
    assert (err, status) == ("", 0)
    assert run("--model", folder, tmp_path / "new.jsonl")[0] == out
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["label", "p(no)", "p(y,es)"]
    assert len(rows) == 3
    for label, no, yes in rows:
        assert float(no) + float(yes) == pytest.approx(1, abs=1e-3)
        assert label == ("y,es" if float(yes) > float(no) else "no")
    tabbed = "\r\n".join("\t".join(pair) for pair in pairs[:2])
    (tmp_path / "new.txt").write_text(tabbed, encoding="utf-8-sig")
    for arguments, stdin in (([], tabbed.encode()), ([tmp_path / "new.txt"], b"")):
        found = run("--model", folder, *arguments, stdin=stdin)[0]
        assert found.splitlines() == out.splitlines()[:3]
    (tmp_path / "new.tsv").write_text("x\ty\n" + tabbed, encoding="utf-8")
    out = run("--model", folder, tmp_path / "new.tsv", "--text-column", "x", "y")[0]
    assert list(csv.reader(io.StringIO(out))) == [header, *rows[:2]]


def test_many_rows_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("glue.predict._CHUNK", 4)
    texts = [" ".join(["one", "two", "three"][: 1 + n % 3]) for n in range(11)]
    _, *rows = predictor(saved(tmp_path, ("no", "yes"), 1)).table(examples(texts))
    assert len(rows) == 11
    assert rows[:8] == rows[3:]


def test_bad_lines_are_named():
    for lines, num_texts, message in (
        (["a\tb\n", "c\n"], 2, "line 2: expected two texts with a tab between them, found 1"),
        (["a\n", "b\tc\n"], 1, "line 2: expected one text, found 2"),
        (["a\n", "\n"], 1, "line 2: expected one text, found an empty text"),
        (["a\t \n"], 2, "line 1: .*found an empty text"),
    ):
        with pytest.raises(DataError, match=f"x, {message}"):
            read_lines(lines, num_texts, "x")


def test_bad_input_leaves_nothing_on_standard_output(tmp_path: Path, run: Any):
    folder = saved(tmp_path / "model", ("no", "yes"), 1)
    (tmp_path / "x.csv").write_text('a\none\n" "\n')
    for arguments, stdin, message in (
        ([], b"one\n\ntwo\n", "standard input, line 2"),
        ([], b"", "standard input: holds no lines"),
        ([], b"\xff\xfe", "expected UTF-8"),
        ([tmp_path / "absent.csv"], b"", "absent.csv: cannot be read"),
        ([tmp_path / "absent.txt"], b"", "absent.txt"),
        ([tmp_path], b"", f"{tmp_path}: expected a name that ends in .tsv"),
        ([tmp_path / "x.csv"], b"", "x.csv, line 3: the text in column 'a' is empty"),
        ([tmp_path / "x.csv", "--text-column", "t"], b"", "no column 't'; its header has a"),
        (["--model", tmp_path / "nothing"], b"one\n", "nothing/labels.json: no such file"),
    ):
        out, err, status = run("--model", folder, *arguments, stdin=stdin)
        assert (out, status) == ("", 1)
        assert err.startswith("glue/predict.py: error: ")
        assert message in err
    pair = ("--text-column", "a", "b")
    assert "--text-column: expected 1, found 2" in run("--model", folder, "x", *pair)[1]


def test_folders_that_are_no_fine_tuned_model(tmp_path: Path):
    folder = saved(tmp_path, ("no", "yes"), 1)
    path = folder / "labels.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"labels": ["a", "b", "c"]}))
    with pytest.raises(CheckpointError, match="has 2 outputs, expected 3"):
        predictor(folder)
    path.write_text(text)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        predictor(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="expected the model folder of a"):
        predictor(folder)
