"""What `gpu_report.py` asks first: the card, its ceilings, whether all operators are right.

    python benchmarks/gpu_checks.py operators          # or card, or ceilings; --tiny: small

`operators` holds each operator against float64 and runs it twice for equal bits, a line each; one
that fails does not stop the next and makes the exit status 1.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from cases import FAILURES, Case, build_case, check, first_line
from layouts import Batch, dtype_name, make_batch
from parts import PARTS, Candidate
from records import Record, machine_card, print_card
from stopwatch import copy_rate

from ponet.run.device import matmul_rate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_SHAPES = ("text", "ones", "documents")


def card(tiny: bool) -> Record:
    """What all figures depend on."""
    facts = {**machine_card(DEVICE.type, None), "python": platform.python_version()}
    if DEVICE.type == "cuda":
        found = torch.cuda.get_device_properties(DEVICE)
        facts["device memory"] = f"{found.total_memory / 2**30:.1f} GiB"
        facts["capability"] = f"{found.major}.{found.minor}"
    print_card(facts)
    return {"card": facts}


def ceilings(tiny: bool) -> Record:
    """What the device reaches at best: rates of a copy and of matrix products."""
    size = 512 if tiny else None
    rates = {
        dtype_name(dtype): matmul_rate(DEVICE, dtype, size) / 1e12
        for dtype in (torch.bfloat16, torch.float32)
    }
    copy = copy_rate(DEVICE, time.perf_counter) / 1e9
    print(f"copy {copy:,.0f} GB/s, read and written")
    for name, rate in rates.items():
        print(f"matrix product {name} {rate:.3g} TFLOP/s")
    return {"copy_gb_per_s": copy, "matmul_tflop_per_s": rates}


def _batches(tiny: bool) -> Iterator[Batch]:
    """What the operators are checked on; float64 at one size, because it is slow."""
    # a long one, too, whose sequences are cut into spans
    sizes = [(3, 70), (1, 1100)] if tiny else [(128, 512), (16, 4096)]
    width, heads = (64, 2) if tiny else (768, 12)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for shape in _SHAPES:
            for size in sizes if dtype != torch.float64 else [(3, 70) if tiny else (8, 512)]:
                batch = make_batch(
                    shape, *size, width=width, num_heads=heads, dtype=dtype, device=DEVICE, seed=0
                )
                yield batch


def _build(part: str, batch: Batch) -> Case:
    """A case; in float64 its numbers are those drawn in float32, of which none are tied."""
    if batch.dtype != torch.float64:
        return build_case(part, batch, 1, 0)
    case = build_case(part, replace(batch, dtype=torch.float32), 1, 0)
    candidates = [_in_double(candidate) for candidate in case.candidates]
    return replace(case, batch=batch, candidates=candidates, plain=_in_double(case.plain))


def _in_double(candidate: Candidate) -> Candidate:
    (values,) = candidate.sets
    doubled = {name: x.detach().double().requires_grad_() for name, x in values.items()}
    return replace(candidate, sets=[doubled])


def _check(part: str, batch: Batch) -> Record:
    start = time.perf_counter()
    try:
        errors = check(_build(part, batch))
        found = {"ok": True, "output": errors.output, "gradient": errors.gradient}
        words = f"output {errors.output:.1e} gradient {errors.gradient:.1e}"
    except FAILURES as error:
        words = first_line(error)
        found = {"ok": False, "reason": words}
    what = f"{part} {dtype_name(batch.dtype)} {batch.segments} {batch.batch_size}x{batch.seq_len}"
    seconds = time.perf_counter() - start
    print(f"{'PASS' if found['ok'] else 'FAIL'} {what:50} {seconds:5.1f} s  {words}", flush=True)
    return {"what": what, "seconds": seconds, **found}


def operators(tiny: bool) -> Record:
    """A row an operator, dtype, shape of segments and size."""
    rows = [_check(part, batch) for batch in _batches(tiny) for part in PARTS]
    return {"rows": rows, "failed": [row["what"] for row in rows if not row["ok"]]}


def main() -> None:
    """Do one part; the last line of stdout is its record."""
    parser = argparse.ArgumentParser(description="card, ceilings and correctness of a device")
    parts = {"card": card, "ceilings": ceilings, "operators": operators}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--tiny", action="store_true", help="as small as can be")
    options = parser.parse_args()
    record = parts[options.part](options.tiny)
    print(json.dumps(record))
    if record.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
