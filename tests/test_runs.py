"""The frame of runs: order, failures, processes that die, folders, locks, and the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from ponet.checkpoint import CheckpointError
from ponet.run.cli import UsageError
from ponet.run.runs import (
    RunFolder,
    choose_device,
    exit_with_error,
    locked,
    run_all,
    run_program,
    threads_per_run,
)
from ponet.run.trainer import (
    RunOptions,
    Trainer,
    TrainingError,
    linear_schedule,
    matrices_and_vectors,
    step_seed,
)

OPTIONS = RunOptions(
    device=torch.device("cpu"), threads=1, log_every=2, checkpoint_seconds=0, shows_bar=False
)


@dataclass(frozen=True)
class NumberRun:
    """A run that gives its number, in a process of its own, which imports this module."""

    number: int
    parent: Path
    identity: int = 0
    options: RunOptions = OPTIONS

    @property
    def name(self) -> str:
        return f"run {self.number}"

    @property
    def folder(self) -> Path:
        return self.parent / str(self.number)

    def finished(self) -> dict[str, Any] | None:
        return RunFolder(self.folder).finished({"identity": self.identity})

    def execute(self) -> dict[str, Any]:
        if self.number == 13:
            raise TrainingError("thirteen is bad luck")
        if self.number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.number == 600:
            (self.folder / "process").write_text(str(os.getpid()))
            time.sleep(self.number)
        RunFolder(self.folder).begin({"identity": self.identity}, {"more": "details"})
        return RunFolder(self.folder).finish({"number": self.number, "process": os.getpid()})


def test_one_process_works_in_order_and_two_do_what_is_left(tmp_path: Path, capsys):
    results, failures = run_all("ponet", [NumberRun(n, tmp_path) for n in (3, 13, 1)], jobs=1)
    assert [result["number"] for result in results] == [3, 1]
    assert {result["process"] for result in results} == {os.getpid()}
    assert failures == ["run 13: thirteen is bad luck"]
    assert "ponet: error: run 13: thirteen is bad luck" in capsys.readouterr().err
    results, failures = run_all("ponet", [NumberRun(n, tmp_path) for n in (4, 2, 13, 1)], jobs=2)
    assert "1 of 4 runs are finished already" in capsys.readouterr().err
    assert results[0]["number"] == 1
    assert sorted(result["number"] for result in results) == [1, 2, 4]
    assert os.getpid() not in {result["process"] for result in results[1:]}
    assert failures == ["run 13: thirteen is bad luck"]


def test_a_killed_process_is_a_failure_and_not_a_traceback(tmp_path: Path):
    results, (failure,) = run_all("ponet", [NumberRun(n, tmp_path) for n in (-1, -2)], jobs=2)
    assert results == []
    assert "a process was killed" in failure
    assert "--jobs 1" in failure


def test_processes_end_with_a_killed_parent(tmp_path: Path):
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from ponet.run.runs import run_all\n"
        "from test_runs import NumberRun\n"
        "if __name__ == '__main__':\n"
        f"    folders = [Path({str(tmp_path)!r}) / name for name in 'ab']\n"
        "    run_all('ponet', [NumberRun(600, folder) for folder in folders], jobs=2)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    paths = [tmp_path / name / "600" / "process" for name in "ab"]
    try:
        wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    finally:
        parent.kill()
        parent.wait()
    children = [int(path.read_text()) for path in paths]
    wait_until(lambda: not any(map(is_running, children)))


def is_running(process: int) -> bool:
    """Nobody may have asked for the status of a process that has ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_folder_holds_one_run(tmp_path: Path):
    """What it was, what came out, no checkpoint once it is finished; another run is refused."""
    folder = RunFolder(tmp_path / "a")
    identity = {"rate": 1e-3, "sizes": (8, 16), "seed": None}
    assert folder.finished(identity) is None
    folder.begin(identity, {"more": "details"})
    folder.begin({"rate": 2.0}, {})
    assert folder.finished(identity) is None
    checkpoint = tmp_path / "a" / "part" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    result = folder.finish({"score": 0.5})
    assert folder.finished(identity) == result
    assert (result["score"], result["run"]) == (0.5, str(tmp_path / "a"))
    assert not checkpoint.exists()
    with pytest.raises(UsageError, match=r"a: holds a run .*\(rate 0.001, now 0.002\)"):
        folder.finished(identity | {"rate": 2e-3})
    for content in ("{", "[]"):
        (tmp_path / "a" / "result.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"result\.json: damaged.*delete its folder"):
            folder.finished(identity)


def test_folder_is_held_by_one(tmp_path: Path):
    folder = tmp_path / "runs" / "1"
    with locked(folder):
        assert folder.is_dir()
        with pytest.raises(TrainingError, match=r"another process is at this run in .*runs/1"):
            locked(folder).__enter__()
        (failure,) = run_all("ponet", [NumberRun(1, folder.parent)], jobs=1)[1]
        assert failure.startswith("run 1: another process is at this run")
    with FileLock(folder / ".lock", blocking=False):
        pass


def test_options_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    assert [threads_per_run(None, jobs) for jobs in (1, 2, 5, 9)] == [5, 2, 1, 1]
    assert threads_per_run(3, 2) == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds no GPU"):
        choose_device("cuda")


def test_programs_end_in_one_line(capsys):
    for error, status in ((UsageError("no"), 2), (OSError("no"), 1)):
        with pytest.raises(SystemExit) as ended:
            exit_with_error("glue", error)
        assert (ended.value.code, capsys.readouterr().err) == (status, "glue: error: no\n")
    for failures, status in (([], 0), (["one"], 1)):
        with pytest.raises(SystemExit) as ended:
            run_program("glue", lambda failures=failures: ({"runs": [1]}, failures))
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (ended.value.code, document) == (status, {"runs": [1], "failures": failures})


def test_linear_schedule():
    """Up to the peak in the last step of the warm-up, and one step short of zero at the end."""
    factors = [linear_schedule(i, steps=6, warmup_steps=2) for i in range(6)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert linear_schedule(0, steps=4, warmup_steps=0) == 1.0


def test_weight_decay_spares_vectors():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    matrices, vectors = matrices_and_vectors(model, 0.1)
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert [p.shape for p in vectors["params"]] == [(2,), (2,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


class NoisyStep:
    """A step on random data and dropout, both from the number of the step."""

    def __init__(self, model: nn.Module, stops_at: int | None = None, bad: int | None = None):
        self.model, self.stops_at, self.bad = model, stops_at, bad
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def __call__(self, step: int) -> Tensor:
        if step == self.stops_at:
            raise KeyboardInterrupt
        torch.manual_seed(step_seed(0, step))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        loss = self.model(torch.randn(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach() * (float("nan") if step == self.bad else 1)

    def learning_rate(self, step: int) -> float:
        return 0.1 * linear_schedule(step, steps=7, warmup_steps=0)


def trainer(scores: list[float], **changes: Any) -> tuple[nn.Module, Trainer]:
    """Seven steps, evaluated after the third, sixth and last, with given scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    return model, Trainer(
        model,
        NoisyStep(model, **changes),
        OPTIONS,
        name="a test",
        steps=7,
        eval_every=3,
        evaluate=lambda number: {"score": scores[number], "undefined": None},
        best_by="score",
    )


def metrics(folder: Path) -> list[Any]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["kind"], e["step"], e.get("loss", e.get("score"))) for e in entries]


def test_interrupted_training_continues_bit_for_bit(tmp_path: Path):
    scores = [0.1, 0.3, 0.3]
    model, whole = trainer(scores)
    whole.train(tmp_path / "whole")
    steps = "train 2, train 3, eval 3, train 4, train 6, eval 6, train 7, eval 7"
    assert ", ".join(f"{kind} {step}" for kind, step, _ in metrics(tmp_path / "whole")) == steps
    assert (whole.progress.best_score, whole.progress.best_step) == (0.3, 6)
    assert whole.scores == {"score": 0.3, "undefined": None}
    for stop in (1, 5):
        _, stopped = trainer(scores, stops_at=stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(tmp_path / "parts")
    again, parts = trainer(scores)
    parts.train(tmp_path / "parts")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for weights, others in ((model.state_dict(), again.state_dict()), (whole.best, parts.best)):
        assert all(torch.equal(others[name], x) for name, x in weights.items())
    # stopped after its last step: nothing is left to train, and the caller evaluates
    finished, last = trainer(scores)
    last.train(tmp_path / "parts")
    assert last.scores == {}
    assert torch.equal(finished[0].weight, model[0].weight)


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"the loss became nan .* before step 6"):
        trainer([0.1, 0.2, 0.3], bad=4)[1].train(tmp_path)
    other = trainer([])[1]
    other.restore(tmp_path / "checkpoint.pt")
    assert other.progress.step == 4


def test_damaged_checkpoints_are_named(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"no checkpoint")
    message = r"checkpoint\.pt: damaged or not a checkpoint"
    with pytest.raises(CheckpointError, match=message):
        trainer([])[1].train(tmp_path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=message):
        trainer([])[1].restore(path)
