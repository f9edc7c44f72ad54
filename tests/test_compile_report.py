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
QUICK = ("float64", "bfloat16")

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

def list_jobs(targets, dtypes, shapes):
    jobs = []
    # one warp cannot hold SIZE numbers in its registers
    for kernel, size in ((scaling_kernel, 1024), (scaling_kernel, SIZE), (broken_kernel, 32)):
        launch = Launch(kernel, (1,), (torch.empty(size, device="meta"),), {"BLOCK": size}, 1, None)
        jobs += [compile_report.job_of(launch, target) for target in targets]
    return jobs

if __name__ == "__main__":
    compile_report.list_jobs = list_jobs
    compile_report.main()
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with the kernels on its path and without Triton's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(KERNELS.parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=variables | environment,
    )


@pytest.fixture(scope="module")
def dtypes(request) -> tuple[str, ...]:
    """All with `--run-slow`; else half as many compilations, minutes with an empty cache."""
    return compile_report.DTYPES if request.config.getoption("--run-slow") else QUICK


@pytest.fixture(scope="module")
def finished(dtypes) -> subprocess.CompletedProcess:
    return run(*COMMAND, "--dtype", *dtypes)


@pytest.fixture(scope="module")
def rows(finished) -> list[dict]:
    assert finished.stdout, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])["rows"]


@needs_triton
def test_every_kernel_compiles_and_none_spills(finished, rows):
    faults = [compile_report.line_of(row) for row in rows if compile_report.failed(row)]
    assert not faults, "\n".join(faults)
    assert finished.returncode == 0, finished.stderr


@needs_triton
def test_every_kernel_is_compiled_for_every_target_type_and_shape(rows, dtypes):
    kernels = set()
    for path in KERNELS.glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert kernels
    assert kernels == {row["kernel"] for row in rows}
    for kernel in kernels:
        for target in compile_report.TARGETS:
            chosen = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
            for key, names in (
                ("dtypes", dtypes),
                ("shapes", compile_report.SHAPES),
            ):
                assert set().union(*(row[key] for row in chosen)) == set(names), (kernel, target)


@needs_triton
def test_figures_are_within_what_a_gpu_has(rows):
    for row in rows:
        line = compile_report.line_of(row)
        assert 0 < row["registers"] <= 255, line
        assert 0 <= row["shared_bytes"] <= 99 * 1024, line
        assert 0 <= row["wide_loads"] <= row["loads"], line


@needs_triton
def test_limits_of_registers_hold(rows, dtypes):
    """Those that the launcher gives to NVIDIA's compiler on Hopper: 12 warps, 16 in float32."""
    limits = {"float64": 168, "float32": 128, "bfloat16": 168, "float16": 168}
    for dtype in dtypes:
        found = [
            row["registers"]
            for row in rows
            if (row["kernel"], row["target"]) == ("fusion_bwd_kernel", "sm_90")
            and dtype in row["dtypes"]
        ]
        assert 0 < max(found) <= limits[dtype], dtype


@needs_triton
def test_limits_of_registers_are_for_nvidia(tmp_path):
    script = tmp_path / "limits.py"
    code = (
        FAULTY.partition("def list_jobs")[0]
        + """
launch = Launch(scaling_kernel, (1,), (torch.empty(64, device="meta"),), {"BLOCK": 64}, 1, 48)
for target in compile_report.TARGETS:
    options = compile_report.job_of(launch, target).options
    print(target, options.get("maxnreg"))
"""
    )
    script.write_text(code)
    finished = run(str(script))
    assert finished.stdout.splitlines() == ["sm_80 64", "sm_90 48", "gfx942 None"], finished.stderr


@needs_triton
def test_card_names_the_compiler(finished):
    import triton

    assert finished.stdout.splitlines()[0] == f"triton: {triton.__version__}"
    card = json.loads(finished.stdout.splitlines()[-1])["card"]
    assert card["triton"] == triton.__version__


@needs_triton
def test_float64_is_compiled_in_the_small_shape(rows):
    shapes = {shape for row in rows if row["dtypes"] == ["float64"] for shape in row["shapes"]}
    assert shapes == {compile_report.SMALL_SHAPE}


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
    wanted = {name for name in vars(Backend) if not name.startswith("_")}
    assert functions.names == wanted


@needs_triton
def test_table_has_a_line_for_each_row(finished, rows):
    lines = finished.stdout.splitlines()
    for row in rows:
        assert compile_report.line_of(row) in lines
    distinct = [(row["kernel"], row["target"], str(row["arguments"])) for row in rows]
    assert len(set(distinct)) == len(distinct)


@needs_triton
@pytest.mark.parametrize(("target", "size"), [("sm_90", 2**14), ("gfx942", 2**15)])
def test_faults_are_reported_and_make_the_exit_status_1(tmp_path, target, size):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.replace("SIZE", str(size)))
    finished = run(str(script), "--target", target)
    assert finished.returncode == 1, finished.stderr
    fine, spilling, broken = json.loads(finished.stdout.splitlines()[-1])["rows"]
    assert not compile_report.failed(fine)
    assert fine["wide_loads"] == fine["loads"] > 0
    assert compile_report.failed(spilling)
    assert spilling["stack_bytes"] > 0
    assert compile_report.failed(broken)
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


def test_loads_of_nvidia_code():
    ptx = """
        ld.param.b64 	%rd1, [kernel_param_0];
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v8.b16 { %rs1, %rs2 }, [ %rd1 + 0 ];
        ld.global.nc.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ];
        ld.global.b8 { %rs1 }, [ %rd1 + 0 ];
        ld.shared.v4.b32 	{%r1, %r2, %r3, %r4}, [%r5];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
        cp.async.ca.shared.global.L2::128B [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r3;
        cp.async.commit_group;
    """
    assert compile_report.loads_of_ptx(ptx) == {"loads": 6, "wide_loads": 3}


def test_figures_of_amd_code():
    assembly = """
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_dwordx4 v[0:3], v[4:5], off
	global_load_ushort v1, v[4:5], off
	buffer_store_dwordx4 v[0:3], v4, s[4:7], 0 offen
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 2
    .vgpr_count:     42
    .vgpr_spill_count: 3
"""
    assert compile_report.figures_of_amdgcn(assembly) == {
        "registers": 42,
        "stack_bytes": 12,
        "spilled_registers": 3,
        "spilled_scalars": 2,
        "loads": 3,
        "wide_loads": 2,
    }
