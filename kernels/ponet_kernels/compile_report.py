"""Compile every Triton kernel ahead of time: registers, spills, shared memory.

    python -m ponet_kernels.compile_report [--target sm_90] [--dtype bfloat16] [--shape base]

The functions of the Triton backend are called with tensors that have no storage, in the sizes of
the paper's models; each binary that Triton's launcher would ask for is compiled once. That needs
no GPU, driver or compiler. A kernel that spills registers or does not compile makes the exit
status 1.

A row is the largest of all binaries of a kernel for a GPU and a type of input: registers and
spilled bytes per thread, shared memory per program. What the registers cannot hold is spilled to a
stack, which holds nothing else.
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
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ponet_kernels.dispatch import Backend, backend_named
from ponet_kernels.dtypes import accumulation_dtype

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
"""Arguments of Triton's `GPUTarget`: A100, H100 and H200, MI300."""
ARGMAX_DTYPES = (torch.uint8, torch.int16, torch.int32)
"""Types that the argmax of a segment is kept in."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
LINE = "{kernel:25} {target:7} {dtype:9} {binaries:>8} {registers:>9} {spilled:>9} {shared:>8}"
HEAD = "kernel                    target  dtype     binaries registers spilled B shared B"


class StreamShape(NamedTuple):
    """A batch whose sequences and segments are equally long."""

    num_channels: int
    num_heads: int
    num_sequences: int
    seq_len: int
    segment_len: int


SHAPES = {
    "base": (StreamShape(768, 12, 128, 512, 25), StreamShape(768, 12, 16, 4096, 25)),
    "lra": (StreamShape(64, 2, 32, 4096, 2),),
}
SMALL_SHAPE = "lra"
"""The only one for float64, in which tests compute and models do not."""


class Compilation(NamedTuple):
    """What one binary is made from, in plain data that can be sent to another process."""

    module: str
    kernel: str
    target: str
    source: dict[str, dict]
    """Signature, constants and attributes as Triton's `ASTSource` takes them."""
    options: dict[str, Any]
    dtypes: list[str]
    """Input types of the calls that launch it."""


class Binary(NamedTuple):
    """What became of a compilation; sizes in bytes."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    error: str | None = None


def call_every_function(functions: Backend, shape: StreamShape, dtype: torch.dtype) -> None:
    """Call a backend in all the ways that the operators do, on tensors without storage.

    Args:
        dtype: of the tokens; gradients and global vectors come in it and in that of sums.
    """
    C, H, B, seq_len, segment_len = shape
    T, acc = B * seq_len, accumulation_dtype(dtype)
    S = T // segment_len

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    # side by side, as one product makes them and as their gradients are written
    output, segment, local = empty(T, 3 * C).chunk(3, dim=1)
    maxima, grad, marks = empty(S, C), empty(T, C), empty(T, dtype=torch.uint8)
    cu_segments, token_segments = empty(S + 1, dtype=torch.int32), empty(T, dtype=torch.int64)
    tables = (token_segments, empty(S, dtype=torch.int64), marks)
    for kind, has_empty in itertools.product((None, *ARGMAX_DTYPES), (True, False)):
        functions.segment_max_fwd(segment, cu_segments, token_segments, kind, has_empty)
    for kind, argmax_kind in itertools.product((dtype, acc), ARGMAX_DTYPES):
        sums, argmax = empty(S, C, dtype=kind), empty(S, C, dtype=argmax_kind)
        functions.segment_max_bwd(sums, argmax, cu_segments, token_segments, segment)

    g = empty(B, C, dtype=acc)
    terms = [*itertools.product((g, None), (maxima, None), (local, None))][:-1]
    for g_term, s_term, l_term in (*terms, (empty(B, C), maxima, local)):
        values = (g_term, s_term, output, l_term)
        functions.fusion_fwd(*values, *tables)
        for has_empty in (True, False):
            written = (output, l_term, has_empty)
            functions.fusion_bwd(grad, *values, cu_segments, *tables, *written)

    # attention over H rows and its backward pass, the backward pass of the mean
    x, span = grad, (empty(B + 1, dtype=torch.int32), seq_len)
    scores, rows = empty(T, H, dtype=acc), empty(B, H, C, dtype=acc)
    functions.sequence_totals(x, *span, mean=True)
    functions.sequence_totals(scores, *span)
    functions.token_scores(x, rows, *span)
    functions.token_scores(x, rows, *span, scores, empty(B, H, dtype=acc))
    functions.sequence_softmax(scores, *span)
    functions.sequence_sums(scores, x, *span)
    for pairs in (((scores, rows), (scores, rows)), ()):
        functions.spread_rows(pairs, g, *span, x)


def compilation_of(launch: Any, target: str) -> Compilation:
    """The binary that Triton's launcher would pick for a recorded `Launch` on a target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from ponet_kernels.triton_kernels.launch import register_limit

    kernel, backend = launch.kernel, make_backend(GPUTarget(*TARGETS[target]))
    # the launcher's own two steps from its arguments to the compiler's
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, "num_warps": launch.num_warps}
    if launch.max_registers is not None:
        arch = TARGETS[target][1]
        limit = register_limit(launch.max_registers, arch if isinstance(arch, int) else None)
        keywords |= {} if limit is None else {"maxnreg": limit}
    bound, specialization, _ = bind(*launch.args, **keywords)
    options, *source = kernel._pack_args(backend, keywords, bound, specialization, None)
    named: dict[str, Any] = dict(zip(("signature", "constexprs", "attrs"), source, strict=True))
    return Compilation(kernel.__module__, kernel.__name__, target, named, options.__dict__, [])


def list_compilations(
    targets: Iterable[str], dtypes: Iterable[str], shapes: Iterable[str]
) -> list[Compilation]:
    """One per binary that the model asks for with these types and shapes."""
    from ponet_kernels.triton_kernels.launch import record_launches

    found: dict[str, Compilation] = {}
    for shape, dtype in itertools.product(shapes, dtypes):
        if dtype == "float64" and shape != SMALL_SHAPE:
            continue
        with record_launches() as launches:
            for size in SHAPES[shape]:
                call_every_function(backend_named("triton"), size, getattr(torch, dtype))
        for launch, target in itertools.product(launches, targets):
            compilation = compilation_of(launch, target)
            compilation = found.setdefault(repr(compilation), compilation)
            if dtype not in compilation.dtypes:
                compilation.dtypes.append(dtype)
    return list(found.values())


def build(compilation: Compilation) -> Binary:
    """Compile and measure a binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(compilation.module), compilation.kernel)
    target = GPUTarget(*TARGETS[compilation.target])
    source = ASTSource(kernel, **compilation.source)
    binary: Any = triton.compile(source, target, compilation.options)
    if target.backend == "cuda":
        registers, spilled = figures_of_cubin(binary.asm["cubin"])
    else:
        registers, spilled = figures_of_amdgcn(binary.asm["amdgcn"])
    return Binary(registers, spilled, binary.metadata.shared)


def figures_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, read by the tool that Triton ships."""
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def figures_of_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of stack, from the metadata below the assembly."""
    fields = re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)
    found = {name: int(value) for name, value in fields}
    # registers may also be spilled to others, without a stack
    spilled = max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"])
    return found["vgpr_count"], spilled


def outcome_of(result: Future[Binary]) -> Binary:
    """What `build` returned, or the error that it raised."""
    error = result.exception()
    if error is None:
        return result.result()
    # Triton's own errors quote the source before they say what is wrong
    message = str(getattr(error, "error_message", None) or error).strip()
    return Binary(error=f"{type(error).__name__}: {message.partition(chr(10))[0]}")


def compile_all(compilations: list[Compilation]) -> list[Binary]:
    """Outcomes in the order of the compilations, in one process per core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        return [outcome_of(each) for each in [pool.submit(build, c) for c in compilations]]


def report_rows(built: Iterable[tuple[Compilation, Binary]]) -> Iterator[dict[str, Any]]:
    """A row per kernel, target and type of input."""
    groups = defaultdict(list)
    for compilation, binary in built:
        for dtype in compilation.dtypes:
            groups[compilation.kernel, compilation.target, dtype].append(binary)
    for (kernel, target, dtype), found in sorted(groups.items()):
        yield {
            "kernel": kernel,
            "target": target,
            "dtype": dtype,
            "binaries": len(found),
            "registers": max(binary.registers for binary in found),
            "spilled": max(binary.spilled for binary in found),
            "shared": max(binary.shared for binary in found),
            "errors": sorted({binary.error for binary in found if binary.error}),
        }


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
    compilations = list_compilations(chosen.target, chosen.dtype, chosen.shape)
    print(f"triton {card['triton']}, torch {card['torch']}: {len(compilations)} compilations")
    print(f"\n{HEAD}", flush=True)
    binaries = compile_all(compilations)
    rows = list(report_rows(zip(compilations, binaries, strict=True)))
    for row in rows:
        print("  ".join([LINE.format(**row), *row["errors"]]))
    num_failed = sum(binary.error is not None for binary in binaries)
    num_spilled = sum(binary.spilled > 0 for binary in binaries)
    print(f"\n{len(binaries)} compilations: {num_failed} failed, {num_spilled} spilled")
    print(json.dumps({"card": card, "rows": rows}))
    if num_failed or num_spilled:
        sys.exit(1)


if __name__ == "__main__":
    main()
