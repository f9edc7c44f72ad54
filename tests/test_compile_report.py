"""The ahead-of-time report: every kernel of the tree compiles for every GPU and spills nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ponet_kernels import compile_report

KERNELS = Path(compile_report.__file__).parent / "triton_kernels"
COMMAND = ("-m", "ponet_kernels.compile_report")
# registers that the launcher leaves to NVIDIA's compiler on Hopper: 12 warps, 16 in float32
LIMITS = {"float64": 168, "float32": 128, "bfloat16": 168, "float16": 168}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

FAULTY = """
import torch
import triton
import triton.language as tl
from ponet_kernels import compile_report
from ponet_kernels.triton_kernels.launch import Launch

@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)

@triton.jit
def scaling_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x / tl.sum(x))

def list_compilations(targets, dtypes, shapes):
    found = []
    # one warp cannot hold as many numbers as the last in its registers
    too_many = {"sm_90": 2**14, "gfx942": 2**15}
    for target in targets:
        sizes = ((broken_kernel, 32), (scaling_kernel, 1024), (scaling_kernel, too_many[target]))
        for kernel, size in sizes:
            x = torch.empty(size, device="meta")
            launch = Launch(kernel, (1,), (x,), {"BLOCK": size}, 1, 168)
            found.append(compile_report.compilation_of(launch, target)._replace(dtypes=["float32"]))
        print(target, "may take", found[-1].options.get("maxnreg"))
    return found

if __name__ == "__main__":
    compile_report.list_compilations = list_compilations
    compile_report.main()
"""
WITHOUT_TRITON = (
    "import runpy, sys; sys.modules['triton'] = None; sys.argv = ['compile_report'];"
    "runpy.run_module('ponet_kernels.compile_report', run_name='__main__')"
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with the kernels on its path and without Triton's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(KERNELS.parents[1])
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables | environment)


@needs_triton
def test_every_kernel_compiles_for_every_target_and_type_and_none_spills(request):
    """All types with `--run-slow`; else one, for each takes a quarter of a minute at first."""
    slow = request.config.getoption("--run-slow")
    dtypes = compile_report.DTYPES if slow else ("bfloat16",)
    finished = run(*COMMAND, "--dtype", *dtypes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " 0 failed, 0 spilled" in finished.stdout
    report = json.loads(finished.stdout.splitlines()[-1])
    assert finished.stdout.startswith(f"triton {report['card']['triton']}, torch")
    kernels = set()
    for path in KERNELS.glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    found = [(row["kernel"], row["target"], row["dtype"]) for row in report["rows"]]
    targets = compile_report.TARGETS
    assert sorted(found) == sorted((k, t, d) for k in kernels for t in targets for d in dtypes)
    for row in report["rows"]:
        assert compile_report.LINE.format(**row) in finished.stdout.splitlines()
        limited = (row["kernel"], row["target"]) == ("fusion_bwd_kernel", "sm_90")
        assert 0 < row["registers"] <= (LIMITS[row["dtype"]] if limited else 255), row
        assert 0 <= row["shared"] <= 99 * 1024


@needs_triton
def test_faults_are_reported_and_make_the_exit_status_1(tmp_path):
    """Limits of registers are for NVIDIA's compiler alone."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    finished = run(str(script), "--target", "sm_90", "gfx942")
    assert finished.returncode == 1, finished.stderr
    assert finished.stdout.startswith("sm_90 may take 168\ngfx942 may take None\n")
    rows = json.loads(finished.stdout.splitlines()[-1])["rows"]
    assert [row["kernel"] for row in rows] == ["broken_kernel"] * 2 + ["scaling_kernel"] * 2
    for broken, scaling in zip(rows[:2], rows[2:], strict=True):
        assert broken["errors"] != []
        assert scaling["binaries"] == 2
        assert scaling["spilled"] > 0
        line = rf"^broken_kernel +{broken['target']} .*CompilationError: .*no_such_name"
        assert re.search(line, finished.stdout, re.MULTILINE)
    assert "6 compilations: 2 failed, 2 spilled" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        ((*COMMAND, "--target", "sm_12"), {}, 2, "invalid choice: 'sm_12'"),
        pytest.param(
            COMMAND, {"TRITON_INTERPRET": "1"}, 1, "unset TRITON_INTERPRET", marks=needs_triton
        ),
        (("-c", WITHOUT_TRITON), {}, 1, "compile_report: triton is not installed"),
    ],
    ids=["unknown target", "interpreted", "without triton"],
)
def test_what_cannot_be_reported_is_refused_in_a_sentence(arguments, environment, status, message):
    finished = run(*arguments, **environment)
    assert finished.returncode == status
    assert message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
