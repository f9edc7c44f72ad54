"""Fine-tuning from the command line to `result.json`, on tiny files and a tiny checkpoint."""

import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock

from glue import finetune
from glue.data import load_task
from glue.encoding import ExampleEncoder
from glue.finetune import FineTuningStep
from glue.model import (
    LabelSpec,
    build_classifier,
    load_classifier,
    outputs_of,
    read_checkpoint,
    tile_positions,
)
from glue.run import work
from glue.settings import parse
from glue.tasks import NINE_COLUMNS, TASKS
from ponet import (
    PoNetConfig,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoolerConfig,
)
from ponet.run.cli import UsageError
from ponet.run.runs import run_program
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
GOOD, BAD = "good fine great", "bad poor sad"
FILLERS = "the a film is it was very and so then ."
WORDS = (*SPECIAL_TOKENS, *f"{GOOD} {BAD} {FILLERS}".split())
TINY = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", "--device", "cpu"]
TIMES = {"seconds", "steps_per_s", "peak_memory_mib"}


def checkpoint_at(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = PoNetConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        cls_token_id=2,
        sep_token_id=3,
    )
    PoNetForPreTraining(config.replace(**changes)).save_pretrained(folder)
    save_tokenizer(bert_tokenizer({word: i for i, word in enumerate(WORDS)}), folder)
    return folder


def sentence(rng: random.Random, label: int, length: int = 6) -> str:
    words = rng.choices(FILLERS.split(), k=length)
    words[rng.randrange(length)] = rng.choice((BAD, GOOD)[label].split())
    return " ".join(words)


def table(header: str | None, lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines)


def official_files(root: Path) -> None:
    """Every GLUE task in the official layout, 16 / 8 / 4 rows."""
    rng = random.Random(0)
    two, three = "sentence1\tsentence2", TASKS["mnli"].labels

    def put(
        path: str, size: int, header: str | None, row: str, names: tuple[str, ...] = ("0", "1")
    ) -> None:
        """`row` has places for its number, for two texts, and for a label."""
        lines = []
        for i in range(size):
            a, b = sentence(rng, i % 2), sentence(rng, i % 2)
            lines.append(row.format(i=i, a=a, b=b, label=names[i % len(names)]))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(table(header, lines), "utf-8")

    pairs = {
        "MRPC": ("#1 String\t#2 String", "Quality", ("0", "1")),
        "STS-B": (two, "score", ("0.500", "4.800")),
        "QQP": ("question1\tquestion2", "is_duplicate", ("0", "1")),
        "QNLI": ("question\tsentence", "label", ("not_entailment", "entailment")),
        "RTE": (two, "label", ("not_entailment", "entailment")),
        "WNLI": (two, "label", ("0", "1")),
    }
    for split, n in (("train", 16), ("dev", 8)):
        put(f"CoLA/{split}.tsv", n, None, "gj04\t{label}\t\t{a}")
        put(f"SST-2/{split}.tsv", n, "sentence\tlabel", "{a}\t{label}")
        for folder, (texts, label, names) in pairs.items():
            header = f"index\t{texts}\t{label}"
            put(f"{folder}/{split}.tsv", n, header, "{i}\t{a}\t{b}\t{label}", names)
    for folder in ("CoLA", "SST-2"):
        put(f"{folder}/test.tsv", 4, "index\tsentence", "{i}\t{a}")
    for folder, (texts, _, _) in pairs.items():
        put(f"{folder}/test.tsv", 4, f"index\t{texts}", "{i}\t{a}\t{b}")
    for split, n in (("train", 18), ("dev_matched", 6), ("dev_mismatched", 9)):
        header = f"{two}\tlabel1\tgold_label"
        put(f"MNLI/{split}.tsv", n, header, "{a}\t{b}\tx\t{label}", three)
    for path in ("MNLI/test_matched", "MNLI/test_mismatched", "AX/diagnostic"):
        put(f"{path}.tsv", 5, f"index\t{two}", "{i}\t{a}\t{b}")
    header = "Logic\tPremise\tHypothesis\tLabel"
    put("AX/diagnostic-full.tsv", 5, header, "x\t{a}\t{b}\t{label}", three)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `data` and the checkpoint `tiny`, the current one."""
    official_files(tmp_path / "data")
    checkpoint_at(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run the program; gives what its last line says, with its exit status and log."""

    def run(*flags: str, checkpoint: str = "tiny") -> dict[str, Any]:
        arguments = ["--checkpoint", checkpoint, "--threads", "1", *flags]
        monkeypatch.setattr(sys, "argv", ["glue/run.py", *arguments])
        # files may differ from those of an earlier call
        for cache in (finetune.cached_checkpoint, finetune.load_examples, finetune.encode_task):
            cache.cache_clear()
        with pytest.raises(SystemExit) as ended:
            run_program("glue", work)
        output = capsys.readouterr()
        lines = output.out.splitlines()
        last = json.loads(lines[-1]) if lines else {}
        return {**last, "status": ended.value.code, "log": output.err}

    return run


def by_run(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of runs by their names."""
    left_out = TIMES | {"run"}
    return {
        run["name"]: {name: value for name, value in run.items() if name not in left_out}
        for run in found["runs"]
    }


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_tasks_from_data_to_submission(command, workplace):
    found = command("--task", "all", "wnli", "ax", "--pooler", "maxseq_mha", *TINY)
    assert (found["status"], found["failures"], len(found["runs"])) == (0, [], 9)
    results = {run["task"]: run for run in found["runs"]}
    for name, result in results.items():
        folder = workplace / "runs" / "glue" / "tiny" / f"{name}-maxseq_mha-b8-lr0.001-e2-seed0"
        assert json.loads((folder / "result.json").read_text()) == result
        assert not (folder / "checkpoint.pt").exists()
        assert (result["checkpoint"], result["mixer"]) == ("tiny", "ponet")
        assert (result["pooler"]["name"], result["from_scratch"]) == ("maxseq_mha", False)
        assert result["differences"]
        size = 18 if name == "mnli" else 16
        assert (result["num_train"], result["steps"]) == (size, 2 * -(-size // 8))
        per_pass = result["steps"] // 2
        assert [(entry["kind"], entry["step"]) for entry in metrics_of(folder)] == [
            (kind, step) for step in (per_pass, 2 * per_pass) for kind in ("train", "eval")
        ]
        submissions = set(TASKS[name].submissions) | ({"AX"} if name == "mnli" else set())
        assert {path.stem for path in (folder / "submission").iterdir()} == submissions
        if name in ("sst2", "stsb", "qnli"):
            model_repeats_its_submission(folder, name, workplace / "data")
    assert results["mrpc"]["majority_metrics"] == {"accuracy": 0.5, "f1": 0.0}
    assert [results[name]["majority"] for name in ("mrpc", "cola", "stsb")] == [0.25, None, None]
    split_metrics = {"matched_accuracy", "mismatched_accuracy", "ax_matthews"}
    assert set(results["mnli"]["metrics"]) == split_metrics
    assert results["mnli"]["num_eval"] == 15
    (summary,) = found["summary"]
    columns = summary["columns"]
    assert set(columns) == {*NINE_COLUMNS, "WNLI", "AX"}
    # CoLA is undefined where a model says the same of all sentences
    nine = [columns[title] for title in NINE_COLUMNS]
    assert summary["average"] == (None if None in nine else pytest.approx(np.mean(nine)))
    assert columns["RTE"] == 100 * results["rte"]["metrics"]["accuracy"]


def model_repeats_its_submission(folder: Path, task: str, data: Path) -> None:
    model, tokenizer, spec = load_classifier(folder / "model", CPU)
    labels = TASKS[task].labels
    texts = {"sst2": ("sentence",), "qnli": ("question", "sentence")}
    columns = texts.get(task, ("sentence1", "sentence2"))
    assert spec == LabelSpec(
        task=task, labels=labels, text_columns=columns, max_length=128, segments="texts"
    )
    (examples,) = load_task(TASKS[task], data).submissions.values()
    encoder = ExampleEncoder(tokenizer, max_length=128, segments="texts")
    outputs = outputs_of(model, encoder.encode(examples))
    if task == "stsb":
        expected = [f"{min(max(value, 0.0), 5.0):.3f}" for value in outputs[:, 0].tolist()]
    elif task == "qnli":
        expected = [labels[number] for number in outputs.argmax(axis=1)]
    else:
        expected = [str(number) for number in outputs.argmax(axis=1)]
    (path,) = (folder / "submission").iterdir()
    rows = [f"{i}\t{value}" for i, value in enumerate(expected)]
    assert path.read_text().splitlines() == ["index\tprediction", *rows]


def test_it_learns_what_there_is_to_learn(command, workplace):
    rng = random.Random(1)
    for split, size in (("train", 160), ("dev", 60)):
        lines = [f"{sentence(rng, i % 2)}\t{i % 2}" for i in range(size)]
        (workplace / "data" / "SST-2" / f"{split}.tsv").write_text(
            table("sentence\tlabel", lines), "utf-8"
        )
    flags = ["--epochs", "8", "--batch-size", "8", "--learning-rate", "5e-3", "--no-save-models"]
    flags = ["--epochs", "8", "--batch-size", "8", "--learning-rate", "5e-3", "--no-save-models"]
    found = command("--task", "sst2", "--pooler", "max", *flags)
    (result,) = found["runs"]
    assert (result["metrics"]["accuracy"], result["majority"]) == (1.0, 0.5)
    assert not (Path(result["run"]) / "model").exists()
    assert "sst2 | train: 160 examples, 80 of 0, 80 of 1" in found["log"]


class Interrupted(Exception):
    """Stands for the end of a process."""


def test_interrupted_grid_continues(command, workplace, monkeypatch):
    grid = ["--task", "rte", "cola", "--grid", "poolers", "--epochs", "2", "--learning-rate"]
    grid += ["1e-3", "--device", "cpu", "--seeds", "2", "--pooler", "cls", "stochastic"]
    grid += ["--checkpoint-minutes", "0", "--log-every", "1", "--no-save-models"]
    whole = command(*grid, "--output-dir", "whole")
    assert len(whole["runs"]) == 2 * 3 * 2 * 2
    assert {run["batch_size"] for run in whole["runs"]} == {16, 32, 64}

    steps = 0
    do_step = FineTuningStep.__call__

    def interrupted(self: FineTuningStep, step: int) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise Interrupted
        return do_step(self, step)

    monkeypatch.setattr(FineTuningStep, "__call__", interrupted)
    with pytest.raises(Interrupted):
        command(*grid, "--output-dir", "parts")
    # the run that was interrupted had done a step and kept it
    parts = workplace / "parts" / "tiny"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*/result.json")}
    assert len(finished) == 5
    assert len(list(parts.glob("*/checkpoint.pt"))) == 1
    again = command(*grid, "--output-dir", "parts")
    assert again["status"] == 0
    assert "5 of 24 runs are finished already" in again["log"]
    assert "resuming after step 1" in again["log"]
    for path, moment in finished.items():
        assert path.stat().st_mtime_ns == moment
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())
    assert by_run(whole) == by_run(again)
    for path in parts.glob("*/metrics.jsonl"):
        steps_of = [entry["step"] for entry in metrics_of(path.parent) if entry["kind"] == "train"]
        assert steps_of == sorted(set(steps_of))
    # a third time there is nothing to do
    monkeypatch.setattr(FineTuningStep, "__call__", None)
    assert command(*grid, "--output-dir", "parts")["status"] == 0


def test_run_that_was_stopped_after_its_last_step(command, monkeypatch):
    flags = ["--task", "rte", *TINY, "--output-dir"]
    whole = command(*flags, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Evaluation, "write_submissions", Mock(side_effect=Interrupted))
        with pytest.raises(Interrupted):
            command(*flags, "parts")
    monkeypatch.setattr(FineTuningStep, "__call__", None)
    again = command(*flags, "parts")
    assert (again["status"], by_run(again)) == (0, by_run(whole))


def test_programs_run_from_any_folder_and_jobs_change_no_figure(command):
    path = os.environ["PYTHONPATH"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def program(name: str, *arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "glue" / name), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    flags = ["--task", "rte", "cola", "--pooler", "cls", "stochastic", *TINY]
    two = json.loads(
        program("run.py", "--checkpoint", "tiny", "--threads", "1", "--jobs", "2", *flags)[-1]
    )
    assert (two["failures"], len(two["runs"])) == ([], 4)
    assert program("report.py") == Path("runs/glue/report.md").read_text().splitlines()
    folder = next(run["run"] for run in two["runs"] if run["task"] == "rte")
    assert len(program("predict.py", "--model", f"{folder}/model", "data/RTE/test.tsv")) == 5
    one = command(*flags, "--output-dir", "one")
    assert (by_run(one), one["summary"]) == (by_run(two), two["summary"])


def test_diverging_and_busy_runs_are_failures_and_the_others_go_on(command, monkeypatch):
    do_step = FineTuningStep.__call__

    def diverging(self: FineTuningStep, step: int) -> torch.Tensor:
        loss = do_step(self, step)
        return loss * float("nan") if self._settings.seed == 1 else loss

    folder = Path("runs/glue/tiny/rte-cls-b8-lr0.001-e2-seed0")
    folder.mkdir(parents=True)
    flags = ["--task", "rte", "--seeds", "3", *TINY]
    with monkeypatch.context() as patch, FileLock(folder / ".lock"):
        patch.setattr(FineTuningStep, "__call__", diverging)
        found = command(*flags)
    assert (found["status"], [run["seed"] for run in found["runs"]]) == (1, [2])
    busy, diverged = found["failures"]
    assert f"another process is at this run in {folder}" in busy
    assert "rte-cls-b8-lr0.001-e2-seed1: the loss became nan" in diverged
    again = command("--task", "rte", *TINY)
    assert (again["status"], [run["seed"] for run in again["runs"]]) == (0, [0])


def test_published_grid_has_twenty_runs(workplace):
    flags = ["--checkpoint", str(workplace), "--grid", "published"]
    runs = parse(flags).runs_of(TASKS["wnli"], "cpu")
    assert [(run.warmup_fraction, run.weight_decay) for run in runs] == [(0.0, 0.0)] * 20
    points = {(run.batch_size, run.learning_rate) for run in runs}
    assert points == set(product((8, 16, 32, 64, 128), (3e-5, 5e-5, 1e-4, 3e-4)))
    assert len(parse(flags).runs_of(TASKS["imdb"], "cpu")) == 2


def test_a_grid_of_ones_own(workplace):
    """Each size meets each rate once, from flags and from a file, where one may stand alone."""
    path = workplace / "mine.yaml"
    path.write_text("batch_size: [8, 16, 8]\nlearning_rate: 1e-3\n")
    flags = ["--config", str(path), "--checkpoint", str(workplace)]
    for more, rates in (([], [1e-3]), (["--learning-rate", "1e-4", "3e-4"], [1e-4, 3e-4])):
        runs = parse([*flags, *more]).runs_of(TASKS["rte"], "cpu")
        assert [(run.batch_size, run.learning_rate) for run in runs] == [*product((8, 16), rates)]
    path.write_text("batch_size: [8, many]\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: batch_size: expected int, found 'many'"):
        parse(flags)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "cls-b32-lr5e-05"),
        ("--epochs 4 --max-length 128 --precision fp32", "cls-b32-lr5e-05"),
        ("--epochs 2 --max-length 64", "cls-b32-lr5e-05-e2-n64"),
        ("--warmup-fraction 0 --dropout 0.2", "cls-b32-lr5e-05-w0-d0.2"),
        (
            "--segments sentences --max-train-examples 9 --precision bf16",
            "cls-b32-lr5e-05-sentences-t9-bf16",
        ),
        (
            "--pooler meanmax --reading literal --pooler-layers 2",
            "meanmax-literal-k2-b32-lr5e-05",
        ),
    ],
)
def test_folder_names_hold_what_departs_from_the_usual(flags, name):
    (run,) = parse(["--checkpoint", "x", *flags.split()]).runs_of(TASKS["rte"], "cpu")
    assert run.name == f"rte-{name}-seed0"


def test_from_scratch_keeps_sizes_alone(workplace):
    checkpoint, pooler = read_checkpoint(workplace / "tiny"), PoolerConfig(name="mean")
    shared = {"num_labels": 2, "max_length": 32, "pooler": pooler, "dropout": 0.0}
    built = []
    for from_scratch in (False, True):
        torch.manual_seed(5)
        built.append(build_classifier(checkpoint, from_scratch=from_scratch, **shared))
    words = [model.ponet.embeddings.word.weight for model in built]
    pretrained = PoNetForPreTraining.from_pretrained(workplace / "tiny")
    assert torch.equal(words[0], pretrained.ponet.embeddings.word.weight)
    assert not torch.equal(*words)
    assert torch.equal(built[0].classifier.weight, built[1].classifier.weight)


def test_checkpoints_of_all_kinds(command, workplace):
    flags = ["--task", "rte", "--pooler", "mha", *TINY]
    (pretrained,) = command(*flags)["runs"]
    (scratch,) = command(*flags, "--from-scratch")["runs"]
    assert Path(scratch["run"]).parent.name == "tiny-scratch"
    assert (pretrained["from_scratch"], scratch["from_scratch"]) == (False, True)
    # of another task and pooler, and named for the run, not for the folder "model" in it
    found = command("--task", "mnli", *TINY, checkpoint=f"{pretrained['run']}/model")
    assert found["status"] == 0
    assert found["runs"][0]["checkpoint"] == "rte-mha-b8-lr0.001-e2-seed0"
    # pre-training without a sentence objective leaves no pooler; cls then begins with a new one
    checkpoint_at(workplace / "mlm", num_sentence_labels=0)
    assert command("--task", "rte", *TINY, checkpoint="mlm")["status"] == 0
    # the folder of a run is no place for one from other weights
    model = PoNetForPreTraining.from_pretrained(workplace / "tiny")
    with torch.no_grad():
        model.ponet.embeddings.word.weight.add_(1.0)
    model.save_pretrained(workplace / "tiny")
    found = command(*flags)
    assert found["status"] == 2
    assert "holds a run with other settings (checkpoint '" in found["log"]


def test_positions_repeat():
    table = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(tile_positions(table, 8), table[torch.arange(8) % 3])
    assert tile_positions(table, 2) is table


def test_long_texts_and_recomputed_layers(command, workplace, monkeypatch):
    """Texts beyond the checkpoint's 32 positions; recomputing layers changes no figure."""
    rng = random.Random(2)
    folder = workplace / "data" / "hyperpartisan"
    folder.mkdir()
    for split, size in (("train", 8), ("dev", 4)):
        lines = []
        for i in range(size):
            text = " ".join(sentence(rng, i % 2, 20) for _ in range(4))
            lines.append(json.dumps({"text": text, "label": ("false", "true")[i % 2]}))
        (folder / f"{split}.jsonl").write_text(table(None, lines), "utf-8")
    losses = []
    for longest in (512, 4096):
        monkeypatch.setattr(finetune, "_LONG", longest)
        (result,) = command("--task", "hnd", *TINY, "--output-dir", str(longest))["runs"]
        assert (result["max_length"], result["segments"]) == (4096, "sentences")
        entries = metrics_of(result["run"])
        losses.append([entry["loss"] for entry in entries if entry["kind"] == "train"])
        model = PoNetForSequenceClassification.from_pretrained(Path(result["run"]) / "model")
        assert model.config.max_position_embeddings == 4096
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_own_pairs_with_numbers_and_other_settings(command):
    rng = random.Random(3)
    lines = [f'"{sentence(rng, i % 2)}","so, then",{i % 2}.5' for i in range(20)]
    Path("mine.csv").write_text(table("x,y,z", lines), "utf-8")
    Path("new.csv").write_text("x,y\ngood film,so\n", "utf-8")
    flags = "--task mine --train-file mine.csv --test-file new.csv --text-column x y"
    flags += " --label-column z --regression --max-length 9 --segments sentences"
    flags += " --pooler meanmax --reading literal --pooler-layers 2 --max-train-examples 9"
    found = command(*flags.split(), *TINY)
    (result,) = found["runs"]
    assert (result["num_train"], result["num_eval"]) == (9, 2)
    assert set(result["metrics"]) == {"pearson", "spearman"}
    assert "mine | train: 100.0 % of 9 examples are cut to 9 tokens" in found["log"]
    assert "trained on 9 of 18 rows" in result["differences"]
    assert result["segments"] == "sentences"
    assert (result["pooler"]["reading"], result["pooler"]["num_layers"]) == ("literal", 2)
    folder = Path(result["run"])
    assert len((folder / "submission" / "mine.tsv").read_text().splitlines()) == 2
    spec = load_classifier(folder / "model", CPU)[2]
    assert (spec.labels, spec.text_columns, spec.segments) == ((), ("x", "y"), "sentences")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("squad", "--task: expected one of cola"),
        ("rte --pooler best", "--pooler: expected one of cls"),
        ("rte --train-file x.csv", "give your task one new name by --task"),
        ("../x --train-file x.csv", "--task names the folders of the runs"),
        ("rte --dev-file x.csv", "--dev-file and --test-file belong to"),
        ("rte --seeds 0", "--seeds: expected a value greater than or equal to 1"),
        ("rte --dropout 1", "--dropout: expected a value less than 1, found 1.0"),
        ("rte --checkpoint none", "config.json: no such file"),
        ("hnd", "--task hnd has no data: expected train.jsonl in"),
        ("rte --pooler mha --pooler-heads 3", "pooler num_heads 3"),
        ("rte --batch-size 8 0", "--batch-size: expected a value greater"),
        ("rte --learning-rate 1e-4 0", "--learning-rate: expected a value"),
        ("rte --pooler max_cls --pooler-layers 4", "the last 4 layers"),
        ("rte --device cuda", "PyTorch finds no GPU"),
    ],
)
def test_complaints(command, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = command("--task", *flags.split())
    assert found["status"] in (1, 2)
    assert message in found["log"]
    assert "Traceback" not in found["log"]
    assert not Path("runs").exists()


def test_complaints_about_files(command, workplace):
    """What is wrong in the data of the second task is said before the first one runs."""
    path = workplace / "data" / "RTE" / "train.tsv"
    good = path.read_text()
    for text, message in (
        (good.replace("\tnot_entailment", "\tperhaps", 1), "line 2: unknown label 'perhaps'"),
        (good.replace("sentence2", "text"), "no column 'sentence2'"),
        (good + "16\t\tso\tentailment\n", "line 18: the text in column 'sentence1' is empty"),
    ):
        path.write_text(text)
        found = command("--task", "cola", "rte", *TINY)
        assert found["status"] == 1
        assert f"{path.relative_to(workplace)}" in found["log"]
        assert message in found["log"]
    assert not Path("runs").exists()


def test_complaints_about_checkpoints(command, workplace):
    (checkpoint_at(workplace / "bare") / "tokenizer.json").unlink()
    checkpoint_at(workplace / "other", cls_token_id=5)
    longer = {word: i for i, word in enumerate((*WORDS, "more"))}
    save_tokenizer(bert_tokenizer(longer), workplace / "tiny")
    for name, message in (
        ("bare", "bare: a checkpoint needs its tokenizer"),
        ("other", "[CLS] and [SEP] are 2 and 3 to the tokenizer, 5 and 3 to config.json"),
        ("tiny", f"the tokenizer has {len(WORDS) + 1} tokens"),
    ):
        found = command("--task", "rte", checkpoint=name)
        assert found["status"] == 1
        assert message in found["log"]
