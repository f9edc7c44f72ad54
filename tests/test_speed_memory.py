"""The speed and memory benchmark end to end at tiny sizes, its arithmetic, rows for bad luck."""

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ponet.packing import layout_of, stream_of_rows

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "speed_memory.py"
TINY = ("--batch-size", "2", "--threads", "1", "--device", "cpu", "--rounds", "1")
MIXERS = ("--mixers", "ponet", "ponet_eager")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the benchmarks, which find each other because they are scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(*flags: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags, "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def record_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def a_case(workloads: ModuleType, **changes: Any) -> Any:
    fields = {
        "model": "lra",
        "mixer": "ponet",
        "seq_len": 32,
        "batch_size": 2,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    return workloads.Case(**fields | changes)


def test_run_leaves_table_json_and_figure(tmp_path):
    done = run("--seq-len", "64", "32", *TINY, *MIXERS, output=tmp_path)
    assert done.returncode == 0, done.stderr
    record = record_of(done)
    assert [(row["seq_len"], row["mixer"], row["status"]) for row in record["rows"]] == [
        (length, mixer, "ok") for length in (32, 64) for mixer in ("ponet", "ponet_eager")
    ]
    for row in record["rows"]:
        assert row["train"]["p20_ms"] <= row["train"]["ms"] <= row["train"]["p80_ms"]
        expected = row["batch_size"] * row["seq_len"] * row["train"]["steps_per_s"]
        assert row["train"]["tokens_per_s"] == pytest.approx(expected)
        assert row["infer"]["ms"] > 0
        assert row["train"]["peak_mib"] >= 0
        # weights, gradients and two moments in float32
        assert row["state_mib"] == pytest.approx(row["parameters"] * 16 / 2**20)
        # two batches of int64 ids and labels
        assert row["input_mib"] == 2 * 2 * 8 * (row["seq_len"] + 1) / 2**20
    assert {"device", "torch", "commit", "command", "dtype", "threads"} <= record["card"].keys()
    (saved,) = tmp_path.glob("*.jsonl")
    assert json.loads(saved.read_text()) == record
    (image,) = tmp_path.glob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    lines = [line.split()[:2] for line in done.stdout.splitlines() if " ponet" in line]
    assert ["64", "ponet_eager"] in lines


def test_forced_kernel_runs_or_is_a_row(tmp_path):
    mixers = ("--mixers", "ponet", "attention:flash", "attention:cudnn")
    done = run("--seq-len", "32", *TINY, *mixers, output=tmp_path)
    assert done.returncode == 0, done.stderr
    ponet, flash, cudnn = record_of(done)["rows"]
    assert flash["status"] == "ok"
    # the kernel of the GPU
    assert cudnn["status"] == "not available"
    assert cudnn["reason"] == "attention:cudnn does not run on this device and dtype"
    expected = ponet["train"]["steps_per_s"] / flash["train"]["steps_per_s"]
    assert ponet["over_sdpa"]["speed"] == pytest.approx(expected)


def test_memory_limit_makes_a_row_and_spares_longer_lengths(tmp_path):
    flags = ("--seq-len", "2048", "4096", "--mixers", "ponet", "--memory-limit", "40", *TINY)
    done = run(*flags, output=tmp_path)
    assert done.returncode == 0, done.stderr
    short, long = record_of(done)["rows"]
    assert short["status"] == long["status"] == "out of memory"
    assert long["reason"].startswith("already at 2048 tokens")
    assert short["reason"].startswith("no room for another ")
    assert short["train"] is None


def test_budget_makes_rows(tmp_path):
    done = run("--seq-len", "32", "--budget", "1e-6", *TINY, *MIXERS, output=tmp_path)
    assert done.returncode == 0, done.stderr
    record = record_of(done)
    assert [row["status"] for row in record["rows"]] == ["skipped (over budget)"] * 2
    assert "no time left" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mixers", "ponet", "attenshun"), "unknown mixer 'attenshun'; known are ponet, ponet_"),
        (("--seq-len", "0"), "--seq-len: expected a number above 0, found 0"),
        (("--batch-size", "2", "--tokens", "64"), "not allowed with"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    done = run(*flags, output=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_process_that_is_too_slow_or_fails_is_reported(load):
    client, workloads = load("case_client"), load("workloads")
    process = client.CaseProcess(a_case(workloads))
    with pytest.raises(client.CaseStopped) as stopped:
        # it is still importing
        process.ask(0.01, do="build")
    assert stopped.value.status == "timeout"

    process = client.CaseProcess(a_case(workloads))
    process._process.kill()
    with pytest.raises(client.CaseStopped, match="out of memory: the system killed the process"):
        process.ask(120, do="build")
    process.close()

    process = client.CaseProcess(a_case(workloads, mixer="nonesuch"))
    with pytest.raises(client.CaseStopped) as stopped:
        process.ask(120, do="build")
    process.close()
    assert stopped.value.status == "failed"
    assert stopped.value.reason.startswith("ConfigError: mixer must be one of")


def test_failure_makes_the_exit_status_1(load, monkeypatch, tmp_path, capsys):
    speed_memory, rounds = load("speed_memory"), load("rounds")

    def fail(runner: Any, cases: list[Any], lengths_left: int) -> list[dict[str, Any]]:
        stopped = rounds.CaseStopped("failed", "ValueError: no such thing")
        runs = [rounds.CaseRun(case) for case in cases]
        for run in runs:
            run.stop(stopped)
        return [run.row() for run in runs]

    monkeypatch.setattr(rounds.Runner, "measure", fail)
    flags = ["--seq-len", "32", *TINY, *MIXERS, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed_memory.py", *flags])
    with pytest.raises(SystemExit) as ended:
        speed_memory.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if line.startswith("    32 ponet ")]
    assert line.split()[2:] == ["failed", "-", "-", "ValueError:", "no", "such", "thing"]


def test_unfit_lengths_are_foreseen(load):
    rounds, workloads = load("rounds"), load("workloads")
    runs = []
    for length, ms in ((512, 100.0), (1024, 400.0)):
        run = rounds.CaseRun(a_case(workloads, seq_len=length))
        run.warm_up = {"infer": ms, "train": 3 * ms}
        runs.append(run)
    assert rounds._expected_seconds([], 512) == 0
    assert rounds._expected_seconds(runs[:1], 1024) == pytest.approx(1.6)
    assert rounds._expected_seconds(runs, 4096) == pytest.approx(1.6 * 16)
    runner = rounds.Runner(1000, 1)
    runner._earlier = {("ponet", False): runs}
    longer = rounds.CaseRun(a_case(workloads, seq_len=4096))
    runner._refuse_hopeless(longer, allowance=26)
    with pytest.raises(rounds.CaseStopped, match="about 26 s expected from shorter lengths"):
        runner._refuse_hopeless(longer, allowance=25)


def test_rounds_are_shared_out(load):
    plan = load("rounds").plan_rounds
    assert plan([1, 1], 100, 5) == [5, 5]
    # the slow one gets none, and the fast ones what it leaves
    assert plan([30, 1, 1], 9, 5) == [0, 5, 4]
    # what the fast one leaves is enough for two of the slow one's
    assert plan([1, 10], 25, 5) == [5, 2]
    assert plan([1, 2], -3, 5) == [0, 0]


def test_exponent_of_synthetic_times(load):
    exponent = load("rounds").exponent
    assert exponent([(n, 3e-3 * n**1.7) for n in (1024, 2048, 4096)]) == pytest.approx(1.7)
    assert exponent([(1024, 1.0)]) is None
    speed_table = load("speed_table")
    rows = [
        {
            "mixer": "ponet",
            "seq_len": n,
            "batch_size": 8192 // n,
            "train": {"ms": 8192 / n * n**1.25} if n > 512 else None,
            "infer": {"ms": 5.0},
        }
        for n in (512, 1024, 2048, 4096, 8192)
    ]
    found = speed_table.exponents(rows, ["ponet", "fnet"])
    # at constant tokens a batch a constant time means linear growth
    assert found["ponet"] == pytest.approx({"train": 1.25, "infer": 1.0})
    assert found["fnet"] == {"train": None, "infer": None}


def test_published_table(load):
    published = load("published")
    assert published.STEPS_PER_S["PoNet"][published.LENGTHS.index(4096)] == 16.2
    assert published.MEMORY_GB["Nystromformer"][published.LENGTHS.index(16384)] == 8.2
    # the ratios that the paper prints beside its figures
    printed = {512: (1.1, 0.8), 1024: (2.1, 0.5), 2048: (4.4, 0.2), 4096: (9.0, 0.1)}
    for length, (speed, memory) in printed.items():
        ratio = published.published_speed_up("ponet", length)
        assert ratio == pytest.approx(speed, abs=0.05)
        # the paper cuts off where it does not round
        ratio = published.published_memory_ratio("ponet_eager", length)
        assert ratio == pytest.approx(memory, abs=0.06)
    assert published.published_speed_up("ponet", 8192) is None
    assert published.published_speed_up("ponet", 100) is None
    assert published.published_memory_ratio("bigbird", 512) is None


def test_ratios_are_against_the_transformers(load):
    speed_table = load("speed_table")

    def a_row(mixer: str, steps_per_s: float, mib: float) -> dict[str, Any]:
        train = {"steps_per_s": steps_per_s, "peak_mib": mib}
        shared = {"model": "lra", "seq_len": 4096, "state_mib": 10.0}
        return {"mixer": mixer, "train": train, "infer": {"steps_per_s": 2.0}, **shared}

    rows = [a_row("ponet", 6.0, 40.0), a_row("attention", 3.0, 25.0)]
    rows += [a_row("attention_checkpointed", 1.0, 310.0)]
    speed_table.add_ratios(rows)
    assert rows[0]["over_transformer"] == {"speed": 6.0, "infer_speed": 1.0, "memory": 0.1}
    assert rows[0]["over_sdpa"] == {"speed": 2.0, "infer_speed": 1.0, "memory": 2.0}
    assert rows[0]["published"]["speed"] == pytest.approx(9.0)
    assert rows[1]["published"] == {"speed": None, "memory": None}
    rows.append(a_row("attention:cudnn", 5.0, 25.0))
    speed_table.add_ratios(rows)
    assert rows[0]["over_sdpa"]["speed"] == 1.2


@pytest.mark.parametrize("length", [2, 7, 32, 4096], ids=lambda n: f"N{n}")
def test_segments_of_the_lra_model_have_two_tokens(load, length):
    workloads = load("workloads")
    config = workloads.config_of(a_case(workloads, seq_len=length))
    stream = stream_of_rows(torch.zeros(2, length, dtype=torch.long), None)
    special = torch.zeros(2 * length, dtype=torch.bool)
    sizes = layout_of(stream, special, None, config.num_segments).cu_segments.diff().tolist()
    row = [2] * (length // 2) + [1] * (length % 2)
    assert sizes == 2 * row


def test_lra_model_has_the_published_size(load):
    workloads = load("workloads")
    config = workloads.config_of(a_case(workloads, seq_len=4096))
    ours = sum(p.numel() for p in workloads.TextClassifier(config).parameters())
    assert ours == 387_202


def test_text_batch_masks_the_same_share_of_every_sequence(load):
    workloads = load("workloads")
    case = a_case(workloads, model="pretraining", seq_len=100, batch_size=3)
    generator = torch.Generator().manual_seed(0)
    batch = workloads._text_batch(case, workloads.config_of(case), generator)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [15, 15, 15]
    assert batch["sso_labels"].shape == (3,)
    for row in batch["segment_ids"]:
        sizes = row.unique_consecutive(return_counts=True)[1].tolist()
        assert all(10 <= size <= 40 for size in sizes[:-1])


def test_labels_of_a_figure_move_apart(load):
    spread = load("speed_plot").spread
    assert spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    moved = spread([0.50, 0.2, 0.51, 0.56], 0.1)
    order = sorted(moved)
    assert all(b - a > 0.099 for a, b in itertools.pairwise(order))
    assert moved[1] == 0.2


def test_figure_marks_what_is_missing(load, tmp_path):
    figure_rows = []
    for length in (512, 1024):
        for mixer, status in (("ponet", "ok"), ("attention_naive", "out of memory")):
            found = {"tokens_per_s": 5e3, "peak_mib": 12.0} if status == "ok" else None
            shared = {"model": "lra", "seq_len": length, "reason": None}
            figure_rows.append({"mixer": mixer, "status": status, "train": found, **shared})
    card = {
        "device": "cpu",
        "batch": "2",
        "dtype": "float32",
        "torch": "2",
        "commit": "0",
        "date": "",
    }
    record = {"benchmark": "speed_memory", "card": card, "rows": figure_rows}
    speed_plot = load("speed_plot")
    assert speed_plot.draw(record, tmp_path / "lines.png") == tmp_path / "lines.png"
    record["rows"] = figure_rows[:2]
    assert speed_plot.draw(record, tmp_path / "bars.png") == tmp_path / "bars.png"
