"""Labels from a saved model: as the model says, line by line, from files and standard input."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glue.model_folder import Meaning, save_model
from glue.predict import Predictor, main, output_lines, read_texts
from glue.rows import DataError
from ponet import CheckpointError, PoNetConfig, PoNetForSequenceClassification, PoolerConfig
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PREDICT = str(ROOT / "glue" / "predict.py")
WORDS = (*SPECIAL_TOKENS, "one", "two", "three", "four", ".")
IDS = {word: number for number, word in enumerate(WORDS)}
CPU = torch.device("cpu")
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
    meaning = Meaning(
        task="a test", labels=labels, num_texts=num_texts, max_length=12, segments="texts"
    )
    model = PoNetForSequenceClassification(config)
    save_model(folder, model, bert_tokenizer(IDS), meaning)
    return folder


class Program:
    """The program in this process: what it leaves on its streams, and its exit status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        # handlers of the test run stay
        monkeypatch.setattr("glue.predict.set_up_logging", lambda rank: None)

    def __call__(self, *arguments: str, stdin: bytes = b"") -> tuple[str, str, int]:
        self._monkeypatch.setattr(sys, "argv", ["predict.py", "--device", "cpu", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = self._capsys.readouterr()
        return out, err, status


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(monkeypatch, capsys)


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
    folder = saved(tmp_path, NLI, 2)
    pairs = (["one two", "three"], ["four", "two two one"])
    predictions = Predictor.from_folder(folder, CPU).predict(pairs)
    for number, prediction in enumerate(predictions):
        logits = torch.tensor(expected(folder, pairs[0][number], pairs[1][number]))
        assert prediction["label"] == NLI[int(logits.argmax())]
        found = [prediction["probabilities"][label] for label in NLI]
        assert found == pytest.approx(logits.softmax(0).tolist(), abs=1e-6)


@pytest.mark.parametrize("pooler", ["cls", "maxseq_mha", "stochastic"])
def test_predictions_do_not_depend_on_other_lines(tmp_path: Path, pooler: str):
    folder = saved(tmp_path, ("no", "yes"), 1, pooler)
    predictor = Predictor.from_folder(folder, CPU)
    texts = ["one", "two three four one two three", "four ."] * 3
    together = predictor.predict((texts,))
    for text, prediction in zip(texts, together, strict=True):
        (alone,) = predictor.predict(([text],))
        assert alone["label"] == prediction["label"]
        assert alone["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-5)


def test_file_and_standard_input_give_the_same(tmp_path: Path, run: Program):
    folder = saved(tmp_path / "model", ("no", "yes"), 1)
    lines = "one two\nthr\u00e9e \u2028 four\r\ntwo".encode()
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf" + lines)
    done = subprocess.run(
        [sys.executable, PREDICT, "--model", str(folder), str(tmp_path / "lines.txt")],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert run("--model", str(folder), stdin=lines)[0] == done.stdout
    head, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert head == ["label", "p(no)", "p(yes)"]
    assert len(rows) == 3
    for label, no, yes in rows:
        assert float(no) + float(yes) == pytest.approx(1, abs=1e-3)
        assert label == ("yes" if float(yes) > float(no) else "no")


def test_json_lines(tmp_path: Path, run: Program):
    folder = saved(tmp_path, ("no", "yes"), 1)
    out, _, status = run("--model", str(folder), "--format", "jsonl", "-", stdin=b"one\ntwo\n")
    assert status == 0
    documents = [json.loads(line) for line in out.splitlines()]
    assert len(documents) == 2
    for document in documents:
        assert set(document["probabilities"]) == {"no", "yes"}
        assert document["label"] in ("no", "yes")


def test_regression_gives_numbers(tmp_path: Path):
    folder = saved(tmp_path, (), 2)
    predictor = Predictor.from_folder(folder, CPU)
    texts = (["one"], ["two three"])
    head, line = output_lines(predictor, texts, "tsv")
    assert head == "value"
    assert float(line) == pytest.approx(expected(folder, "one", "two three")[0], abs=1e-4)
    (document,) = output_lines(predictor, texts, "jsonl")
    assert json.loads(document)["value"] == pytest.approx(float(line), abs=1e-4)


def test_many_lines_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("glue.predict._CHUNK", 4)
    predictor = Predictor.from_folder(saved(tmp_path, ("no", "yes"), 1), CPU)
    texts = [" ".join(["one", "two", "three"][: 1 + n % 3]) for n in range(11)]
    head, *lines = output_lines(predictor, (texts,), "tsv")
    assert head.startswith("label")
    assert len(lines) == 11
    assert lines[:8] == lines[3:]


def test_bad_lines_are_named():
    for lines, num_texts, message in (
        (["a\tb\n", "c\n"], 2, "x, line 2: expected two texts with a tab between them, found 1"),
        (["a\n", "b\tc\n"], 1, "x, line 2: expected one text, found 2"),
        (["a\n", "\n"], 1, "x, line 2: expected one text, found an empty text"),
        (["a\t \n"], 2, "x, line 1: .*found an empty text"),
    ):
        with pytest.raises(DataError, match=message):
            read_texts(lines, num_texts, "x")


def test_bad_input_leaves_nothing_on_standard_output(tmp_path: Path, run: Program):
    folder = saved(tmp_path / "model", ("no", "yes"), 1)
    for stdin, message in (
        (b"one\n\ntwo\n", "standard input, line 2"),
        (b"", "standard input: holds no lines"),
        (b"\xff\xfe", "expected UTF-8"),
    ):
        out, err, status = run("--model", str(folder), stdin=stdin)
        assert (out, status) == ("", 1)
        assert err.startswith("glue/predict.py: error: ")
        assert message in err
    _, err, status = run("--model", str(folder), str(tmp_path / "absent.txt"))
    assert status == 1
    assert "absent.txt" in err
    _, err, status = run("--model", str(folder), str(tmp_path))
    assert status == 1
    assert f"{tmp_path}: is a folder, expected a file" in err
    _, err, status = run("--model", str(tmp_path / "nothing"), stdin=b"one\n")
    assert status == 1
    assert "nothing/meaning.json: no such file" in err


def test_folders_that_are_no_fine_tuned_model(tmp_path: Path):
    folder = saved(tmp_path, ("no", "yes"), 1)
    meaning = json.loads((folder / "meaning.json").read_text())
    (folder / "meaning.json").write_text(json.dumps(meaning | {"labels": ["a", "b", "c"]}))
    with pytest.raises(CheckpointError, match="has 2 outputs, expected 3"):
        Predictor.from_folder(folder, CPU)
    (folder / "meaning.json").write_text(json.dumps(meaning))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        Predictor.from_folder(folder, CPU)
    (folder / "meaning.json").unlink()
    with pytest.raises(CheckpointError, match="expected the model folder of a"):
        Predictor.from_folder(folder, CPU)
