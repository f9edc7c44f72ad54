"""The speed and memory benchmark at tiny sizes: tables, sentences, rows for bad luck, formulas."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT, harness, input_pipeline, speed_memory
from benchmarks.harness import Case, CaseRun, Workload, forecast, random_batch
from ponet import PoNetConfig, PoNetForPreTraining
from ponet.mixers import MIXERS
from ponet.packing import layout_of, stream_of_rows
from ponet.run.device import training_flops

TINY = "--batch-size 2 --device cpu --rounds 1"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program: exit status, rows of its record, everything printed."""

    def run(flags: str):
        words = [*flags.split(), *TINY.split(), "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["speed_memory.py", *words])
        status = 0
        try:
            speed_memory.main()
        except SystemExit as ended:
            status = ended.code
        (saved,) = tmp_path.glob("*.jsonl")
        record = json.loads(saved.read_text().splitlines()[-1])
        return status, record["rows"], capsys.readouterr().out

    return run


def a_case(**changes):
    fields = {"model": "lra", "mixer": "ponet", "seq_len": 32, "batch_size": 2, "device": "cpu"}
    return Case(**fields | changes)


def a_row(mixer: str, length: int, steps_per_s: float, mib: float = 60.0):
    train = {"steps_per_s": steps_per_s, "ms": 1e3 / steps_per_s, "peak_mib": mib, "steps": 3}
    train |= {"tokens_per_s": steps_per_s * length, "warm_up_only": False}
    shared = {"model": "lra", "seq_len": length, "state_mib": 10.0, "status": "ok", "reason": None}
    return {"mixer": mixer, "train": train, "infer": {"steps_per_s": 2.0}, "batch_size": 1} | shared


def test_program_from_another_folder(tmp_path):
    program = str(ROOT / "benchmarks/speed_memory.py")
    command = [sys.executable, program, "--seq-len", "32", "--mixers", "ponet", "fnet"]
    done = subprocess.run(
        [*command, *TINY.split()], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.glob("runs/benchmarks/*.jsonl")
    record = json.loads(saved.read_text())
    (image,) = tmp_path.glob("runs/benchmarks/*_1_speed_memory_lra.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert {"device", "torch", "commit", "command", "dtype", "threads"} <= record["card"].keys()
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["train"]["p20_ms"] <= row["train"]["ms"] <= row["train"]["p80_ms"]
        expected = row["batch_size"] * row["seq_len"] * row["train"]["steps_per_s"]
        assert row["train"]["tokens_per_s"] == pytest.approx(expected)
        assert row["infer"]["ms"] > 0
        # weights, gradients and two moments in float32
        assert row["state_mib"] == pytest.approx(row["parameters"] * 16 / 2**20)
        # two batches of int64 ids and labels
        assert row["input_mib"] == 2 * 2 * 8 * (row["seq_len"] + 1) / 2**20


def test_quick_ends_in_a_sentence_and_keeps_the_pictures_of_a_day(run, tmp_path):
    for _ in range(2):
        status, rows, printed = run("--quick --seq-len 32 64 --budget 1")
        assert status == 0, printed
        assert [(r["seq_len"], r["mixer"]) for r in rows] == [
            (length, mixer) for length in (32, 64) for mixer in ("ponet", "attention")
        ]
        assert all(row["train"] and row["infer"] is None for row in rows)
        assert printed.splitlines()[-1].startswith("On this machine PoNet trains ")
        assert "{" not in printed
    assert len(list(tmp_path.glob("*_[12]_speed_memory_lra.png"))) == 2


@pytest.mark.parametrize(
    ("speeds", "ending"),
    [
        ({256: 0.7, 1024: 1.4}, "; below about 500 tokens the Transformer is faster."),
        ({512: 1.04, 1024: 1.4}, "; at 512 tokens they are equal."),
        ({512: 1.3, 1024: 1.4}, "; at 512 tokens it is 1.3 times as fast."),
    ],
)
def test_sentence(speeds, ending):
    rows = []
    for length, speed in (speeds | {2048: 3.3, 4096: 5.8}).items():
        found = [a_row("ponet", length, speed), a_row("attention", length, 1.0)]
        speed_memory.add_ratios(found)
        rows += found
    start = "On this machine PoNet trains 3.3 times as fast as a Transformer at 2048 tokens and 5.8"
    assert speed_memory.summary(rows) == f"{start} times at 4096{ending}"
    last = "5.8 times as fast as a Transformer at 4096 tokens."
    assert speed_memory.summary(rows[-2:]).endswith(last)
    assert speed_memory.summary(rows[1:2]).endswith("there is nothing to compare.")


def test_pretraining_step_has_its_utilisation(run):
    flags = "--model pretraining --layers 1 --seq-len 64 --mixers ponet ponet_published"
    status, rows, printed = run(flags)
    assert status == 0, printed
    assert [row["infer"] for row in rows] == [None, None]
    assert 0 < rows[0]["utilisation"] < 1.5
    # no formula is no error
    assert rows[1]["flops"] is None
    assert "% matmul" in printed


def test_memory_limit_makes_a_row_and_spares_longer_lengths(run):
    status, rows, _ = run("--seq-len 2048 4096 --mixers ponet --memory-limit 40")
    assert status == 0
    short, long = rows
    assert short["status"] == long["status"] == "out of memory"
    assert long["reason"].startswith("already at 2048 tokens")
    assert short["reason"].startswith("no room for another ")
    assert short["train"] is None


def test_short_budget_serves_ponet_and_the_transformer(run, monkeypatch, tmp_path):
    # of a single step
    figures = {"first_ms": 1.0, "ms": [], "peak_mib": 2.0}

    def measure(case_run, seconds):
        time.sleep(0.35)
        case_run.found = {"state_mib": 1.0, "infer": figures, "train": figures}

    monkeypatch.setattr(CaseRun, "measure", measure)
    # two fit into 0.66 s
    status, rows, printed = run("--seq-len 32 --budget 0.011 --mixers fnet linear attention ponet")
    assert status == 0
    found = {row["mixer"]: row["status"] for row in rows}
    late = "skipped (over budget)"
    assert found == {"fnet": late, "linear": late, "attention": "ok", "ponet": "ok"}
    assert "no time left" in printed
    assert "~ a single step" in printed
    assert len(list(tmp_path.glob("*_1_speed_memory_lra.png"))) == 1


def test_what_does_not_run_is_a_row_and_a_failure_the_exit_status_1(run, monkeypatch):
    # known here, but not in the process of the case
    monkeypatch.setitem(MIXERS, "users_own", torch.nn.Identity)
    names = "ponet users_own attention:flash attention:cudnn"
    status, (ponet, own, flash, cudnn), printed = run(f"--seq-len 32 --mixers {names}")
    assert status == 1
    assert ponet["status"] == flash["status"] == "ok"
    assert own["status"] == "failed"
    assert own["reason"].startswith("ConfigError: mixer must be one of")
    assert "failed: ConfigError" in printed
    # the kernel of the GPU
    assert cudnn["reason"] == "attention:cudnn does not run on this device and dtype"
    expected = ponet["train"]["steps_per_s"] / flash["train"]["steps_per_s"]
    assert ponet["over_sdpa"]["speed"] == pytest.approx(expected)


def test_unfit_lengths_are_foreseen():
    shorter = CaseRun(a_case(seq_len=1024), found={"train": {"first_ms": 2000.0}})
    assert forecast(None, 1024, 10.0) == forecast(shorter, 4096, 8.5) == ("ok", None)
    reason = "about 8 s expected from shorter lengths"
    assert forecast(shorter, 4096, 7.5) == (harness.SKIPPED, reason)
    shorter.status, shorter.reason = "timeout", "too slow"
    reason = "already at 1024 tokens: too slow"
    assert forecast(shorter, 4096, 100.0) == (harness.SKIPPED, reason)


def test_published_figures_and_ratios():
    # the ratios that the paper prints beside its figures, which it cuts off where it does not round
    printed = {512: (1.1, 0.8), 1024: (2.1, 0.5), 2048: (4.4, 0.2), 4096: (9.0, 0.1)}
    for length, (speed, memory) in printed.items():
        rows = [a_row("ponet", length, 6.0, 40.0), a_row("attention", length, 3.0, 25.0)]
        rows += [a_row("attention_checkpointed", length, 1.0, 310.0), a_row("bigbird", length, 1.0)]
        speed_memory.add_ratios(rows)
        assert rows[0]["published"]["speed"] == pytest.approx(speed, abs=0.05)
        assert rows[0]["published"]["memory"] == pytest.approx(memory, abs=0.06)
    assert rows[0]["over_transformer"] == {"speed": 6.0, "infer_speed": 1.0, "memory": 0.1}
    assert rows[0]["over_sdpa"] == {"speed": 2.0, "infer_speed": 1.0, "memory": 2.0}
    assert rows[3]["published"] == {"speed": None, "memory": None}
    rows.append(a_row("attention:cudnn", 4096, 5.0, 25.0))
    speed_memory.add_ratios(rows)
    assert rows[0]["over_sdpa"]["speed"] == 1.2


def test_exponents_are_of_the_time_per_sequence():
    # at constant tokens per batch a constant time means linear growth
    rows = [a_row("ponet", n, 1e3) | {"batch_size": 8192 // n} for n in (1024, 2048, 4096)]
    assert speed_memory.exponents(rows) == {"ponet": pytest.approx(1.0)}
    assert speed_memory.exponents(rows[:1]) == {}


def test_workloads_have_the_published_size_and_segments():
    assert Workload(a_case(seq_len=4096)).facts["parameters"] == 387_202
    # text classifiers have segments of two tokens
    for length in (2, 7, 32, 4096):
        config = a_case(seq_len=length).config()
        stream = stream_of_rows(torch.zeros(2, length, dtype=torch.long), None)
        special = torch.zeros(2 * length, dtype=torch.bool)
        sizes = layout_of(stream, special, None, config.num_segments).cu_segments.diff().tolist()
        assert sizes == 2 * ([2] * (length // 2) + [1] * (length % 2))
    case = a_case(model="pretraining", seq_len=100, batch_size=3)
    batch = random_batch(case, case.config(), torch.Generator().manual_seed(0))
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [15, 15, 15]
    for row in batch["segment_ids"]:
        sizes = row.unique_consecutive(return_counts=True)[1].tolist()
        assert all(10 <= size <= 40 for size in sizes[:-1])


@pytest.mark.parametrize("mixer", ["ponet", "attention", "attention_naive", "fnet"])
def test_formula_agrees_with_the_counter(mixer):
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 256}
    sizes |= {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 128}
    config = PoNetConfig(mixer=mixer, num_sentence_labels=0, **sizes)
    ids = torch.randint(200, 1000, (4, 128))
    labels = torch.full_like(ids, -100)
    labels[:, :19] = 3
    counter = FlopCounterMode(display=False)
    # the fused kernel of the CPU is unknown to the counter
    with counter, sdpa_kernel(SDPBackend.MATH):
        PoNetForPreTraining(config)(ids, labels=labels).loss.backward()
    # PoNet's global aggregation is one operator, which the counter does not look into
    expected = training_flops(config, tokens=4 * 128, labelled=4 * 19, seq_len=128)
    tolerance = 0.01 if mixer == "ponet" else 1e-9
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


def test_input_pipeline_is_timed(monkeypatch, tmp_path):
    flags = f"--data {ROOT / 'docs'} --repeats 1 --seq-len 64 --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["input_pipeline.py", *flags.split()])
    threads = torch.get_num_threads()
    input_pipeline.main()
    torch.set_num_threads(threads)
    (saved,) = tmp_path.glob("*.jsonl")
    record = json.loads(saved.read_text())
    stages = {"split_sentences", "raw encode_batch", "build_corpus"}
    stages |= {"plan_epoch", "pack_bins", "draw_batch", "whole loader"}
    assert {row["stage"] for row in record["rows"]} == stages
    assert all(row["median"] > 0 for row in record["rows"])
    assert record["efficiency"] > 0.5
