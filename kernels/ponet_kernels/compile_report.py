"""Compile every Triton kernel ahead of time: registers, spills, shared memory, width of loads.

    python -m ponet_kernels.compile_report [--target sm_90] [--dtype bfloat16] [--shape base]

The functions of the Triton backend are called with tensors that have no storage, in the sizes of
the paper's models; each binary that Triton's launcher would ask for is compiled once. That needs
no GPU, driver or compiler. A kernel that spills registers or does not compile makes the exit
status 1.

Stack and registers are those of a thread, shared memory that of a program. The stack holds what the
registers cannot, and nothing else. AMD's compiler also counts the registers it spilled, and the
scalars it moved to vector registers, which costs instructions but no memory and is no failure.
"16 B loads" are the loads from global memory that move 16 bytes a thread, of all in the binary, not
of those executed.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ponet_kernels.dispatch import Backend, backend_named
from ponet_kernels.dtypes import accumulation_dtype

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
"""Arguments of Triton's `GPUTarget`: A100, H100 and H200, MI300."""
PLACES = (torch.uint8, torch.int16, torch.int32)
"""Types that places of maxima are kept in."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
HEAD = {
    "kernel": "kernel",
    "target": "target",
    "dtypes": "dtype",
    "shapes": "shape",
    "num_warps": "warps",
    "registers": "regs",
    "stack_bytes": "stack B",
    "spilled_registers": "spilled",
    "spilled_scalars": "scalars",
    "shared_bytes": "shared B",
    "loads": "16 B loads",
    "variant": "variant",
}
LINE = (
    "{kernel:23} {target:6} {dtypes:24} {shapes:8} {num_warps:>5} {registers:>4} {stack_bytes:>7} "
    "{spilled_registers:>7} {spilled_scalars:>7} {shared_bytes:>8} {loads:>10}  {variant}"
)


@dataclass(frozen=True)
class Shape:
    """A batch whose sequences and segments are equally long."""

    num_channels: int
    num_heads: int
    num_sequences: int
    seq_len: int
    segment_len: int


SHAPES = {
    "base": (Shape(768, 12, 128, 512, 25), Shape(768, 12, 16, 4096, 25)),
    "lra": (Shape(64, 2, 32, 4096, 2),),
}
SMALL_SHAPE = "lra"
"""The only one for float64, in which tests compute and models do not."""


@dataclass(frozen=True)
class Job:
    """What one binary is made from, in plain data that can be sent to another process."""

    module: str
    kernel: str
    target: str
    source: dict[str, dict]
    """Signature, constants and attributes as Triton's `ASTSource` takes them."""
    options: dict[str, Any]
    dtypes: list[str] = field(default_factory=list)
    """Input types of the calls that launch it."""
    shapes: list[str] = field(default_factory=list)
    """Keys of `SHAPES` of those calls."""

    @property
    def label(self) -> str:
        """Equal for jobs of one kernel, target, types and shapes."""
        return repr((self.kernel, self.target, self.dtypes, self.shapes))

    @property
    def arguments(self) -> dict[str, str]:
        """Value of each constant, type of each other argument with `/16` where divisible."""
        constants, attrs = self.source["constexprs"], self.source["attrs"]
        return {
            name: str(constants[(place,)])
            if kind == "constexpr"
            else kind + "/16" * bool(attrs.get((place,)))
            for place, (name, kind) in enumerate(self.source["signature"].items())
        }


def call_every_function(functions: Backend, shape: Shape, dtype: torch.dtype) -> None:
    """Call a backend in all the ways that the operators do, on tensors without storage.

    Args:
        dtype: of the tokens; gradients and global vectors come in it and in that of sums.
    """
    C, B = shape.num_channels, shape.num_sequences
    T, acc = B * shape.seq_len, accumulation_dtype(dtype)
    S = T // shape.segment_len

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    # side by side, as one product makes them and as their gradients are written
    output, segment, local = empty(T, 3 * C).chunk(3, dim=1)
    maxima, grad, marks = empty(S, C), empty(T, C), empty(T, dtype=torch.uint8)
    cu_segments, token_segments = empty(S + 1, dtype=torch.int32), empty(T, dtype=torch.int64)
    tables = (token_segments, empty(S, dtype=torch.int64), marks)

    for kind, has_empty in itertools.product((None, *PLACES), (True, False)):
        functions.segment_max_fwd(segment, cu_segments, token_segments, kind, has_empty)
    for kind, place_kind in itertools.product((dtype, acc), PLACES):
        sums, places = empty(S, C, dtype=kind), empty(S, C, dtype=place_kind)
        functions.segment_max_bwd(sums, places, cu_segments, token_segments, segment)

    g = empty(B, C, dtype=acc)
    terms = [*itertools.product((g, None), (maxima, None), (local, None))][:-1]
    for g_term, s_term, l_term in (*terms, (empty(B, C), maxima, local)):
        values = (g_term, s_term, output, l_term)
        functions.fusion_fwd(*values, *tables)
        for has_empty in (True, False):
            written = (output, l_term, has_empty)
            functions.fusion_bwd(grad, *values, cu_segments, *tables, *written)
    call_sequence_functions(functions, shape, grad)


def call_sequence_functions(functions: Backend, shape: Shape, x: Tensor) -> None:
    """Attention over H rows and its backward pass, the backward pass of the mean."""
    C, H, B = shape.num_channels, shape.num_heads, shape.num_sequences
    T, acc = B * shape.seq_len, accumulation_dtype(x.dtype)
    span = (x.new_empty(B + 1, dtype=torch.int32), shape.seq_len)
    scores, rows = x.new_empty(T, H, dtype=acc), x.new_empty(B, H, C, dtype=acc)
    functions.sequence_means(x, *span)
    functions.sequence_totals(scores, *span)
    functions.token_scores(x, rows, *span)
    functions.score_gradients(x, rows, scores, x.new_empty(B, H, dtype=acc), *span)
    functions.sequence_softmax(scores, *span)
    functions.sequence_sums(scores, x, *span)
    for pairs in (((scores, rows), (scores, rows)), ()):
        functions.spread_rows(pairs, x.new_empty(B, C, dtype=acc), *span, x)


def job_of(launch: Any, target: str) -> Job:
    """The binary that Triton's launcher would pick for a launch on a target.

    Args:
        launch: a `ponet_kernels.triton_kernels.launch.Launch`.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from ponet_kernels.triton_kernels.launch import register_limit

    kernel, backend = launch.kernel, make_backend(GPUTarget(*TARGETS[target]))
    # the launcher's own two steps from its arguments to the compiler's
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, "num_warps": launch.num_warps}
    if launch.max_registers is not None:
        backend_name, arch, _ = TARGETS[target]
        capability = arch if isinstance(arch, int) else 0
        limit = register_limit(launch.max_registers, backend_name, capability)
        keywords |= {} if limit is None else {"maxnreg": limit}
    bound, specialization, _ = bind(*launch.args, **keywords)
    options, *source = kernel._pack_args(backend, keywords, bound, specialization, None)
    named: dict[str, Any] = dict(zip(("signature", "constexprs", "attrs"), source, strict=True))
    return Job(kernel.__module__, kernel.__name__, target, named, options.__dict__)


def list_jobs(targets: Iterable[str], dtypes: Iterable[str], shapes: Iterable[str]) -> list[Job]:
    """One job a binary that the model asks for with these types and shapes."""
    from ponet_kernels.triton_kernels.launch import record_launches

    jobs: dict[str, Job] = {}
    for shape, dtype in itertools.product(shapes, dtypes):
        if dtype == "float64" and shape != SMALL_SHAPE:
            continue
        with record_launches() as launches:
            for size in SHAPES[shape]:
                call_every_function(backend_named("triton"), size, getattr(torch, dtype))
        for launch, target in itertools.product(launches, targets):
            job = job_of(launch, target)
            job = jobs.setdefault(repr(job), job)
            for names, name in ((job.dtypes, dtype), (job.shapes, shape)):
                if name not in names:
                    names.append(name)
    return sorted(jobs.values(), key=lambda job: (job.kernel, job.target))


def build(job: Job) -> dict[str, int]:
    """Compile a job and measure the binary; `wide_loads` of `loads` move 16 bytes or more."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    target = GPUTarget(*TARGETS[job.target])
    binary: Any = triton.compile(ASTSource(kernel, **job.source), target, job.options)
    if target.backend == "cuda":
        measured = {**figures_of_cubin(binary.asm["cubin"]), **loads_of_ptx(binary.asm["ptx"])}
    else:
        measured = figures_of_amdgcn(binary.asm["amdgcn"])
    return {**measured, "shared_bytes": binary.metadata.shared}


def figures_of_cubin(cubin: bytes) -> dict[str, int]:
    """Registers and stack, read by the tool that Triton ships."""
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"] + found["LOCAL"]}


def loads_of_ptx(ptx: str) -> dict[str, int]:
    """Loads from global memory to registers and to shared memory."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in loads]
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\S*\.global\S*\s[^;]*?\], (\w+)", ptx)
    sizes += [int(size, 0) for size in copies]
    return {"loads": len(sizes), "wide_loads": sum(size >= 16 for size in sizes)}


def figures_of_amdgcn(assembly: str) -> dict[str, int]:
    """Vector registers, stack and loads, from the assembly and its metadata."""
    fields = re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)
    found = {name: int(value) for name, value in fields}
    loads = re.findall(r"^\s+(?:global|buffer)_load_(\w+)", assembly, re.MULTILINE)
    return {
        "registers": found["vgpr_count"],
        "stack_bytes": found["private_segment_fixed_size"],
        "spilled_registers": found["vgpr_spill_count"],
        "spilled_scalars": found["sgpr_spill_count"],
        "loads": len(loads),
        "wide_loads": sum("dwordx4" in load for load in loads),
    }


def variants(jobs: list[Job]) -> list[dict[str, str]]:
    """For each job the few arguments that tell it from others of its kernel, target, types, shapes.

    Inputs rather than outputs: whether these are there usually follows from those.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for job in jobs:
        groups.setdefault(job.label, []).append(job.arguments)
    names = {label: _distinguishing(group) for label, group in groups.items()}
    return [{name: job.arguments[name] for name in names[job.label]} for job in jobs]


def _distinguishing(group: list[dict[str, str]]) -> list[str]:
    def distinct(names: list[str]) -> int:
        return len({tuple(arguments[name] for name in names) for arguments in group})

    names = list(group[0])
    for name in reversed(group[0]):
        rest = [other for other in names if other != name]
        if distinct(rest) == distinct(names):
            names = rest
    return names


def row_of(job: Job, variant: dict[str, str], result: Future) -> dict[str, Any]:
    """One row of the report; `result` holds what `build` returned or raised."""
    row = {
        "kernel": job.kernel,
        "target": job.target,
        "dtypes": job.dtypes,
        "shapes": job.shapes,
        "variant": variant,
        "arguments": job.arguments,
        "num_warps": job.options["num_warps"],
        "error": None,
    }
    error = result.exception()
    if error is None:
        return row | result.result()
    # Triton's own errors quote the source before they say what is wrong
    message = str(getattr(error, "error_message", None) or error).strip()
    return row | {"error": f"{type(error).__name__}: {message.partition(chr(10))[0]}"}


def failed(row: dict[str, Any]) -> bool:
    """Whether the kernel does not compile or spills registers."""
    return bool(row["error"] or row["stack_bytes"] or row.get("spilled_registers"))


def compile_jobs(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    """Rows of the jobs, in their order, compiled in one process a core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        results = [pool.submit(build, job) for job in jobs]
        yield from map(row_of, jobs, variants(jobs), results)


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = {name: "-" if row.get(name) is None else row[name] for name in HEAD}
    cells |= {"dtypes": ",".join(row["dtypes"]), "shapes": ",".join(row["shapes"])}
    cells["variant"] = " ".join(f"{name}={value}" for name, value in row["variant"].items())
    if row["error"]:
        cells["variant"] += f"  {row['error']}"
    else:
        cells["loads"] = f"{row['wide_loads']} of {row['loads']}"
    return LINE.format(**cells).rstrip()


def print_report(jobs: list[Job]) -> list[dict[str, Any]]:
    """Compile the jobs, print the table as it grows and a summary; the rows."""
    start, rows = time.perf_counter(), []
    print(f"\n{LINE.format(**HEAD)}", flush=True)
    for row in compile_jobs(jobs):
        rows.append(row)
        print(line_of(row), flush=True)
    built = [row for row in rows if not row["error"]]
    print(
        f"\n{len({row['kernel'] for row in rows})} kernels, {len(rows)} compilations in "
        f"{time.perf_counter() - start:.0f} s: {len(rows) - len(built)} failed, "
        f"{sum(map(failed, built))} spilled, at most "
        f"{max((row['registers'] for row in built), default=0)} registers"
    )
    return rows


def main() -> None:
    """Run the report."""
    parser = argparse.ArgumentParser(description="compile every Triton kernel ahead of time")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    chosen = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("compile_report: triton is not installed, there is nothing to compile with")
    import triton

    if triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit("compile_report: unset TRITON_INTERPRET, interpreted kernels have no binary")
    card = {"triton": triton.__version__, "torch": torch.__version__}
    for name, value in card.items():
        print(f"{name:>6}: {value}")
    rows = print_report(list_jobs(chosen.target, chosen.dtype, chosen.shape))
    print(json.dumps({"card": card, "rows": rows}))
    if any(map(failed, rows)):
        sys.exit(1)


if __name__ == "__main__":
    main()
