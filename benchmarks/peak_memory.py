"""Peak memory of one training call of a mixing sub-layer, above what it starts from.

    python benchmarks/peak_memory.py --form public --seq-len 4096

On a CPU each form is measured in a process of its own, because memory that one has freed is there
for the next to take; what counts is the resident size, so figures include the C library's reserve.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from cases import SUB_LAYER, build_case
from layouts import Batch, dtype_name, make_batch
from parts import Candidate

from ponet.run.device import peak_memory_mib, return_free_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORMS = ("ours", "public", "sdpa", "sdpa flash", "sdpa cudnn")


def _resident_mib(field: str) -> float | None:
    """A line of the process's status in MiB; None where the system has no such file."""
    if not _STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) / 2**10


def _start(device: torch.device) -> float:
    """Forget earlier peaks as far as possible; the level that the call starts from, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    # what the set-up freed would serve the call unseen
    return_free_memory(device)
    try:
        _RESET.write_text("5")
    except OSError:
        # not Linux, or not permitted: an earlier, higher peak would hide this one
        return peak_memory_mib(device)
    return _resident_mib("VmRSS") or peak_memory_mib(device)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return peak_memory_mib(device)
    # unlike getrusage, not inherited from the parent process
    return _resident_mib("VmHWM") or peak_memory_mib(device)


def _call(candidate: Candidate) -> None:
    values = candidate.sets[0]
    out = candidate.call(values)
    torch.autograd.grad(out, candidate.leaves(values), torch.ones_like(out))


def _form(batch: Batch, form: str, seed: int) -> Candidate:
    case = build_case(SUB_LAYER, batch, 1, seed)
    return next(candidate for candidate in case.candidates if candidate.name == form)


def measure_peak(form: str, batch: Batch, warm_up: Batch | None, seed: int) -> float:
    """MiB that one forward and backward pass needs beyond inputs and parameters.

    Args:
        form: a name of `FORMS` that the batch has.
        batch: what is measured.
        warm_up: a small batch run before, so that libraries have set up their own memory.
        seed: of the inputs.
    """
    if warm_up is not None:
        _call(_form(warm_up, form, seed))
    candidate = _form(batch, form, seed)
    if batch.device.type == "cuda":
        _call(candidate)
    start = _start(batch.device)
    _call(candidate)
    return _peak(batch.device) - start


def peaks(batch: Batch, seed: int) -> dict[str, float]:
    """MiB by form: in this process on a GPU, in one each on a CPU."""
    case = build_case(SUB_LAYER, batch, 1, seed)
    forms = [c.name for c in case.candidates if c.name in FORMS]
    del case
    if batch.device.type == "cuda":
        return {form: measure_peak(form, batch, None, seed) for form in forms}
    return {form: _peak_elsewhere(form, batch, seed) for form in forms}


def _peak_elsewhere(form: str, batch: Batch, seed: int) -> float:
    sizes = {
        "--seq-len": batch.seq_len,
        "--batch-size": batch.batch_size,
        "--width": batch.width,
        "--heads": batch.num_heads,
        "--dtype": dtype_name(batch.dtype),
        "--segments": batch.segments,
        "--seed": seed,
    }
    flags = [str(word) for flag in sizes.items() for word in flag]
    command = [sys.executable, __file__, "--form", form, *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"peak memory of {form}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])["peak_mib"]


def main() -> None:
    """Measure one form on the CPU."""
    parser = argparse.ArgumentParser(description="peak memory of one form of the sub-layer, CPU")
    parser.add_argument("--form", choices=("ours", "public", "sdpa"), required=True)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--segments", default="text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    batch, warm_up = (
        make_batch(
            options.segments,
            options.batch_size,
            length,
            width=options.width,
            num_heads=options.heads,
            dtype=getattr(torch, options.dtype),
            device=torch.device("cpu"),
            seed=options.seed,
        )
        for length in (options.seq_len, 64)
    )
    peak = measure_peak(options.form, batch, warm_up, options.seed)
    print(json.dumps({"form": options.form, "seq_len": options.seq_len, "peak_mib": peak}))


if __name__ == "__main__":
    main()
