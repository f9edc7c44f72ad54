"""Long Range Arena runs from the command line to `result.json`, on tiny tasks."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lra.data import Classification
from lra.run import train_tasks
from lra.selfpretrain import MaskedPrediction
from lra.settings import ArenaConfig, ArenaSettings, parse
from lra.steps import CapturedStep
from lra.store import Example, write_task
from lra.tasks import TASKS
from ponet.run.runs import run_program

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"train": 24, "dev": 10, "test": 11}
TINY = ["--steps", "4", "--batch-size", "4", "--eval-every", "2", "--eval-batches", "2"]
TIMES = {"seconds", "step_ms"}


def examples(name: str, seed: int = 0) -> Iterator[Example]:
    """The label is the most frequent id less one, so that there is something to learn."""
    task, rng = TASKS[name], np.random.default_rng(seed)
    first, high = int(task.kind != "pixels"), min(task.vocab_size - 1, 256)
    for split, size in SIZES.items():
        for i in range(size if split != "dev" or task.dev_from == "source" else 0):
            label, inputs = i % task.num_classes, []
            for _ in range(task.num_inputs):
                length = 40 if task.kind == "pixels" else int(rng.integers(5, 40))
                ids = rng.integers(first, high, length)
                ids[rng.random(length) < 0.5] = label + 1
                inputs.append(ids.astype(np.uint8))
            yield Example(split, label, tuple(inputs))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All tasks with sequences of at most 40 tokens, prepared in `data`; the current folder."""
    for name in TASKS:
        small = {"seq_len": 64, "max_tokens": 40, "num_segments": 8}
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], **small))
        write_task(tmp_path / "data" / name, TASKS[name], examples(name), source="made up")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*flags: str) -> None:
    shared = ["--data-dir", "data", "--output-dir", "runs", "--threads", "1", "--device", "cpu"]
    run_program("lra", lambda: train_tasks([*shared, *flags]))


def run(capsys: Any, *flags: str) -> dict[str, Any]:
    """What the command's last line says, with its exit status and log."""
    with pytest.raises(SystemExit) as ended:
        start(*flags)
    output = capsys.readouterr()
    last = json.loads((output.out.splitlines() or ["{}"])[-1])
    return {**last, "status": ended.value.code, "log": output.err}


def entries(path: Path) -> list[dict[str, Any]]:
    """Metrics without those that depend on the machine."""
    measured = dict.fromkeys(("step_ms", "peak_memory_mib"))
    return [json.loads(line) | measured for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("protocol", "precision"), [("published", "fp32"), ("clean", "bf16")])
def test_every_task_from_data_to_result(tiny, capsys, protocol, precision):
    flags = ["--protocol", protocol, "--precision", precision, *TINY]
    found = run(capsys, "--task", *TASKS, *flags)
    # full batches of 4 as published, or all
    tested = {"published": 8, "clean": 11}[protocol]
    assert (found["status"], found["failures"], len(found["runs"])) == (0, [], len(TASKS))
    for name in TASKS:
        folder = tiny / "runs" / protocol / f"{name}-ponet-seed0"
        result = json.loads((folder / "result.json").read_text())
        assert result in found["runs"]
        expected = {"task": name, "model": "ponet", "seed": 0, "precision": precision, "steps": 4}
        expected |= {"published_steps": TASKS[name].steps, "complete": False}
        assert result | expected | {"num_test_examples": tested} == result
        assert set(result["differences"]) >= {"steps", "batch_size", "eval_every"}
        assert result["best_step"] in (2, 4)
        majority = np.bincount([i % TASKS[name].num_classes for i in range(11)]).max() / 11
        assert result["majority_rate"] == pytest.approx(majority)
        assert (folder / "model.safetensors").is_file()
        kinds = [(entry["kind"], entry["step"]) for entry in entries(folder / "metrics.jsonl")]
        assert kinds == [("train", 2), ("eval", 2), ("train", 4), ("eval", 4)]


@pytest.mark.parametrize(("protocol", "epochs"), [("published", 0), ("clean", 20)])
def test_a_model_learns_what_there_is_to_learn(tiny, capsys, protocol, epochs):
    flags = "--task text --learning-rate 1e-2 --steps 120 --batch-size 8 --eval-every 20"
    flags += f" --protocol {protocol} --eval-batches 2 --log-every 10"
    flags += f" --pretrain-epochs {epochs} --pretrain-learning-rate 1e-2"
    (result,) = run(capsys, *flags.split())["runs"]
    assert (result["test_accuracy"], result["dev_accuracy"]) == (1.0, 1.0)
    # the first of equals is kept
    assert result["best_step"] < 120
    if epochs:
        first, *_, last = entries(Path(result["run"], "pretrain", "metrics.jsonl"))
        # half of the tokens of an example are the same id, the others uniform
        assert last["loss"] < 0.75 * first["loss"]
    assert result["pretrain_epochs"] == epochs


class Killed(BaseException):
    """Stands for the end of the process."""


EIGHT = [*TINY, "--steps", "8", "--eval-every", "4", "--log-every", "1"]
PRETRAINED = ["--protocol", "clean", "--pretrain-epochs", "3"]


@pytest.mark.parametrize(
    ("owner", "name", "stage", "flags"),
    [
        (Classification, "loss", "clean-pretrained/image-ponet-seed0", PRETRAINED),
        (MaskedPrediction, "loss", "clean-pretrained/image-ponet-seed0/pretrain", PRETRAINED),
        (CapturedStep, "_do", "published/image-ponet-seed0", ["--capture", "on"]),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(
    tiny, monkeypatch, capsys, owner, name, stage, flags
):
    flags = ["--task", "image", *EIGHT, *flags]
    whole = run(capsys, *flags)["runs"][0]
    (folder,) = tiny.glob("runs/*/image-ponet-seed0")
    kept = folder.rename(tiny / "kept")
    original = getattr(owner, name)

    def killed(self, step):
        if step == 5:
            raise Killed
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            start(*flags, "--checkpoint-minutes", "0")
    state = torch.load(tiny / "runs" / stage / "checkpoint.pt")
    assert state["progress"]["step"] == 5
    again = run(capsys, *flags)["runs"][0]
    assert again | dict.fromkeys(TIMES) == whole | dict.fromkeys(TIMES)
    one, other = ((place / "model.safetensors").read_bytes() for place in (folder, kept))
    assert one == other
    for path in kept.rglob("metrics.jsonl"):
        assert entries(folder / path.relative_to(kept)) == entries(path)


@pytest.mark.parametrize(
    ("task", "model"), [("image", "ponet"), ("retrieval", "ponet"), ("image", "performer")]
)
def test_a_run_of_captured_steps_is_the_same_run(tiny, capsys, task, model):
    # what is dropped depends on the shape of the batch
    flags = ["--task", task, "--model", model, *EIGHT, "--dropout", "0", "--attention-dropout", "0"]
    flags += ["--learning-rate", "1e-3"]
    found, figures = [], []
    for capture in ("off", "on"):
        place = ["--output-dir", capture, "--capture", capture]
        (result,) = run(capsys, *flags, *place)["runs"]
        names = ("test_accuracy", "dev_accuracy", "best_step", "num_test_examples")
        found.append([result[name] for name in names])
        lines = entries(tiny / result["run"] / "metrics.jsonl")
        figures.append([line.get("loss", line.get("accuracy")) for line in lines])
    assert found[0] == found[1]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_finished_runs_are_skipped_and_others_refused(tiny, capsys):
    flags = ["--task", "listops", *TINY]
    first = run(capsys, *flags)
    more = run(capsys, *flags, "--seeds", "2")
    assert "1 of 2 runs are finished already" in more["log"]
    assert more["runs"][0] == first["runs"][0]
    assert [result["seed"] for result in more["runs"]] == [0, 1]
    write_task(tiny / "other" / "listops", TASKS["listops"], examples("listops", 1), source="else")
    other = run(capsys, *flags, "--data-dir", "other", "--learning-rate", "1e-3")
    assert other["status"] == 2
    assert re.search("with other settings .data '.*; learning_rate 0.0001, now 0.001", other["log"])


def test_what_a_block_leaves_out_is_a_run_of_its_own(tiny, capsys):
    flags = ["--task", "listops", "--model", "ponet", "performer", *TINY]
    results = run(capsys, *flags)["runs"]
    results += run(capsys, *flags, "--no-use-local", "--no-use-global-second-stage")["runs"]
    names = ["listops-ponet-seed0", "listops-performer-seed0"]
    # the others have no such parts
    without = "listops-ponet-no-use-global-second-stage-no-use-local-seed0"
    assert sorted({Path(result["run"]).name for result in results}) == sorted([*names, without])
    ablations = {Path(result["run"]).name: result["ablation"] for result in results}
    parts = ["use_global_second_stage", "use_local"]
    assert ablations == {name: [] for name in names} | {without: parts}
    record = json.loads((tiny / "runs" / "published" / without / "config.json").read_text())
    assert [record["model"][part] for part in ("use_local", "use_segment")] == [False, True]
    mixers = {result["model"]: result["mixer"] for result in results}
    assert mixers == {"ponet": "ponet", "performer": "performer_published"}


def settings(device: str = "cpu", **changes: Any) -> ArenaSettings:
    return ArenaConfig(**changes).runs(device)[0]


def test_defaults_are_the_published_settings():
    for name, task in TASKS.items():
        found = settings(task=(name,))
        assert found.differences() == []
        for field in ("steps", "batch_size", "eval_batches", "learning_rate"):
            assert getattr(found, field) == getattr(task, field)
        assert settings(task=(name,), protocol="clean").eval_batches is None
    assert settings(dropout=0.0).differences() == ["dropout"]
    assert settings(use_segment=False).differences() == ["use_segment"]
    assert [run.precision for run in ArenaConfig(task=("all",)).runs("cuda")] == ["fp16"] * 5
    assert settings("cuda", protocol="clean").precision == "bf16"
    # a preset gives way to flags
    config = parse(["--config", "debug", "--steps", "3"])
    assert (config.steps, config.batch_size, config.data_dir) == (3, 4, "data/lra-debug")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task imdb", "--task must be one of listops, text"),
        ("--model transformer", "--model must be one of ponet"),
        ("--model linear_published", "--model must be one of ponet"),
        ("--no-use-global --no-use-segment --no-use-local", "are all off: nothing mixes"),
        ("--protocol own", "--protocol: expected one of published, clean"),
        ("--steps 0", "--steps must be at least 1, found 0"),
        ("--dropout 1", "--dropout must be at least 0 and below 1"),
        ("--warmup-steps 5001", "--warmup-steps must be 0 to 5000, the steps of listops"),
        ("--precision fp16", "on a CPU use fp32 or bf16"),
        ("--num-attention-heads 7", "not a multiple of num_attention_heads 7"),
        ("--config nowhere", "the presets are debug, default"),
        ("--batch-size 25", "--batch-size 25: a split has only 24 examples"),
    ],
)
def test_wrong_flags_are_named(tiny, capsys, flags, message):
    found = run(capsys, *flags.split())
    assert found["status"] in (1, 2)
    assert message in found["log"]
    assert not list(tiny.glob("runs/*/*/result.json"))


def test_two_processes_from_any_folder(tmp_path):
    """As a user starts them; they share nothing but data."""
    flags = "--config debug --steps 2 --eval-every 2 --num-examples 60 --jobs 2 --test-examples 4"
    command = [sys.executable, str(ROOT / "lra" / "run.py"), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(result["model"] for result in found["runs"]) == ["attention", "ponet"]
    assert "listops-ponet-seed0 | step 2/2 | loss" in done.stderr
    assert "for a table: python lra/report.py runs/lra-debug" in done.stderr
