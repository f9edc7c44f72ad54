"""The operator benchmark at tiny sizes, and the published form that it compares with."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ponet.config import PoNetConfig
from ponet.mixers import MIXERS
from ponet.packing import layout_of, stream_of_rows
from ponet_kernels.testing import assert_close

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the benchmarks, which are scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts find each other beside the one that was started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "op_speed.py"), *flags]
    # one thread: threads that wait for each other are slow where tests share the cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def test_published_form_equals_the_eager_mixer():
    """Padding at the end, specials inside, a one-token segment: the same function in float64."""
    public_block = load("public_block")
    torch.manual_seed(0)
    lengths, size = torch.tensor([12, 7, 9]), (3, 12)
    real = torch.arange(12) < lengths.unsqueeze(1)
    special = torch.zeros(size, dtype=torch.bool)
    special[:, 0] = special[:, 5] = True
    special &= real
    ids = torch.tensor([0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6]).repeat(3, 1)
    stream = stream_of_rows(torch.zeros(size, dtype=torch.long), real)
    layout = layout_of(stream, stream.pack(special), stream.pack(ids))
    config = PoNetConfig(hidden_size=24, num_attention_heads=3)
    eager = MIXERS["ponet_eager"](config).double()
    public = public_block.PublicSubLayer(24, 3).double()
    public.load_state_dict(eager.state_dict())

    hidden = torch.randn(*size, 24, dtype=torch.float64)
    rows = public_block.Rows(ids.masked_fill(~real, 7), special, ~real)
    expected = eager(stream.pack(hidden), layout)
    assert_close(stream.pack(public(hidden, rows)), expected, 1e-12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every part at a tiny size with all segment shapes."""
    folder = tmp_path_factory.mktemp("results")
    tiny = "--seq-len 40 --batch-size 2 --width 24 --heads 3 --repeats 1 --no-compile --cpu-time"
    shapes = "--segments text ones documents chunks2 --device cpu"
    result = run(*tiny.split(), *shapes.split(), "--output", str(folder))
    assert result.returncode == 0, result.stderr
    return result, folder


def test_last_line_is_the_record_that_was_saved(finished):
    result, folder = finished
    record = json.loads(result.stdout.splitlines()[-1])
    (saved,) = folder.glob("cpu-*.jsonl")
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [record]
    assert {"device", "torch", "triton", "commit", "backend", "seed"} <= record["card"].keys()


def test_every_part_and_mode_has_a_row(finished):
    result, _ = finished
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    parts = {"segment-max", "pooling", "global-aggregation", "mixer", "sub-layer"}
    found = {(r["part"], r["mode"]) for r in rows}
    assert found == {(part, mode) for part in parts for mode in ("forward", "fwd+bwd")}
    shapes = {r["segments"] for r in rows if r["part"] == "pooling"}
    assert shapes == {"text", "ones", "documents", "chunks2"}
    for row in rows:
        assert {"ours", "again", "public"} <= row["ms"].keys()
        assert row["over_ours"]["public"] == row["ms"]["public"] / row["ms"]["ours"]
        assert (row["copy_share"] is None) == (row["part"] == "sub-layer")
        assert row["errors"]["output"] < 1e-5
    whole = next(row for row in rows if row["part"] == "sub-layer")
    assert {"sdpa", "eager attention"} <= whole["ms"].keys()


def test_memory_and_padding_are_measured(finished):
    result, _ = finished
    record = json.loads(result.stdout.splitlines()[-1])
    assert [set(row["mib"]) for row in record["memory"]] == [{"ours", "public", "sdpa"}]
    assert [row["seq_len"] for row in record["padding"]] == [40]


def test_figure_is_drawn_and_can_be_drawn_again_from_the_file(finished):
    pytest.importorskip("matplotlib")
    _, folder = finished
    (image,) = folder.glob("*_op_speed.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    image.unlink()
    (saved,) = folder.glob("*.jsonl")
    command = [sys.executable, str(BENCHMARKS / "plot.py"), str(saved)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert image.read_bytes().startswith(b"\x89PNG")


BROKEN = """
import sys
from dataclasses import replace

sys.path.insert(0, sys.argv.pop(1))
import op_speed, torch
from parts import PARTS

aggregation = PARTS["global-aggregation"]

def off_in_float32(batch, values):
    return aggregation.ours(batch, values) * (1.001 if batch.dtype == torch.float32 else 1.0)

def stops(batch, values):
    raise RuntimeError("no such kernel")

PARTS["global-aggregation"] = replace(aggregation, ours=off_in_float32)
PARTS["segment-max"] = replace(PARTS["segment-max"], ours=stops)
op_speed.main()
"""


def test_what_fails_is_named_and_the_rest_measured(tmp_path):
    tiny = "--seq-len 40 --batch-size 2 --width 24 --heads 3 --repeats 1 --no-compile --device cpu"
    parts = "--dtype float32 bfloat16 --parts segment-max global-aggregation mixer"
    command = [sys.executable, "-c", BROKEN, str(BENCHMARKS), *tiny.split(), *parts.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert result.returncode == 1, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    failed = [(row["dtype"], row["part"]) for row in record["failures"]]
    assert failed == [
        ("float32", "segment-max"),
        ("float32", "global-aggregation"),
        ("bfloat16", "segment-max"),
    ]
    reasons = [row["reason"] for row in record["failures"]]
    assert reasons[0] == reasons[2] == "RuntimeError: no such kernel"
    assert "relative error 0.001 exceeds" in reasons[1]
    measured = {(row["dtype"], row["part"]) for row in record["rows"]}
    assert measured == {
        ("float32", "mixer"),
        ("bfloat16", "global-aggregation"),
        ("bfloat16", "mixer"),
    }
    assert f"failed: {reasons[1]}" in result.stdout
    # without --output, and where nobody's changes are tracked
    (saved,) = tmp_path.glob("runs/benchmarks/*.jsonl")
    assert json.loads(saved.read_text()) == record


def test_errors_of_a_dtype_with_a_failure_are_no_goal():
    goals = load("goals")
    rows = [row("mixer", "forward", over_ours={}, errors={"output": 1e-7}, dtype="bfloat16")]
    assert [s.goal for s in goals.standings(rows, [], [], on_gpu=True)] == ["K8"]
    assert goals.standings(rows, [], [], on_gpu=True, wrong={"bfloat16"}) == []


def test_output_is_untracked_unless_asked_for():
    records = load("records")
    parser = argparse.ArgumentParser()
    records.add_output_flags(parser)
    assert parser.parse_args([]).output == Path("runs/benchmarks")
    assert parser.parse_args(["--record"]).output == BENCHMARKS / "results"
    assert parser.parse_args(["--output", "x"]).output == Path("x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--width 10 --heads 3", "--width 10 is not a multiple of --heads 3"),
        ("--tokens 16 --seq-len 32", "--tokens 16 is less than --seq-len 32"),
        ("--parts attention", "invalid choice: 'attention'"),
    ],
)
def test_bad_flags_are_refused_with_a_message(flags, message):
    result = run(*flags.split())
    assert result.returncode == 2
    assert message in result.stderr


def row(part: str, mode: str, **values: object) -> dict[str, object]:
    usual = {"part": part, "mode": mode, "seq_len": 4096, "batch_size": 1, "dtype": "float32"}
    return {**usual, "segments": "text", "latency": False, **values}


def test_goals_tell_met_from_missed():
    goals = load("goals")
    rows = [
        row("segment-max", "forward", over_ours={"public": 25.0}),
        row("segment-max", "fwd+bwd", over_ours={"public": 5.0}),
        row("mixer", "forward", over_ours={"public": 2.0}),
    ]
    memory = [row("", "", mib={"ours": 50.0, "public": 100.0, "sdpa": 100.0})]
    found = [(s.goal, s.verdict) for s in goals.standings(rows, memory, [], on_gpu=False)]
    assert found == [
        ("C1", "met"),
        ("C1", "below target"),
        ("C2", "below floor"),
        ("C5", "below target"),
        ("C5", "met"),
    ]


def test_kernel_goals_are_for_half_precision_and_full_batches():
    goals = load("goals")
    values = {"over_ours": {"public": 9.0}, "errors": {"output": 1e-3}, "dtype": "bfloat16"}
    rows = [
        row("mixer", "fwd+bwd", **values),
        row("mixer", "fwd+bwd", **values, latency=True),
        row("mixer", "fwd+bwd", **{**values, "dtype": "float32", "errors": {"output": 1e-7}}),
    ]
    for shape, ms in (("text", 1.0), ("ones", 1.5)):
        shares = {"copy_share": 0.7, "backward_copy_share": 0.5}
        more = {**values, "segments": shape, "ms": {"ours": ms}, **shares}
        rows.append(row("pooling", "fwd+bwd", **more))
    padding = [row("", "", padded_ms=2.0, packed_ms=1.0)]
    found = [(s.goal, s.verdict) for s in goals.standings(rows, [], padding, on_gpu=True)]
    assert found == [
        ("K1", "met"),
        ("K3", "below floor"),
        ("K5", "below target"),
        ("K6", "met"),
        ("K8", "met"),
        ("K8", "met"),
    ]
