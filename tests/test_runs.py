"""The frame of runs: order, failures, processes that die, folders, locks, and the trainer."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from lra.steps import OneCycle, PlainStep
from ponet.checkpoint import CheckpointError
from ponet.run.cli import UsageError, errors_in_one_line
from ponet.run.runs import Run, run_all, run_options, run_program
from ponet.run.trainer import (
    RunOptions,
    Trainer,
    TrainingError,
    linear_schedule,
    matrices_and_vectors,
)

OPTIONS = RunOptions(
    device=torch.device("cpu"), threads=1, log_every=2, checkpoint_seconds=0, shows_bar=False
)


@dataclass(frozen=True, kw_only=True)
class NumberRun(Run):
    """A run that gives its number, in a process of its own, which imports this module."""

    options: RunOptions = OPTIONS
    rate: float = 1e-3

    def identity(self) -> dict[str, Any]:
        return {"rate": self.rate, "sizes": (8, 16), "seed": None}

    def execute(self) -> dict[str, Any]:
        number = int(self.name)
        if number == 13:
            raise TrainingError("thirteen is bad luck")
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number >= 600:
            logging.getLogger("ponet").info("sleeping")
            (self.folder / "process").write_text(str(os.getpid()))
            time.sleep(number)
        self.begin({"more": "details"})
        return self.finish({"number": number, "process": os.getpid()})


def numbered(parent: Path, *numbers: int) -> list[NumberRun]:
    return [NumberRun(folder=parent / str(number)) for number in numbers]


def test_one_process_works_in_order_and_two_do_what_is_left(tmp_path: Path, capsys):
    results, failures = run_all("ponet", numbered(tmp_path, 3, 13, 1), jobs=1)
    assert [result["number"] for result in results] == [3, 1]
    assert {result["process"] for result in results} == {os.getpid()}
    assert failures == ["13: thirteen is bad luck"]
    assert "ponet: error: 13: thirteen is bad luck" in capsys.readouterr().err
    with FileLock(tmp_path / "13" / ".lock"):
        results, failures = run_all("ponet", numbered(tmp_path, 4, 2, 13, 1), jobs=2)
    assert "1 of 4 runs are finished already" in capsys.readouterr().err
    assert results[0]["number"] == 1
    assert sorted(result["number"] for result in results) == [1, 2, 4]
    assert os.getpid() not in {result["process"] for result in results[1:]}
    assert failures == [f"13: another process is at this run in {tmp_path}/13"]


def test_a_killed_process_is_a_failure_and_not_a_traceback(tmp_path: Path):
    results, (failure,) = run_all("ponet", numbered(tmp_path, -1, -2), jobs=2)
    assert results == []
    assert re.match("a process was killed.*--jobs 1", failure)


PARENT = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from ponet.run.runs import run_all, run_program
from test_runs import numbered
if __name__ == "__main__":
    runs = numbered(Path(), *range(600, 604))
    run_program("ponet", lambda: ({{"runs": []}}, run_all("ponet", runs, jobs=2)[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_processes_end_with_their_parent(tmp_path: Path, number):
    (tmp_path / "parent.py").write_text(PARENT)
    command, log = [sys.executable, "parent.py"], tmp_path / "log"
    interrupted = number == signal.SIGINT
    with log.open("w") as file:
        parent = subprocess.Popen(command, cwd=tmp_path, stderr=file, start_new_session=True)
    paths = [tmp_path / name / "process" for name in ("600", "601")]
    try:
        wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
        # as a terminal does: to all processes
        (os.killpg if interrupted else os.kill)(parent.pid, number)
        assert parent.wait(60) == (130 if interrupted else -number)
    finally:
        parent.kill()
    children = [int(path.read_text()) for path in paths]
    wait_until(lambda: not any(map(is_running, children)))
    if interrupted:
        *lines, last = log.read_text().splitlines()
        assert [line.split()[1:] for line in lines] == [["sleeping"]] * 2
        assert last == "ponet: interrupted; the same command continues"


def is_running(process: int) -> bool:
    # nobody may have asked for the status of a process that has ended
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_folder_holds_one_run(tmp_path: Path):
    """What it was, what came out, no checkpoint once it is finished; another run is refused."""
    folder = tmp_path / "7"
    run, other = NumberRun(folder=folder), NumberRun(folder=folder, rate=2e-3)
    assert run.finished() is None
    run.begin({"more": "details"})
    other.begin({})
    assert run.finished() is None
    checkpoint = folder / "part" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    result = run.finish({"score": 0.5})
    assert run.finished() == result
    assert (result["score"], result["run"]) == (0.5, str(folder))
    assert not checkpoint.exists()
    with pytest.raises(UsageError, match=r"7: holds a run .*\(rate 0.001, now 0.002\)"):
        other.finished()
    for content in ("{", "[]"):
        (folder / "result.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"result\.json: damaged.*delete its folder"):
            run.finished()


def test_options_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    def options(**changes: Any) -> RunOptions:
        usual = {"device": "auto", "threads": None, "log_every": 1, "checkpoint_minutes": 2}
        return run_options(SimpleNamespace(**usual | changes))

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [options(jobs=jobs).threads for jobs in (1, 2, 5, 9)] == [5, 2, 1, 1]
    found = options(jobs=2, threads=3)
    assert (found.threads, found.device.type, found.checkpoint_seconds) == (3, "cpu", 120)
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds no GPU"):
        options(jobs=1, device="cuda")


def test_programs_end_in_one_line(capsys):
    for error, status in ((UsageError("no"), 2), (TrainingError("no"), 1), (OSError("no"), 1)):
        with pytest.raises(SystemExit, match=str(status)), errors_in_one_line("glue"):
            raise error
        assert capsys.readouterr().err == "glue: error: no\n"
    for failures, status in (([], 0), (["one"], 1)):
        with pytest.raises(SystemExit, match=str(status)):
            run_program("glue", lambda failures=failures: ({"runs": [1]}, failures))
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document == {"runs": [1], "failures": failures}


def test_linear_schedule_and_groups_of_parameters():
    # up to the peak in the last step of the warm-up, and one step short of zero at the end
    factors = [linear_schedule(i, steps=6, warmup_steps=2) for i in range(6)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert linear_schedule(0, steps=4, warmup_steps=0) == 1.0
    # vectors do not decay
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    matrices, vectors = matrices_and_vectors(model, 0.1)
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert [p.shape for p in vectors["params"]] == [(2,), (2,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def train(folder: Path, stops_at: int | None = None, bad: int | None = None) -> Trainer:
    """Seven noisy steps, evaluated after the third, sixth and last, with given scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

    def loss(step: int) -> Tensor:
        if step == stops_at:
            raise KeyboardInterrupt
        return model(torch.randn(4, 3)).square().mean() * (float("nan") if step == bad else 1)

    schedule = OneCycle(steps=7, warmup_steps=2, peak=0.1)
    form = {"precision": "fp32", "seeds": (0,), "device": OPTIONS.device}
    fixed = {"name": "a test", "steps": 7, "eval_every": 3, "best_by": "score"}
    fixed["evaluate"] = lambda number: {"score": [0.1, 0.3, 0.3][number], "undefined": None}
    trainer = Trainer(model, PlainStep(model, schedule, loss=loss, **form), OPTIONS, **fixed)
    trainer.train(folder)
    return trainer


def metrics(folder: Path) -> list[Any]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["kind"], e["step"], e.get("loss", e.get("score"))) for e in entries]


def test_interrupted_training_continues_bit_for_bit(tmp_path: Path):
    whole = train(tmp_path / "whole")
    steps = "train 2, train 3, eval 3, train 4, train 6, eval 6, train 7, eval 7"
    assert ", ".join(f"{kind} {step}" for kind, step, _ in metrics(tmp_path / "whole")) == steps
    assert (whole.progress.best_score, whole.progress.best_step) == (0.3, 6)
    assert whole.scores == {"score": 0.3, "undefined": None}
    for stop in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", stops_at=stop)
    parts = train(tmp_path / "parts")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for a, b in ((whole.model.state_dict(), parts.model.state_dict()), (whole.best, parts.best)):
        assert all(torch.equal(b[name], x) for name, x in a.items())
    # stopped after its last step: nothing is left to train, and the caller evaluates
    last = train(tmp_path / "parts")
    assert last.scores == {}
    assert torch.equal(last.model[0].weight, whole.model[0].weight)


def test_what_training_cannot_go_on_from(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"the loss became nan .* before step 6"):
        train(tmp_path, bad=4)
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 4
    # damaged checkpoints are named, too
    path = tmp_path / "checkpoint.pt"
    for damage in (lambda: path.write_bytes(b"none"), lambda: torch.save({"model": {}}, path)):
        damage()
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged or not a checkpoint"):
            train(tmp_path)
