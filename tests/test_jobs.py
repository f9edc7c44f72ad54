"""Several runs in one command: order, failures, processes that die, locks, threads."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from ponet.run.cli import UsageError
from ponet.run.runs import choose_device, complain, locked, run_all, threads_of_a_job
from ponet.run.trainer import TrainingError


def work(number: int) -> dict[str, int] | str:
    """Runs in a process of its own, which imports this module."""
    if number == 13:
        return "thirteen is bad luck"
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": number, "process": os.getpid()}


def test_one_process_works_in_order_and_takes_calls_one_by_one():
    seen = []

    def calls():
        for number in (3, 13, 1):
            seen.append(number)
            yield (number,)

    def work_and_look(number: int) -> dict[str, int] | str:
        assert seen[-1] == number
        return work(number)

    results, failures = run_all("ponet", work_and_look, calls(), 1)
    assert [result["number"] for result in results] == [3, 1]
    assert failures == ["thirteen is bad luck"]
    assert {result["process"] for result in results} == {os.getpid()}


def test_processes_do_all_of_it(caplog):
    results, failures = run_all("ponet", work, [(n,) for n in (1, 2, 13, 4)], 2)
    assert sorted(result["number"] for result in results) == [1, 2, 4]
    assert os.getpid() not in {result["process"] for result in results}
    assert failures == ["thirteen is bad luck"]
    assert "ponet: error: thirteen is bad luck" in caplog.text


def test_a_killed_process_is_a_failure_and_not_a_traceback():
    results, failures = run_all("ponet", work, [(-1,)], 2)
    assert results == []
    (failure,) = failures
    assert "a process was killed" in failure
    assert "--jobs 1" in failure


def wait_long(path: str) -> dict[str, int]:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def test_processes_end_with_a_killed_parent(tmp_path: Path):
    paths = [tmp_path / "one", tmp_path / "two"]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from ponet.run.runs import run_all\n"
        "from test_jobs import wait_long\n"
        "if __name__ == '__main__':\n"
        f"    run_all('ponet', wait_long, [(p,) for p in {[str(path) for path in paths]!r}], 2)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
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


def test_folder_is_held_by_one(tmp_path: Path):
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        assert folder.is_dir()
        with pytest.raises(TrainingError, match=r"another process is at this run in .*runs/a"):
            locked(folder).__enter__()
    with FileLock(folder / ".lock", blocking=False):
        pass


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    assert [threads_of_a_job(None, jobs) for jobs in (1, 2, 5, 9)] == [5, 2, 1, 1]
    assert threads_of_a_job(3, 2) == 3


def test_missing_gpu_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds no GPU") as caught:
        choose_device("cuda")
    assert complain("glue", caught.value) == 2
    assert complain("glue", OSError("no space")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "glue: error: no space"
