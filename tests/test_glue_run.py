"""Fine-tuning from the command line to `result.json`, on tiny files and a tiny checkpoint."""

import json
import random
import subprocess
import sys
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from glue import finetune
from glue.data import TextExamples, load_examples, load_task
from glue.encoding import ExampleEncoder
from glue.finetune import FineTuningStep
from glue.model import build_classifier, load_classifier, outputs_of, read_checkpoint
from glue.run import fine_tune_tasks
from glue.settings import parse
from glue.tasks import NINE_COLUMNS, TASKS, TextTask
from ponet import PoNetForPreTraining
from ponet.run.cli import UsageError
from ponet.run.runs import run_program
from tests.tiny import BAD, FILLERS, GOOD, WORDS, checkpoint_at

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", "--device", "cpu"]
CACHES = (
    finetune.cached_checkpoint,
    load_examples,
    finetune.encode_training_set,
    finetune.encode_other_sets,
)
TIMES = {"seconds", "step_ms", "peak_memory_mib", "run"}


def put(path: Path, size: int, header: str | None, row: str, names: Any = ("0", "1")) -> None:
    """Write a table; `row` has places for its number, two texts of one feeling and a label."""
    rng = random.Random(path.name + row)
    lines = [] if header is None else [header]
    for i in range(size):
        a, b = (rng.choices(FILLERS.split(), k=6) for _ in range(2))
        for words in (a, b):
            words[rng.randrange(6)] = rng.choice((BAD, GOOD)[i % 2].split())
        lines.append(row.format(i=i, a=" ".join(a), b=" ".join(b), label=names[i % len(names)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def official_files(root: Path) -> None:
    """Every GLUE task in the official layout: 18 rows to learn from, 8 to score, 4 to predict."""
    sizes = {"train": 18} | dict.fromkeys(("dev", "matched", "mismatched", "ax"), 8)
    for task in (task for task in TASKS.values() if task.max_length == 128):
        files, names = task.files[0], task.labels or ("0.500", "4.800")
        for split, file in files.names.items():
            columns = files.columns(split)
            cells = {"index": "{i}"} | dict(zip(columns.texts, ("{a}", "{b}"), strict=False))
            if columns.label is not None:
                cells[columns.label] = "{label}"
            header = "\t".join(map(str, cells))
            row = "\t".join(cells.values())
            put(root / task.title / file, sizes.get(split, 4), header, row, names)
    for split in ("train", "dev"):
        put(root / "CoLA" / f"{split}.tsv", sizes[split], None, "gj04\t{label}\t\t{a}")


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
        for cache in CACHES:
            cache.cache_clear()
        with pytest.raises(SystemExit) as ended:
            run_program("glue", fine_tune_tasks)
        output = capsys.readouterr()
        lines = output.out.splitlines()
        last = json.loads(lines[-1]) if lines else {}
        return {**last, "status": ended.value.code, "log": output.err}

    return run


def by_run(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of runs by their names."""
    figures = [{n: value for n, value in run.items() if n not in TIMES} for run in found["runs"]]
    return {run["name"]: run for run in figures}


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    return [*map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())]


def test_all_tasks_from_data_to_submission(command, workplace):
    found = command("--task", "all", "ax", "--pooler", "maxseq_mha", *TINY)
    assert (found["status"], found["failures"], len(found["runs"])) == (0, [], 9)
    results = {run["task"]: run for run in found["runs"]}
    for name, result in results.items():
        folder = Path(f"runs/glue/tiny/{name}-maxseq_mha-b8-lr0.001-e2-seed0")
        assert json.loads((folder / "result.json").read_text()) == result
        assert not (folder / "checkpoint.pt").exists()
        assert (result["checkpoint"], result["mixer"]) == ("tiny", "ponet")
        assert (result["num_train"], result["steps"], result["from_scratch"]) == (18, 6, False)
        assert result["differences"]
        steps = [(entry["kind"], entry["step"]) for entry in metrics_of(folder)]
        assert steps == [("train", 3), ("eval", 3), ("train", 6), ("eval", 6)]
        submissions = set(TASKS[name].submissions) | ({"AX"} if name == "mnli" else set())
        assert {path.stem for path in (folder / "submission").iterdir()} == submissions
        if name in ("sst2", "stsb", "qnli"):
            model_repeats_its_submission(folder, TASKS[name], workplace / "data")
    assert results["mrpc"]["majority_metrics"] == {"accuracy": 0.5, "f1": 0.0}
    assert [results[name]["majority"] for name in ("mrpc", "cola", "stsb")] == [0.25, None, None]
    mnli = results["mnli"]
    assert set(mnli["metrics"]) == {"matched_accuracy", "mismatched_accuracy", "ax_matthews"}
    assert mnli["num_eval"] == 16
    (summary,) = found["summary"]
    columns = summary["columns"]
    assert set(columns) == {*NINE_COLUMNS, "WNLI", "AX"}
    # CoLA is undefined where a model says the same of all sentences
    nine = [columns[title] for title in NINE_COLUMNS]
    mean = None if None in nine else pytest.approx(np.mean(nine))
    assert summary["averages"]["9"] == mean
    assert columns["RTE"] == 100 * results["rte"]["metrics"]["accuracy"]


def model_repeats_its_submission(folder: Path, task: TextTask, data: Path) -> None:
    model, tokenizer, spec = load_classifier(folder / "model", CPU)
    columns = task.files[0].labelled.texts
    assert (spec.task, spec.labels, spec.text_columns) == (task.name, task.labels, columns)
    (examples,) = load_task(task, data).submissions.values()
    encoder = ExampleEncoder(tokenizer, max_length=spec.max_length, segments=spec.segments)
    outputs = outputs_of(model, encoder.encode(examples))
    if task.is_regression:
        expected = [f"{min(max(value, 0.0), 5.0):.3f}" for value in outputs[:, 0].tolist()]
    else:
        # numbers of classes, but for entailment
        names = task.labels if task.name == "qnli" else ("0", "1")
        expected = [names[number] for number in outputs.argmax(axis=1)]
    (path,) = (folder / "submission").iterdir()
    rows = [f"{i}\t{value}" for i, value in enumerate(expected)]
    assert path.read_text().splitlines() == ["index\tprediction", *rows]


def test_it_learns_what_there_is_to_learn(command, workplace):
    for split, size in (("train", 160), ("dev", 60)):
        path = workplace / "data" / "SST-2" / f"{split}.tsv"
        put(path, size, "sentence\tlabel", "{a}\t{label}")
    flags = ["--epochs", "8", "--batch-size", "8", "--learning-rate", "5e-3", "--no-save-models"]
    found = command("--task", "sst2", "--pooler", "max", *flags)
    (result,) = found["runs"]
    assert (result["metrics"]["accuracy"], result["majority"]) == (1.0, 0.5)
    assert not Path(result["run"], "model").exists()
    assert "sst2 | train: 160 examples, 80 of 0, 80 of 1" in found["log"]


class Interrupted(Exception):
    """Stands for the end of a process."""


def test_interrupted_grid_continues(command, workplace, monkeypatch):
    grid = ["--task", "rte", "cola", "--grid", "cs475", "--epochs", "2", "--learning-rate"]
    grid += ["1e-3", "--device", "cpu", "--pooler", "cls", "stochastic", "--log-every", "1"]
    grid += ["--checkpoint-minutes", "0", "--no-save-models"]
    whole = command(*grid, "--output-dir", "whole")
    assert len(whole["runs"]) == 2 * 3 * 2
    assert {run["batch_size"] for run in whole["runs"]} == {16, 32, 64}
    do_step, calls = FineTuningStep.__call__, count(1)

    def interrupted(self: FineTuningStep, step: int) -> torch.Tensor:
        if next(calls) == 12:
            raise Interrupted
        return do_step(self, step)

    monkeypatch.setattr(FineTuningStep, "__call__", interrupted)
    with pytest.raises(Interrupted):
        command(*grid, "--output-dir", "parts")
    # the run that was interrupted had done three steps and kept them
    parts = workplace / "parts" / "tiny"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*/result.json")}
    assert (len(finished), len(list(parts.glob("*/checkpoint.pt")))) == (3, 1)
    # it is stopped a second time after its last step
    monkeypatch.setattr(FineTuningStep, "__call__", do_step)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_submission", Mock(side_effect=Interrupted))
        with pytest.raises(Interrupted):
            command(*grid, "--output-dir", "parts")
    again = command(*grid, "--output-dir", "parts")
    assert again["status"] == 0
    assert "3 of 12 runs are finished already" in again["log"]
    assert "resuming after step 4" in again["log"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())
    assert by_run(whole) == by_run(again)
    for path in parts.glob("*/metrics.jsonl"):
        steps = [entry["step"] for entry in metrics_of(path.parent) if entry["kind"] == "train"]
        assert steps == sorted(set(steps))
    # a fourth time there is nothing to do
    monkeypatch.setattr(FineTuningStep, "__call__", None)
    assert command(*grid, "--output-dir", "parts")["status"] == 0


def test_programs_run_from_any_folder_and_jobs_change_no_figure(command):
    def program(name: str, *arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "glue" / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    flags = ["--task", "rte", "--pooler", "cls", "stochastic", *TINY]
    jobs = ["--checkpoint", "tiny", "--threads", "1", "--jobs", "2"]
    two = json.loads(program("run.py", *jobs, *flags)[-1])
    assert (two["failures"], len(two["runs"])) == ([], 2)
    assert program("report.py") == Path("runs/glue/report.md").read_text().splitlines()
    folder = two["runs"][0]["run"]
    assert len(program("predict.py", "--model", f"{folder}/model", "data/RTE/test.tsv")) == 5
    one = command(*flags, "--output-dir", "one")
    assert (by_run(one), one["summary"]) == (by_run(two), two["summary"])


def test_grids(tmp_path):
    """The published one, and one's own: each size meets each rate once, from flags or a file."""
    runs = parse(["--checkpoint", "x", "--grid", "published"]).runs_of(TASKS["wnli"], 635, "cpu")
    assert [(run.warmup_fraction, run.weight_decay) for run in runs] == [(0.0, 0.0)] * 20
    points = {(run.batch_size, run.learning_rate) for run in runs}
    assert points == set(product((8, 16, 32, 64, 128), (3e-5, 5e-5, 1e-4, 3e-4)))
    for name, sizes, epochs, seeds in (("maxpoolbert", (32,), 4, 3), ("cs475", (16, 32, 64), 3, 1)):
        runs = parse(["--checkpoint", "x", "--grid", name]).runs_of(TASKS["rte"], 2490, "cpu")
        points = product(sizes, range(seeds))
        assert [(run.batch_size, run.seed) for run in runs] == [*points]
        recipe = {(x.learning_rate, x.epochs, x.warmup_fraction, x.weight_decay) for x in runs}
        assert recipe == {(2e-5, epochs, 0.1, 0.01)}
    path = tmp_path / "mine.yaml"
    path.write_text("batch_size: [8, 16, 8]\nlearning_rate: 1e-3\n")
    flags = ["--config", str(path), "--checkpoint", "x"]
    for more, rates in (([], [1e-3]), (["--learning-rate", "1e-4", "3e-4"], [1e-4, 3e-4])):
        runs = parse([*flags, *more]).runs_of(TASKS["rte"], 2490, "cpu")
        assert [(run.batch_size, run.learning_rate) for run in runs] == [*product((8, 16), rates)]
    path.write_text("batch_size: [8, many]\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: batch_size: expected int, found 'many'"):
        parse(flags)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--epochs 4 --max-length 128 --precision fp32", "cls-b32-lr5e-05"),
        ("--epochs 2 --max-length 64", "cls-b32-lr5e-05-e2-n64"),
        ("--warmup-fraction 0 --dropout 0.2", "cls-b32-lr5e-05-w0-d0.2"),
        ("--segments sentences --max-train-examples 9", "cls-b32-lr5e-05-sentences-t9"),
        ("--pooler mha --reading literal --precision bf16", "mha-literal-b32-lr5e-05-bf16"),
        # what a pooler does not read is no part of its name
        ("--pooler mean --reading literal --pooler-layers 2 --pooler-heads 2", "mean-b32-lr5e-05"),
        ("--pooler max_cls --pooler-layers 2 --pooler-heads 2", "max_cls-k2-b32-lr5e-05"),
        ("--grid published --batch-size 8 --learning-rate 1e-4", "cls-b8-lr0.0001-w0-wd0"),
    ],
)
def test_folder_names_hold_what_departs_from_the_usual(flags, name):
    (run,) = parse(["--checkpoint", "x", *flags.split()]).runs_of(TASKS["rte"], 2490, "cpu")
    assert run.name == f"rte-{name}-seed0"


def test_classifiers_from_a_checkpoint(workplace):
    """From scratch only sizes are kept; positions repeat for texts longer than the checkpoint's."""
    built = []
    for flags in ([], ["--from-scratch"]):
        config = parse(["--checkpoint", "tiny", "--max-length", "40", "--pooler", "mean", *flags])
        (settings,) = config.runs_of(TASKS["rte"], 2490, "cpu")
        torch.manual_seed(5)
        built.append(build_classifier(read_checkpoint(Path("tiny")), settings, 2))
    words = [model.ponet.embeddings.word.weight for model in built]
    pretrained = PoNetForPreTraining.from_pretrained(workplace / "tiny").ponet.embeddings
    assert torch.equal(words[0], pretrained.word.weight)
    assert not torch.equal(*words)
    assert torch.equal(built[0].classifier.weight, built[1].classifier.weight)
    positions = built[0].ponet.embeddings.position.weight
    assert torch.equal(positions, pretrained.position.weight[torch.arange(40) % 32])


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


def long_texts(data: Path, **sizes: int) -> None:
    """HND, with texts beyond the checkpoint's 32 positions."""
    text = " ".join(["{a}", "{b}"] * 7)
    row = f'{{{{"text": "{text}", "label": "{{label}}"}}}}'
    for split, size in sizes.items():
        put(data / "hyperpartisan" / f"{split}.jsonl", size, None, row, ("false", "true"))


def test_long_texts_and_recomputed_layers(command, workplace, monkeypatch):
    """Recomputing layers changes no figure."""
    long_texts(workplace / "data", train=8, dev=4)
    losses = []
    for longest in (512, 4096):
        monkeypatch.setattr(finetune, "_LONG", longest)
        (result,) = command("--task", "hnd", *TINY, "--output-dir", str(longest))["runs"]
        assert (result["max_length"], result["segments"]) == (4096, "sentences")
        assert (result["metrics"].keys(), result["num_test"]) == ({"accuracy", "f1"}, 0)
        entries = metrics_of(result["run"])
        losses.append([entry["loss"] for entry in entries if entry["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_test_documents_are_scored_once_and_apart(command, workplace):
    """What the saved model says of them, and nothing before the end of training."""
    data = workplace / "data"
    long_texts(data, train=8, dev=4, test=5)
    flags = ["--task", "hnd", "--pooler", "max", *TINY]
    (result,) = command(*flags)["runs"]
    folder = Path(result["run"])
    model, tokenizer, spec = load_classifier(folder / "model", CPU)
    encoder = ExampleEncoder(tokenizer, max_length=spec.max_length, segments=spec.segments)
    loaded = load_task(TASKS["hnd"], data)
    for prefix, examples in (("", loaded.evaluation["dev"]), ("test_", loaded.tests["test"])):
        right = outputs_of(model, encoder.encode(examples)).argmax(axis=1) == examples.labels
        assert result["metrics"][f"{prefix}accuracy"] == pytest.approx(right.mean())
    assert result["majority_metrics"]["test_accuracy"] == 3 / 5
    assert (result["num_eval"], result["num_test"]) == (4, 5)
    assert result["score"] == result["metrics"]["f1"]
    evaluations = [entry for entry in metrics_of(folder) if entry["kind"] == "eval"]
    assert len(evaluations) == 2
    assert not any("test_accuracy" in entry for entry in evaluations)
    # scores of other test documents are not those of this run
    long_texts(data, test=6)
    assert "holds a run with other settings (data '" in command(*flags)["log"]


def test_learning_curve(command, workplace):
    """Small sets are parts of larger ones and the same for every pooler, but not for every seed."""
    seen: dict[Any, Any] = {}
    encode = ExampleEncoder.encode

    def noted(self: ExampleEncoder, examples: TextExamples) -> Any:
        seen.setdefault(len(examples), []).append(set(zip(*examples.texts, strict=True)))
        return encode(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleEncoder, "encode", noted)
        flags = ["--task", "rte", "--pooler", "first", "maxseq_mha", "--pooler-layers", "1", "12"]
        flags += ["--max-train-examples", "7", "11", "18", "99", "--seeds", "2", "--no-save-models"]
        found = command(*flags, *TINY)
    assert found["status"] == 0
    assert "--pooler-layers 12 left out: the encoder has 3" in found["log"]
    names = [run["name"] for run in found["runs"]]
    # 18 and 99 are all there are
    points = product(("-t7", "-t11", ""), ("first", "maxseq_mha-k1"), (0, 1))
    assert names == [f"rte-{p}-b8-lr0.001-e2{limit}-seed{seed}" for limit, p, seed in points]
    assert [run["num_train"] for run in found["runs"]] == [7] * 4 + [11] * 4 + [18] * 4
    assert [run["max_train_examples"] for run in found["runs"]][7:9] == [11, None]
    small, large = seen[7], seen[11]
    assert (len(small), len(large)) == (4, 4)
    assert small[:2] == small[2:]
    assert large[:2] == large[2:]
    assert small[0] != small[1]
    assert all(a < b for a, b in zip(small, large, strict=True))
    # the whole set is read once
    assert len(seen[18]) == 1


def test_own_pairs_with_numbers_and_other_settings(command):
    put(Path("mine.csv"), 20, "x,y,z", '"{a}","so, then",{label}.5')
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
    # the number of layers, which it does not read, is no part of what it is
    assert (result["pooler"]["reading"], result["pooler"]["num_layers"]) == ("literal", 3)
    folder = Path(result["run"])
    assert len((folder / "submission" / "mine.tsv").read_text().splitlines()) == 2
    spec = load_classifier(folder / "model", CPU)[2]
    assert (spec.labels, spec.text_columns, spec.segments) == ((), ("x", "y"), "sentences")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("squad", "--task must be one of cola"),
        ("rte --pooler best", "--pooler must be one of cls"),
        ("rte --train-file x.csv", "give your task one new name by --task"),
        ("../x --train-file x.csv", "--task must be letters"),
        ("rte --dev-file x.csv", "--dev-file and --test-file belong to"),
        ("rte --dropout 1", "--dropout must be below 1, found 1.0"),
        ("rte --max-train-examples 8 0", "--max-train-examples must be at least 1, found 0"),
        ("rte --pooler-layers 0 1", "--pooler-layers must be at least 1, found 0"),
        ("rte --batch-size 8 0", "--batch-size must be at least 1, found 0"),
        ("rte --learning-rate 1e-4 0", "--learning-rate must be above 0, found 0.0"),
        ("rte --checkpoint none", "none: no such folder, and the hub does not give it"),
        ("rte --checkpoint run", "run: the folder of a run; its model is in run/model, give that"),
        ("rte --checkpoint bare", "bare: a checkpoint needs its tokenizer"),
        ("rte --checkpoint other", "[CLS] and [SEP] are 2 and 3 to the tokenizer, 5 and 3 to"),
        ("rte --checkpoint small", f"the tokenizer has {len(WORDS)} tokens"),
        ("hnd", "--task hnd has no data: expected train.jsonl* in"),
        ("rte --pooler mha --pooler-heads 3", "pooler num_heads 3"),
        ("rte --pooler max_cls --pooler-layers 4", "--pooler-layers 4: the encoder has"),
        ("rte --device cuda", "PyTorch finds no GPU"),
        ("mine --train-file mine.csv", "no column 'label'; it has text, kind (see --label-column)"),
        ("mine --train-file semicolons.csv", "it has text;label as one column: separate columns"),
        # what is wrong in the data of the second task is said before the first one runs
        ("cola rte --data-dir unknown", "RTE/train.tsv, line 2: expected one of entailment"),
    ],
)
def test_complaints(command, workplace, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    checkpoint_at(workplace / "run" / "model")
    checkpoint_at(workplace / "other", cls_token_id=5)
    checkpoint_at(workplace / "small", vocab_size=len(WORDS) - 1)
    (checkpoint_at(workplace / "bare") / "tokenizer.json").unlink()
    Path("mine.csv").write_text("text,kind\nso,1\n")
    Path("semicolons.csv").write_text("text;label\nso;1\n")
    put(Path("unknown/CoLA/train.tsv"), 9, None, "gj04\t{label}\t\t{a}")
    put(Path("unknown/RTE/train.tsv"), 9, "sentence1\tsentence2\tlabel", "{a}\t{b}\tso")
    found = command("--task", *flags.split())
    assert found["status"] in (1, 2)
    assert message in found["log"]
    assert "Traceback" not in found["log"]
    assert not Path("runs").exists()
