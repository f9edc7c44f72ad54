"""The ahead-of-time report: every kernel of the tree compiles for every GPU and spills nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ponet_kernels import compile_report
from ponet_kernels.dispatch import Backend

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
    # one warp cannot hold SIZE numbers in its registers
    for kernel, size in ((broken_kernel, 32), (scaling_kernel, 1024), (scaling_kernel, SIZE)):
        x = torch.empty(size, device="meta")
        launch = Launch(kernel, (1,), (x,), {"BLOCK": size}, 1, None)
        found += [compile_report.compilation_of(launch, target) for target in targets]
    for compilation in found:
        compilation.dtypes.append("float32")
    return found

if __name__ == "__main__":
    compile_report.list_compilations = list_compilations
    compile_report.main()
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with the kernels on its path and without Triton's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(KERNELS.parents[1])
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables | environment)


@pytest.fixture(scope="module")
def dtypes(request) -> tuple[str, ...]:
    """All with `--run-slow`; else one, for with an empty cache each takes a quarter of a minute."""
    return compile_report.DTYPES if request.config.getoption("--run-slow") else ("bfloat16",)


@pytest.fixture(scope="module")
def finished(dtypes) -> subprocess.CompletedProcess:
    return run(*COMMAND, "--dtype", *dtypes)


@pytest.fixture(scope="module")
def report(finished) -> dict:
    assert finished.stdout, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@needs_triton
def test_every_kernel_compiles_and_none_spills(finished, report):
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.startswith(f"triton: {report['card']['triton']}")
    assert " 0 failed, 0 spilled, " in finished.stdout
    for row in report["rows"]:
        assert compile_report.LINE.format(**row) in finished.stdout.splitlines()
        assert row["spilled"] == 0
        assert row["errors"] == []
        assert 0 < row["registers"] <= 255
        assert 0 <= row["shared"] <= 99 * 1024


@needs_triton
def test_every_kernel_is_compiled_for_every_target_and_type(report, dtypes):
    kernels = set()
    for path in KERNELS.glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    found = {(row["kernel"], row["target"], row["dtype"]) for row in report["rows"]}
    targets = compile_report.TARGETS
    assert found == {(k, target, dtype) for k in kernels for target in targets for dtype in dtypes}
    assert len(found) == len(report["rows"])


@needs_triton
def test_limits_of_registers_hold(report):
    for row in report["rows"]:
        if (row["kernel"], row["target"]) == ("fusion_bwd_kernel", "sm_90"):
            assert row["registers"] <= LIMITS[row["dtype"]], row


@needs_triton
def test_limits_of_registers_are_for_nvidia(tmp_path):
    script = tmp_path / "limits.py"
    code = (
        FAULTY.partition("def list_compilations")[0]
        + """
launch = Launch(scaling_kernel, (1,), (torch.empty(64, device="meta"),), {"BLOCK": 64}, 1, 48)
for target in compile_report.TARGETS:
    options = compile_report.compilation_of(launch, target).options
    print(target, options.get("maxnreg"))
"""
    )
    script.write_text(code)
    finished = run(str(script))
    assert finished.stdout.splitlines() == ["sm_80 64", "sm_90 48", "gfx942 None"], finished.stderr


class Called:
    """Stands for a backend and notes which of its functions are called."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        self.names.add(name)
        return lambda *_: None


def test_every_function_of_a_backend_is_called():
    functions: Any = Called()
    shape = compile_report.SHAPES["lra"][0]
    compile_report.call_every_function(functions, shape, torch.bfloat16)
    assert functions.names == {name for name in vars(Backend) if not name.startswith("_")}


@needs_triton
@pytest.mark.parametrize(("target", "size"), [("sm_90", 2**14), ("gfx942", 2**15)])
def test_faults_are_reported_and_make_the_exit_status_1(tmp_path, target, size):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.replace("SIZE", str(size)))
    finished = run(str(script), "--target", target)
    assert finished.returncode == 1, finished.stderr
    broken, scaling = json.loads(finished.stdout.splitlines()[-1])["rows"]
    assert broken["errors"] != []
    assert scaling["binaries"] == 2
    assert scaling["spilled"] > 0
    assert re.search(
        rf"^broken_kernel +{target} .*CompilationError: .*no_such_name", finished.stdout, re.M
    )
    assert "3 compilations" in finished.stdout
    assert "1 failed, 1 spilled" in finished.stdout


def test_unknown_target_is_refused():
    finished = run(*COMMAND, "--target", "sm_12")
    assert finished.returncode == 2
    assert "invalid choice: 'sm_12'" in finished.stderr
    assert "sm_90" in finished.stderr


@needs_triton
def test_interpreted_kernels_are_refused():
    finished = run(*COMMAND, TRITON_INTERPRET="1")
    assert finished.returncode == 1
    assert "unset TRITON_INTERPRET" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_without_triton_one_sentence_says_so():
    code = (
        "import runpy, sys; sys.modules['triton'] = None; sys.argv = ['compile_report'];"
        "runpy.run_module('ponet_kernels.compile_report', run_name='__main__')"
    )
    finished = run("-c", code)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("compile_report: triton is not installed")
    assert "Traceback" not in finished.stderr
