"""Labels from a saved model: as the model says, row by row, from files and standard input."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.model import LabelSpec, save_classifier
from glue.predict import main
from ponet import PoNetForSequenceClassification, PoolerConfig
from ponet.tokenizer import bert_tokenizer
from tests.tiny import IDS, TINY

NLI = ("entailment", "neutral", "contradiction")


def saved(folder: Path, labels: tuple[str, ...], num_texts: int, pooler: str = "cls") -> Path:
    """A model folder as a run leaves it, with weights that tell inputs apart."""
    torch.manual_seed(0)
    weights = {"initializer_range": 0.5, "num_labels": len(labels) or 1}
    config = TINY.replace(pooler=PoolerConfig(name=pooler, num_layers=2), **weights)
    texts = {"text_columns": ("a", "b")[:num_texts], "max_length": 12, "segments": "texts"}
    spec = LabelSpec(task="a test", labels=labels, **texts)
    save_classifier(folder, PoNetForSequenceClassification(config), bert_tokenizer(IDS), spec)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """The program in this process: what it leaves on its streams, and its exit status."""
    monkeypatch.chdir(tmp_path)
    # handlers of the test run stay
    monkeypatch.setattr("glue.predict.set_up_logging", lambda rank: None)

    def program(arguments: str, stdin: bytes = b"") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = 0
        try:
            main(["--device", "cpu", *arguments.split()])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return *capsys.readouterr(), status

    return program


@torch.inference_mode()
def expected(folder: Path, *texts: str) -> torch.Tensor:
    """Logits of one example, given to the model as rows."""
    model = PoNetForSequenceClassification.from_pretrained(folder)
    ids, types = [IDS["[CLS]"]], [0]
    for number, text in enumerate(texts):
        words = [*(IDS.get(word, IDS["[UNK]"]) for word in text.split()), IDS["[SEP]"]]
        ids += words
        types += [number] * len(words)
    return model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0]


@pytest.mark.parametrize("pooler", ["cls", "maxseq_mha", "stochastic"])
def test_pairs_are_labelled_as_the_model_says(run: Any, monkeypatch: Any, pooler: str):
    """Of each alone, in their order, however many are read at a time."""
    monkeypatch.setattr("glue.predict._CHUNK", 2)
    folder = saved(Path("classes"), NLI, 2, pooler)
    lines = ["one two\tfour", "three\ttwo two one", "two\tfour . three"]
    header, *rows = csv.reader(run("--model classes", "\n".join(lines).encode())[0].splitlines())
    assert header == ["label", *(f"p({label})" for label in NLI)]
    for line, (label, *shares) in zip(lines, rows, strict=True):
        logits = expected(folder, *line.split("\t"))
        assert label == NLI[int(logits.argmax())]
        assert [float(x) for x in shares] == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    folder = saved(Path("numbers"), (), 2, pooler)
    header, value = run("--model numbers", b"one\ttwo three")[0].splitlines()
    assert header == "value"
    assert float(value) == pytest.approx(float(expected(folder, "one", "two three")), abs=1e-4)


def test_files_by_column_and_lines_give_the_same(run: Any):
    """A text with a line break is one text in CSV and JSON; other columns are passed over."""
    saved(Path("model"), ("no", "y,es"), 2)
    pairs = [("one two", "thr\u00e9e \u2028 four"), ('two "one"', "four"), ("two\nthree", "one")]
    with Path("new.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("a", "id", "b"), *((a, 7, b) for a, b in pairs)])
    lines = [json.dumps({"a": a, "b": b, "label": "no"}) for a, b in pairs]
    Path("new.jsonl").write_text("\n".join(lines))
    out, err, status = run("--model model new.csv")
    assert (err, status) == ("", 0)
    assert run("--model model new.jsonl")[0] == out
    header, *rows = csv.reader(io.StringIO(out))
    assert (header, len(rows)) == (["label", "p(no)", "p(y,es)"], 3)
    for label, no, yes in rows:
        assert float(no) + float(yes) == pytest.approx(1, abs=1e-3)
        assert label == ("y,es" if float(yes) > float(no) else "no")
    tabbed = "\r\n".join("\t".join(pair) for pair in pairs[:2])
    Path("new.txt").write_text(tabbed, encoding="utf-8-sig")
    Path("new.tsv").write_text("x\ty\n" + tabbed, encoding="utf-8")
    for arguments in ("", "new.txt", "new.tsv --text-column x y"):
        found = run(f"--model model {arguments}", stdin=tabbed.encode())[0]
        assert found.splitlines() == out.splitlines()[:3]


@pytest.mark.parametrize(
    ("num_texts", "arguments", "stdin", "message"),
    [
        (1, "", b"one\n\ntwo\n", "standard input, line 2: expected one text, found an empty text"),
        (1, "", b"a\nb\tc\n", "line 2: expected one text, found 2"),
        (2, "", b"a\tb\nc\n", "line 2: expected two texts with a tab between them, found 1"),
        (1, "", b"", "standard input: holds no lines"),
        (1, "", b"\xff\xfe", "expected UTF-8"),
        (1, "absent.csv", b"", "absent.csv: cannot be read"),
        (1, "run", b"", "run: expected a name that ends in .tsv"),
        (1, "x.csv", b"", "x.csv, line 3: the text in column 'a' is empty"),
        (1, "x.csv --text-column t", b"", "no column 't'; it has a (see --text-column)"),
        (1, "x --text-column a b", b"", "--text-column: expected 1, found 2"),
        (1, "--model nothing", b"one\n", "nothing/labels.json: no such file; expected the model"),
        (1, "--model run", b"one\n", "run: the folder of a run; its model is in run/model"),
        (1, "--model three", b"one\n", "three: the model has 2 outputs, expected 3 for"),
        (1, "--model damaged", b"one\n", "damaged/labels.json: damaged"),
        (1, "--model bare", b"one\n", "bare: no tokenizer.json"),
    ],
)
def test_bad_input_leaves_nothing_on_standard_output(run, num_texts, arguments, stdin, message):
    model = saved(Path("run/model"), ("no", "yes"), num_texts)
    for name in ("three", "damaged", "bare"):
        shutil.copytree(model, name)
    labels = Path("three/labels.json").read_text()
    Path("three/labels.json").write_text(labels.replace('"yes"', '"yes", "maybe"'))
    Path("damaged/labels.json").write_text(labels[:9])
    Path("bare/tokenizer.json").unlink()
    Path("x.csv").write_text('a\none\n" "\n')
    out, err, status = run(f"--model run/model {arguments}", stdin=stdin)
    assert (out, status) == ("", 2 if message.startswith("--") else 1)
    assert err.startswith("glue/predict.py: error: ")
    assert message in err
