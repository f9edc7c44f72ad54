"""The pre-training benchmark end to end at a tiny size, and its operations against a counter."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ponet import PoNetConfig, PoNetForPreTraining
from ponet.mixers import MIXERS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "pretraining.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def counted_flops(config: PoNetConfig, batch_size: int, seq_len: int, labelled: int) -> int:
    """Operations of matrix products in a training step, as PyTorch counts them."""
    model = PoNetForPreTraining(config)
    ids = torch.randint(200, config.vocab_size, (batch_size, seq_len))
    labels = torch.full_like(ids, -100)
    labels[:, :labelled] = 3
    counter = FlopCounterMode(display=False)
    # the fused kernel of the CPU is unknown to the counter
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(ids, labels=labels).loss
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mixer", ["ponet", "attention", "attention_naive", "fnet"])
def test_formula_agrees_with_the_counter(mixer, monkeypatch):
    if mixer not in MIXERS:
        pytest.skip(f"{mixer} is not registered")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    flops = importlib.import_module("flops")
    config = PoNetConfig(
        vocab_size=1000,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=256,
        max_position_embeddings=128,
        mixer=mixer,
        num_sentence_labels=0,
    )
    expected = flops.training_flops(config, tokens=4 * 128, labelled=4 * 19, seq_len=128)
    counted = counted_flops(config, batch_size=4, seq_len=128, labelled=19)
    # PoNet's global aggregation is one operator, which the counter does not look into
    tolerance = 0.01 if mixer == "ponet" else 1e-9
    assert counted == pytest.approx(expected, rel=tolerance)


def test_formula_refuses_other_mixers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    flops = importlib.import_module("flops")
    with pytest.raises(ValueError, match="no formula for mixer 'ponet_eager'"):
        flops.training_flops(PoNetConfig(mixer="ponet_eager"), 1, 1, 1)


def test_run_leaves_table_and_json(tmp_path):
    done = run(
        *("--layers", "1", "--seq-len", "64", "--tokens", "128", "--mixers", "ponet"),
        *("--no-compile", "--rounds", "1", "--threads", "1", "--device", "cpu"),
        *("--pipeline-tokens", "20000", "--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    (row,) = record["rows"]
    assert (row["status"], row["compile"], row["infer"]) == ("ok", False, None)
    assert row["tokens"] == 128
    rate = row["flops"] / row["train"]["ms"] * 1e3
    assert row["flops_per_s"] == pytest.approx(rate)
    assert row["utilisation"] == pytest.approx(rate / record["matmul_flops_per_s"])
    # weights, gradients and moments are there after a step
    assert row["train"]["peak_mib"] > 0.8 * row["state_mib"]
    assert record["pipeline"]["tokens_per_s"] > 0
    (saved,) = tmp_path.glob("*.jsonl")
    pipeline, step = map(json.loads, saved.read_text().splitlines())
    assert pipeline["benchmark"] == "input_pipeline"
    assert step == record
    assert "input pipeline alone" in done.stdout


def test_goals_are_against_the_fastest_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    goals = importlib.import_module("model_goals")
    rates = {"ponet": 12.0, "attention:flash": 10.0, "attention:cudnn": 11.0, "fnet": 15.0}
    rows = [
        {
            "mixer": mixer,
            "seq_len": 512,
            "compile": False,
            "state_mib": 1.0,
            "infer": None,
            "train": {"steps_per_s": rate, "peak_mib": 2.0},
            "utilisation": 0.5,
        }
        for mixer, rate in rates.items()
    ]
    rows.append({**rows[0], "compile": True, "utilisation": 0.65})
    found = goals.step_standings(rows)
    assert [(s.goal, round(s.measured, 2), s.verdict) for s in found] == [
        ("M3", 1.09, "below target"),
        ("M5", 0.8, "below target"),
        ("T1", 0.5, "below target"),
        ("T1", 0.65, "met"),
    ]
    assert "attention:cudnn" in found[0].quantity
    assert found[-1].quantity.endswith("compiled")


def test_unknown_mixer_is_refused():
    done = run("--mixers", "bert")
    assert done.returncode == 2
    assert "unknown mixer 'bert'; known are ponet" in done.stderr
