"""The GPU report on a CPU: parts that fail or hang, what is left out, and some parts end to end."""

import json
import re
import shlex
import sys

import psutil
import pytest

from benchmarks import ROOT, gpu_report

# leaves a child behind that would outlive it
HANGS = "import subprocess, sys, time; subprocess.Popen(['sleep', '987']); time.sleep(987)"
SAVES = "print('three rows'); open('{scratch}/cpu.jsonl', 'w').write('[1]' + chr(10) + '[3]')"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program with some flags: status, and what it found by part."""
    folder = tmp_path / "report"

    def run(*flags: str):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        status = 0
        try:
            gpu_report.main()
        except SystemExit as ended:
            status = ended.code
        lines = (folder / "results.jsonl").read_text().splitlines()
        found = {facts["part"]: facts for facts in map(json.loads, lines)}
        table = capsys.readouterr().out.split("\npart  ")[1]
        assert all(name in table for name in found)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) <= 8
        assert all(re.fullmatch(r"[\w.-]+", path.name, re.ASCII) for path in files)
        return status, found

    return run


def part(name: str, code: str, seconds: float = 60, **changes: str) -> gpu_report.Part:
    return gpu_report.Part(name, seconds, f"{{python}} -c {shlex.quote(code)}", "", **changes)


def test_bad_parts_do_not_stop_the_next(run, monkeypatch, tmp_path):
    record = json.dumps({"rows": [1, 2]})
    parts = [
        part("hangs", HANGS, seconds=0.5),
        part("crashes", "import os; os.abort()"),
        part("fails", "print('began'); raise ValueError('no such luck')"),
        part("talks", "print('x' * 1000000); print('the end')"),
        part("lacks", "pass", needs="no-such-program"),
        part("prints", f"print('two rows'); print('{{{record}}}')"),
        part("saves", SAVES),
    ]
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    status, found = run("--tiny")
    assert status == 1
    states = [facts["state"] for facts in found.values()]
    assert states == ["timeout", "signal 6", "status 1", "ok", "left out", "ok", "ok"]
    assert found["fails"]["summary"] == "ValueError: no such luck"
    assert found["lacks"]["summary"] == "not installed: no-such-program"
    assert [found["prints"][x] for x in ("summary", "record")] == ["two rows", {"rows": [1, 2]}]
    assert [found["saves"][x] for x in ("summary", "record")] == ["three rows", [3]]
    running = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "987"] not in running
    log = (tmp_path / "report/log.txt").read_text()
    assert "the end" in log
    assert len(log) < 60_000


def test_budget_cuts_short_and_leaves_out(run, monkeypatch):
    parts = [part(name, "import time; time.sleep(60)") for name in ("first", "second")]
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    status, found = run("--tiny", "--budget", "2")
    assert status == 0
    assert [facts["state"] for facts in found.values()] == ["cut short", "left out"]
    assert found["second"]["summary"] == "needs 1 s, 0 s are left"


def test_what_is_left_out_is_no_failure(run, monkeypatch):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    status, found = run()
    assert status == 0
    assert len(found) == len(gpu_report.PARTS)
    reason = "no GPU; --tiny is for a CPU, too"
    assert {(x["state"], x["summary"]) for x in found.values()} == {("left out", reason)}


def test_parts_end_to_end(run, tmp_path):
    status, found = run("--tiny", "--only", "latency", "memcheck", "card")
    assert status == 0, (tmp_path / "report/log.txt").read_text()
    assert found["memcheck"]["summary"] == "no GPU"
    mixers = [row["mixer"] for row in found["latency"]["record"]["rows"]]
    assert mixers == ["ponet", "attention", "fnet"]
    assert found["latency"]["summary"].startswith("mixer ponet, eager_ms ")
    assert found["card"]["record"]["benchmark"] == "op_speed"


def test_commands_can_be_filled_in(monkeypatch, tmp_path):
    """At both sizes, with a folder whose name has a space."""
    folder = tmp_path / "a b"
    for flags in ([], ["--tiny"]):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        options = gpu_report.parse_options()
        for one in gpu_report.PARTS:
            words = gpu_report.command_of(one, options, str(folder), 80.0)
            assert not [word for word in words if "{" in word]
            assert one.name != "profile" or str(folder) in words
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts
            assert all((ROOT / script).is_file() for script in scripts)
