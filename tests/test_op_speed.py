"""The operator benchmark at tiny sizes: checks before timing, rows, failures, flags."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, op_speed, speed_memory
from benchmarks.op_speed import OPERATORS, SHAPES, Batch, Implementation, check, compare

TINY = "--seq-len 40 --batch-size 2 --width 24 --heads 3 --repeats 1 --device cpu"


def batch_of(segments: str, dtype: torch.dtype) -> Batch:
    sizes = {"batch_size": 2, "seq_len": 40, "width": 24, "num_heads": 3, "seed": 0}
    return Batch(segments=segments, dtype=dtype, device=torch.device("cpu"), **sizes)


def scaled(factor: float, ours: Implementation, *others: Implementation):
    """What computes something slightly else."""
    return replace(ours, call=lambda v: ours.call(v) * factor), *others


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program in a folder of its own: exit status, record, everything printed."""

    def run(*flags: str):
        monkeypatch.setattr(sys, "argv", ["op_speed.py", *TINY.split(), *flags])
        monkeypatch.chdir(tmp_path)
        status = 0
        try:
            op_speed.main()
        except SystemExit as ended:
            status = ended.code
        (saved,) = tmp_path.rglob("cpu-*.jsonl")
        return status, json.loads(saved.read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_ours_equals_float64_and_the_published_form(operator, dtype):
    for shape in ["text"] if operator == "global-aggregation" else SHAPES:
        errors = check(*compare(operator, batch_of(shape, dtype)))
        assert errors["output"] <= errors["published_output"] + 3e-2


def test_what_is_no_number_is_refused():
    with pytest.raises(op_speed.CheckError, match="output: relative error nan"):
        check(*scaled(float("nan"), *compare("mixer", batch_of("text", torch.float32))))


def test_every_operator_has_rows(run, tmp_path):
    status, record, printed = run("--segments", "text", "ones", "--output", str(tmp_path))
    assert status == 0, printed
    rows = record["rows"]
    modes = {(row["operator"], row["mode"]) for row in rows}
    assert modes == {(name, mode) for name in OPERATORS for mode in ("forward", "fwd+bwd")}
    again = {row["operator"] for row in rows if row["segments"] == "ones"}
    assert again == set(OPERATORS) - {"global-aggregation"}
    for row in rows:
        assert {"ours", "again", "published"} <= row["ms"].keys()
        assert row["over_ours"]["published"] == row["ms"]["published"] / row["ms"]["ours"]
        assert row["copy_share"] == row["ms"]["copy"] / row["ms"]["ours"]
    assert {"device", "torch", "triton", "commit", "backend", "seed"} <= record["card"].keys()
    assert "x published" in printed


def test_what_fails_is_named_and_the_rest_measured(run, monkeypatch):
    def broken(name, batch):
        if name == "segment-max":
            raise RuntimeError("no such kernel")
        wrong = name == "global-aggregation" and batch.dtype == torch.float32
        return scaled(1.001 if wrong else 1.0, *compare(name, batch))

    monkeypatch.setattr(op_speed, "compare", broken)
    names = ["segment-max", "global-aggregation", "mixer"]
    status, record, printed = run("--dtype", "float32", "bfloat16", "--operators", *names)
    assert status == 1
    failed = {(row["dtype"], row["operator"]): row["reason"] for row in record["failures"]}
    wrong = failed.pop(("float32", "global-aggregation"))
    assert wrong.startswith("CheckError: ")
    assert "relative error 0.00" in wrong
    assert f"failed: {wrong}" in printed
    missing = "RuntimeError: no such kernel"
    assert failed == {(dtype, "segment-max"): missing for dtype in ("float32", "bfloat16")}
    measured = {(row["dtype"], row["operator"]) for row in record["rows"]}
    assert measured == {
        ("float32", "mixer"),
        ("bfloat16", "global-aggregation"),
        ("bfloat16", "mixer"),
    }


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (op_speed, "--width 10 --heads 3", "--width 10 is not a multiple of --heads 3"),
        (op_speed, "--repeats 0", "expected a whole number above 0, found 0"),
        (op_speed, "--output x --record", "--output: not allowed with argument --record"),
        (speed_memory, "--mixers attenshun", "unknown mixer 'attenshun'; known are ponet, ponet_"),
        (speed_memory, "--batch-size 2 --tokens 64", "not allowed with"),
        (speed_memory, "--budget -1", "--budget: expected a number above 0"),
    ],
)
def test_bad_flags_are_refused_with_a_message(program, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program.py", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        program.parse_options()
    assert message in capsys.readouterr().err


def test_output_is_untracked_unless_asked_for(monkeypatch):
    folders = {"": Path("runs/benchmarks"), "--output x": Path("x")}
    for flags, folder in (folders | {"--record": ROOT / "benchmarks/results"}).items():
        monkeypatch.setattr(sys, "argv", ["op_speed.py", "--device", "cpu", *flags.split()])
        assert op_speed.parse_options().output == folder
