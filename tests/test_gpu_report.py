"""The GPU report on a CPU: parts that fail or hang, what is left out, and some parts end to end."""

import importlib
import json
import re
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# leaves a child behind that would outlive it
HANGS = "import subprocess, sys, time; subprocess.Popen(['sleep', '987']); time.sleep(987)"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_report")


@pytest.fixture
def run(report, monkeypatch, tmp_path, capsys):
    """Run the program with some flags: status, lines of the table by part, records by part."""

    def run(*flags: str, folder: Path = tmp_path / "report"):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        status = 0
        try:
            report.main()
        except SystemExit as ended:
            status = ended.code
        lines = [x.split("\t") for x in (folder / "parts.tsv").read_text().splitlines()]
        records = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
        table = capsys.readouterr().out.split("\npart  ")[1]
        assert [line[0] for line in lines] == [record["part"] for record in records]
        assert all(line[0] in table for line in lines)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) <= 8
        assert all(re.fullmatch(r"[\w.-]+", path.name, re.ASCII) for path in files)
        return status, {x[0]: x[1:] for x in lines}, {x["part"]: x["record"] for x in records}

    return run


def part(report: ModuleType, name: str, code: str, **changes: object):
    braces = str.maketrans({"{": "{{", "}": "}}"})
    command = f"{{python}} -c {shlex.quote(code.translate(braces))}"
    return report.Part(**{"name": name, "seconds": 60, "command": command, "tiny": ""} | changes)


def test_bad_parts_do_not_stop_the_next(report, run, monkeypatch, tmp_path):
    goal = {"goal": "K1", "measured": 3.0, "floor": 5.0, "verdict": "below floor", "quantity": "q"}
    good = f"print({json.dumps({'rows': [1, 2], 'goals': [goal]})!r})"
    parts = [
        part(report, "hangs", HANGS, seconds=1.5),
        part(report, "crashes", "import os; os.abort()"),
        part(report, "fails", "print('began'); raise ValueError('no such luck')"),
        part(report, "talks", "print('x' * 1000000); print('the end')"),
        part(report, "lacks", "pass", packages=("no_such_package",), programs=("no-such-program",)),
        part(report, "good", good, headline=lambda r: f"{len(r['rows'])} rows"),
    ]
    monkeypatch.setattr(report, "PARTS", parts)
    before = time.monotonic()
    status, lines, records = run("--tiny")
    assert time.monotonic() - before < 30
    assert status == 1
    assert {name: line[0] for name, line in lines.items()} == {
        "hangs": "timeout",
        "crashes": "signal 6",
        "fails": "status 1",
        "talks": "ok",
        "lacks": "left out",
        "good": "ok",
    }
    assert lines["fails"][2] == "ValueError: no such luck"
    assert lines["lacks"][2] == "not installed: no_such_package, no-such-program"
    assert lines["good"][2] == "2 rows"
    assert records["good"]["goals"] == [goal]
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987"]
    ]
    log = (tmp_path / "report/log.txt").read_text()
    assert "the end" in log
    assert len(log) < 60_000


def test_budget_cuts_short_and_leaves_out(report, run, monkeypatch):
    parts = [part(report, name, "import time; time.sleep(60)") for name in ("first", "second")]
    monkeypatch.setattr(report, "PARTS", parts)
    status, lines, _ = run("--tiny", "--budget", "2")
    assert status == 0
    assert [line[0] for line in lines.values()] == ["cut short", "left out"]
    assert lines["second"][2] == "needs 1 s, 0 s are left"


def test_goals_of_full_size_have_verdicts(report):
    goals = [
        {"goal": "K1", "measured": 9.0, "verdict": "met"},
        {"goal": "K3", "measured": 0.7, "verdict": "below target"},
        {"goal": "K1", "measured": 3.0, "verdict": "below floor"},
    ]
    assert report._verdicts(goals) == "K1 3 below floor, K3 0.7 below target"


def test_what_is_left_out_is_no_failure(report, run, monkeypatch, tmp_path):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    status, lines, _ = run()
    assert status == 0
    assert len(lines) == len(report.PARTS)
    reason = "no GPU; --tiny is for a CPU, too"
    assert {tuple(line[::2]) for line in lines.values()} == {("left out", reason)}
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    status, lines, _ = run("--only", "listops", "--budget", "50", folder=tmp_path / "short")
    assert (status, lines["listops"][0]) == (0, "left out")
    assert lines["listops"][2] == "needs 100 s, 50 s are left"


def test_parts_end_to_end(run, tmp_path):
    status, lines, records = run("--tiny", "--only", "operators", "latency", "memcheck")
    assert status == 0, (tmp_path / "report/log.txt").read_text()
    assert lines["memcheck"][::2] == ["left out", "no GPU"]
    rows = records["operators"]["rows"]
    assert lines["operators"][2] == f"{len(rows)} of {len(rows)} right"
    assert {row["what"].split()[1] for row in rows} == {"bfloat16", "float16", "float32", "float64"}
    mixers = [row["mixer"] for row in records["latency"]["rows"]]
    assert mixers == ["ponet", "attention", "fnet"]
    assert lines["latency"][2].startswith("ponet eager ")


def test_commands_can_be_filled_in(report, monkeypatch, tmp_path):
    """At both sizes, with a folder whose name has a space."""
    folder = tmp_path / "a b"
    for flags in ([], ["--tiny"]):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        options = report.parse_options()
        for one in report.PARTS:
            words = report._fill_in(one, options, str(folder), 80.0)
            assert not [word for word in words if "{" in word]
            assert one.name != "profile" or f"{folder}/profile.txt" in words
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts
            assert all((report.ROOT / script).is_file() for script in scripts)
