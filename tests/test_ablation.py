"""The ablation command end to end on little text and few examples, and what its report states."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import ablation
from pretrain.settings import parse
from tests.test_glue_run import official_files

FLAGS = (
    "--config debug --vocab-size 400 --hidden-size 32 --intermediate-size 64 --seq-len 48 "
    "--batch-tokens 768 --micro-batch-tokens 384 --eval-tokens 1500 --validation-fraction 0.1 "
    "--steps 4 --eval-every 2 --data {data} --cache-dir {cache}"
)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program on a folder of its own: status, Markdown, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str):
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", "out", *flags])
        status = 0
        try:
            ablation.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_parts_run_once_and_one_that_fails_stops_no_other(run, tmp_path):
    official_files(tmp_path / "glue")
    documents = [" ".join(f"word{i % 37} stands {i}." for i in range(j, j + 60)) for j in range(40)]
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    pretraining = FLAGS.format(data="text.jsonl", cache="cache").split()
    flags = [
        "--data-dir=glue",
        "--glue=--epochs=1 --max-length=16 --learning-rate 1e-4 1e-3",
        *pretraining,
    ]
    # the folder of a run is taken
    Path("out/mlm/pretrain").mkdir(parents=True)
    Path("out/mlm/pretrain/other").touch()
    status, _, errors = run("--variants", "mlm", "ponet", *flags)
    assert status == "ablation: 1 parts failed: " + errors.strip().removeprefix("ablation: error: ")
    assert (
        "mlm: pretrain: status 2: pretrain: error: --output-dir out/mlm/pretrain is not" in errors
    )
    ended = json.loads(Path("out/ponet/pretrain.json").read_text())

    # interrupted after the first of two checkpoints, fine-tuning as finished before
    Path("out/ponet/pretrain.json").unlink()
    shutil.rmtree("out/ponet/pretrain/checkpoints/step-00000004")
    finished = Path("out/ponet/glue.json").stat()
    status, printed, errors = run("--variants", "ponet", *flags)
    assert (status, errors) == (0, "")
    assert "step-00000002" in Path("out/ponet/pretrain.log").read_text()
    assert json.loads(Path("out/ponet/pretrain.json").read_text())["loss"] == ended["loss"]
    assert Path("out/ponet/glue.json").stat() == finished

    without, row = json.loads(Path("out/report.json").read_text())["rows"][::-1]
    assert without == {"variant": "mlm", "tokens": None}
    assert (row["variant"], row["tokens"]) == ("ponet", ended["tokens"])
    for name in ("mlm", "sso"):
        assert row[name] == 100 * ended[f"{name}_accuracy"]
        assert row[f"{name}_baseline"] == 100 * ended[f"{name}_baseline"]
    tuned = json.loads(Path("out/ponet/glue.json").read_text())["runs"]
    scores = [100 * run["score"] for run in tuned if run["task"] == "stsb"]
    assert len(scores) == 2
    assert row["stsb_scores"] == [row["stsb"]] == [max(scores)]
    line = (
        r"\| PoNet \| 0\.00 \| [\d.]+ \([\d.]+\) \| [\d.]+ \([\d.]+, [\d.]+\) \|.*45.36 \| 84.57 \|"
    )
    assert re.search(line, printed)
    assert Path("out/report.md").read_text() in printed
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")

    assert "is by --config debug" in run("--variants", "ponet", *flags, "--seed=1")[2]


def test_trends_are_those_of_the_figures():
    rows = [
        {"variant": "ponet", "mlm": 50.0, "sso": 80.0, "cola": 40.0, "stsb": 80.0},
        {"variant": "no-ga", "mlm": 49.0, "sso": 70.0, "stsb": 81.0},
        {"variant": "mlm", "mlm": 51.0, "cola": 40.0, "stsb": 60.0},
    ]
    found = {(t["variant"], t["figure"]): t.get("holds") for t in ablation.trends_of(rows)}
    assert found["no-ga", "sso"] is True
    assert found["no-ga", "stsb"] is False
    assert found["no-smp", "mlm"] is None
    assert found["mlm", "mlm"] is True
    assert found["mlm", "cola"] is False
    assert len(found) == 12


def test_variants_are_what_their_names_say():
    configs = {name: parse(flags.split())[0] for name, (_, flags, *_) in ablation.VARIANTS.items()}
    full = vars(configs[ablation.FULL])
    changed = {
        name: {key: value for key, value in vars(config).items() if value != full[key]}
        for name, config in configs.items()
    }
    assert changed == {
        "ponet": {},
        "no-second-stage": {"use_global_second_stage": False},
        "no-ga": {"use_global": False},
        "no-smp": {"use_segment": False},
        "no-lmp": {"use_local": False},
        "nsp": {"objective": "mlm+nsp"},
        "mlm": {"objective": "mlm"},
        "bert": {"mixer": "attention", "attention_probs_dropout_prob": 0.1},
        "fnet": {"mixer": "fnet"},
    }
