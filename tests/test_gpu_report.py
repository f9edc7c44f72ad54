"""The GPU report on a CPU: parts that fail or hang, what is left out, and some parts end to end."""

import json
import re
import shlex
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import ROOT, gpu_report

# leaves a child behind that would outlive it
HANGS = "import subprocess, sys, time; subprocess.Popen(['sleep', '987']); time.sleep(987)"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program with some flags: status, lines of the table by part, records by part."""

    def run(*flags: str, folder: Path = tmp_path / "report"):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        status = 0
        try:
            gpu_report.main()
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


def part(name: str, code: str, **changes: object) -> gpu_report.Part:
    braces = str.maketrans({"{": "{{", "}": "}}"})
    command = f"{{python}} -c {shlex.quote(code.translate(braces))}"
    return gpu_report.Part(
        **{"name": name, "seconds": 60, "command": command, "tiny": ""} | changes
    )


def test_bad_parts_do_not_stop_the_next(run, monkeypatch, tmp_path):
    good = f"print('two rows'); print({json.dumps({'rows': [1, 2]})!r})"
    parts = [
        part("hangs", HANGS, seconds=0.5),
        part("crashes", "import os; os.abort()"),
        part("fails", "print('began'); raise ValueError('no such luck')"),
        part("talks", "print('x' * 1000000); print('the end')"),
        part("lacks", "pass", packages=("no_such_package",), programs=("no-such-program",)),
        part("good", good),
    ]
    monkeypatch.setattr(gpu_report, "PARTS", parts)
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
    assert lines["good"][2] == "two rows"
    assert records["good"] == {"rows": [1, 2]}
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987"]
    ]
    log = (tmp_path / "report/log.txt").read_text()
    assert "the end" in log
    assert len(log) < 60_000


def test_budget_cuts_short_and_leaves_out(run, monkeypatch):
    parts = [part(name, "import time; time.sleep(60)") for name in ("first", "second")]
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    status, lines, _ = run("--tiny", "--budget", "2")
    assert status == 0
    assert [line[0] for line in lines.values()] == ["cut short", "left out"]
    assert lines["second"][2] == "needs 1 s, 0 s are left"


def test_what_is_left_out_is_no_failure(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    status, lines, _ = run()
    assert status == 0
    assert len(lines) == len(gpu_report.PARTS)
    reason = "no GPU; --tiny is for a CPU, too"
    assert {tuple(line[::2]) for line in lines.values()} == {("left out", reason)}
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: True)
    status, lines, _ = run("--only", "listops", "--budget", "50", folder=tmp_path / "short")
    assert (status, lines["listops"][0]) == (0, "left out")
    assert lines["listops"][2] == "needs 100 s, 50 s are left"


def test_parts_end_to_end(run, tmp_path):
    status, lines, records = run("--tiny", "--only", "latency", "memcheck")
    assert status == 0, (tmp_path / "report/log.txt").read_text()
    assert lines["memcheck"][::2] == ["left out", "no GPU"]
    mixers = [row["mixer"] for row in records["latency"]["rows"]]
    assert mixers == ["ponet", "attention", "fnet"]
    assert lines["latency"][2].startswith("mixer ponet, eager_ms ")


def test_commands_can_be_filled_in(monkeypatch, tmp_path):
    """At both sizes, with a folder whose name has a space."""
    folder = tmp_path / "a b"
    for flags in ([], ["--tiny"]):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags, "--output", str(folder)])
        options = gpu_report.parse_options()
        for one in gpu_report.PARTS:
            words = gpu_report._fill_in(one, options, str(folder), 80.0)
            assert not [word for word in words if "{" in word]
            assert one.name != "profile" or str(folder) in words
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts
            assert all((ROOT / script).is_file() for script in scripts)
