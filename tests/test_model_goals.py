"""Goals of whole encoders: which lines a run gets, and their verdicts, from made-up figures."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

Row = dict[str, Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks, which find each other because they are scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def standings(load: Callable[[str], ModuleType]) -> Callable[..., list[Any]]:
    return load("model_goals").standings


def row(mixer: str, length: int, ms: float, peak_mib: float = 110.0) -> Row:
    figures = {"ms": ms, "steps_per_s": 1e3 / ms, "peak_mib": peak_mib}
    kinds = {"train": figures, "infer": figures}
    return {"mixer": mixer, "seq_len": length, "batch_size": 1, "state_mib": 10.0, **kinds}


def verdicts(found: list[Any]) -> list[tuple[str, float, str]]:
    return [(s.goal, round(s.measured, 3), s.verdict) for s in found]


def test_published_setting_on_a_cpu(standings):
    rows = [
        row("ponet", 512, 10.0),
        row("attention", 512, 9.0),
        row("attention_naive", 512, 20.0),
        row("ponet", 1024, 20.0),
        row("attention", 1024, 19.0),
        # out of memory in training
        {**row("attention_naive", 1024, 20.0), "train": None},
    ]
    growth = {"ponet": {"train": 1.2, "infer": 1.0}}
    assert verdicts(standings(rows, growth, "lra", "cpu")) == [
        ("P1", 2.0, "met"),
        # below 1024 tokens nothing is asked for against SDPA
        ("P2", 0.95, "below floor"),
        ("P3", 1.2, "below floor"),
    ]
    assert standings(rows, {"ponet": {"train": None}}, "lra", "cpu")[-1].goal == "P2"


def test_base_encoder_on_a_cpu_counts_memory_beyond_the_state(standings):
    rows = [row("ponet", 4096, 10.0, 130.0), row("attention", 4096, 21.0, 110.0)]
    assert verdicts(standings(rows, {}, "base", "cpu")) == [("B2", 1.2, "met")]


def test_base_encoder_forward_and_backward(load):
    rows = [
        {"part": part, "mode": mode, "seq_len": length, "sdpa_over_ours": 1.5}
        for part in ("sub-layer", "encoder")
        for mode in ("forward", "fwd+bwd")
        for length in (512, 1024, 4096)
    ]
    found = load("model_goals").encoder_standings(rows)
    assert verdicts(found) == [("B1", 1.5, "met"), ("B1", 1.5, "below floor")]


def test_goals_on_a_gpu(standings):
    rows = [
        row("ponet", 8192, 10.0),
        row("attention", 8192, 25.0),
        row("attention_naive", 8192, 100.0),
        row("fnet", 8192, 8.0),
    ]
    assert verdicts(standings(rows, {}, "base", "cuda")) == [
        ("M2", 10.0, "below target"),
        ("M3", 2.5, "below target"),
        ("M4", 2.5, "met"),
        ("M5", 0.8, "below target"),
    ]
    assert standings(rows, {}, "lra", "cuda") == []


def test_nothing_to_compare_with(standings):
    assert standings([row("fnet", 4096, 1.0)], {}, "lra", "cpu") == []
