"""Speed, utilisation and memory of a whole pre-training step, and of the input pipeline alone.

    python benchmarks/pretraining.py                               # minutes on a CPU
    python benchmarks/pretraining.py --tokens 131072               # a GPU, bf16
    python benchmarks/pretraining.py --layers 2 --no-compile       # quick

A step is masked LM on 15 % of the tokens and sentence order, backward, clipping and AdamW, as in
`pretrain/run.py`, for the base encoder with PoNet, softmax attention (SDPA) and FNet, with and
without `torch.compile`. Each is a process of its own; they take turns (see `rounds.py`).
Utilisation is the share of the rate of a large matrix product on the same device that the step's
operations amount to, counted by formula (see `flops.py`). The mixers `attention:flash` and
`attention:cudnn` force a kernel of SDPA, and PoNet is held against the fastest. A compiled form
that fails, for want of a compiler for example, is a row; a failure of another makes the exit
status 1.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from case_client import FAILED
from flops import COUNTED, training_flops
from model_goals import step_standings
from records import add_output_flags, append_record, machine_card, print_card
from rounds import Runner
from standing import print_goals
from workloads import FORCED, Case, config_of, known_mixers, num_masked

from ponet.run.device import matmul_rate

Row = dict[str, Any]

_MIXERS = ("ponet", "attention", "fnet")
_TOKENS = {"cpu": 1024, "cuda": 65536}
_MINUTES = {"cpu": 6.0, "cuda": 8.0}
# smaller micro-batches would time the loader's overhead
_LOADER_TOKENS = 16384
_PIPELINE = Path(__file__).with_name("input_pipeline.py")


def parse_options() -> argparse.Namespace:
    """The command line, with defaults that depend on the machine filled in."""
    parser = argparse.ArgumentParser(description="speed and memory of a pre-training step")
    number: Any = {"type": int, "metavar": "N"}
    add = parser.add_argument
    add("--mixers", nargs="+", metavar="NAME", help=f"default: {' '.join(_MIXERS)}")
    add("--seq-len", default=512, **number, help="tokens of a sequence [512]")
    add("--tokens", **number, help="of a batch [1024 on a CPU, 65536 on a GPU]")
    add("--layers", **number, help="of the encoder [12]")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled forms too")
    add("--pipeline-tokens", default=1_000_000, **number, help="of its corpus; 0: steps alone")
    add("--rounds", default=5, **number, help="turns of each case [5]")
    add("--budget", type=float, metavar="MINUTES", help="for the steps [6 on a CPU, 8 on a GPU]")
    add("--threads", **number, help="of the CPU")
    add("--seed", default=0, **number)
    add_output_flags(parser)
    options = parser.parse_args()
    known = [*(mixer for mixer in known_mixers() if mixer in COUNTED), *FORCED]
    options.mixers = options.mixers or [mixer for mixer in _MIXERS if mixer in known]
    for mixer in options.mixers:
        if mixer not in known:
            parser.error(f"--mixers: unknown mixer {mixer!r}; known are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.tokens = options.tokens or _TOKENS[options.device]
    options.budget = options.budget or _MINUTES[options.device]
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All forms, the compiled ones last, because compiling takes long."""
    return [
        Case(
            model="pretraining",
            mixer=mixer,
            seq_len=options.seq_len,
            batch_size=max(1, options.tokens // options.seq_len),
            device=options.device,
            dtype=options.dtype,
            layers=options.layers,
            compile=compiled,
            inference=False,
            threads=options.threads,
            seed=options.seed,
        )
        for compiled in ((False, True) if options.compile else (False,))
        for mixer in options.mixers
    ]


def add_utilisation(row: Row, case: Case, peak_flops: float) -> None:
    """Give a row the operations of its step, and their rate as a share of the device's.

    Args:
        row: as `rounds.py` makes it.
        case: what it measured.
        peak_flops: FLOP/s of a large matrix product.
    """
    labelled = case.batch_size * num_masked(case.seq_len)
    row["flops"] = training_flops(config_of(case), case.tokens, labelled, case.seq_len)
    rate = row["flops"] / row["train"]["ms"] * 1e3 if row["train"] else None
    row["flops_per_s"] = rate
    row["utilisation"] = rate / peak_flops if rate else None


def measured_peak(options: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product."""
    return matmul_rate(torch.device(options.device), getattr(torch, options.dtype))


def input_pipeline(options: argparse.Namespace) -> Row:
    """Tokens a CPU second of the loader of `pretrain`, on one core and a synthetic corpus."""
    flags = {
        "--synthetic-tokens": options.pipeline_tokens,
        "--seq-len": options.seq_len,
        "--micro-batch-tokens": max(options.tokens, options.seq_len, _LOADER_TOKENS),
        "--repeats": 3,
        "--seed": options.seed,
        "--output": options.output,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    command = [sys.executable, str(_PIPELINE), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
        return {"status": FAILED, "reason": lines[-1][:300], "tokens_per_s": None}
    found = json.loads(run.stdout.splitlines()[-1])
    (loader,) = [row for row in found["rows"] if row["stage"] == "whole loader"]
    return {"status": "ok", "reason": None, "tokens_per_s": loader["median"] * 1e6}


def print_rows(rows: list[Row], peak_flops: float) -> None:
    """The table."""
    width = max(len(row["mixer"]) for row in rows)
    print(
        f"\n{'mixer':{width}} {'compiled':>8} {'n':>3} {'ms':>9} {'p20':>9} {'p80':>9} "
        f"{'k tok/s':>8} {'TFLOP/s':>8} {'% matmul':>8} {'MiB':>8} {'beyond':>8} {'compile s':>9}"
    )
    for row in rows:
        name = f"{row['mixer']:{width}} {'yes' if row['compile'] else 'no':>8}"
        t = row["train"]
        if t is None:
            print(f"{name} {row['status']}: {(row['reason'] or '')[:150]}")
            continue
        sign = "~" if t["warm_up_only"] else " "
        seconds = row.get("compile_train_s")
        print(
            f"{name} {t['steps']:3} {t['ms']:9,.1f}{sign}{t['p20_ms']:8,.1f} {t['p80_ms']:9,.1f} "
            f"{t['tokens_per_s'] / 1e3:8,.2f} {row['flops_per_s'] / 1e12:8.3g} "
            f"{100 * row['utilisation']:8.1f} {t['peak_mib']:8,.0f} "
            f"{t['peak_mib'] - row['state_mib']:8,.0f} {f'{seconds:9.1f}' if seconds else '-':>9}"
        )
    print(
        f"\nn: timed steps; % matmul: of {peak_flops / 1e12:.3g} TFLOP/s. MiB: peak of a step, and "
        "what lies beyond weights, gradients\nand moments. compile s: the first step of a compiled "
        "form."
    )
    if any(row["train"] and row["train"]["warm_up_only"] for row in rows):
        print("~ the first step, for which there was time only.")


def print_pipeline(pipeline: Row, rows: list[Row]) -> None:
    """The input pipeline beside the fastest step."""
    if pipeline["tokens_per_s"] is None:
        print(f"\ninput pipeline alone: failed: {pipeline['reason']}")
        return
    fastest = max((row["train"]["tokens_per_s"] for row in rows if row["train"]), default=None)
    beside = ""
    if fastest:
        beside = f", {pipeline['tokens_per_s'] / fastest:,.1f} times what the fastest step takes"
    print(
        f"\ninput pipeline alone: {pipeline['tokens_per_s'] / 1e6:.1f} M tok/s "
        f"per CPU second of one core{beside}"
    )


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    before = measured_peak(options)
    cases = cases_of(options)
    card = {
        **machine_card(options.device, options.threads),
        "dtype": options.dtype if options.dtype == "float32" else f"{options.dtype} autocast",
        "layers": config_of(cases[0]).num_hidden_layers,
        "batch": f"{cases[0].batch_size} x {options.seq_len} tokens",
        "segments": "10 to 40 tokens, uniform",
        "seed": options.seed,
        "budget": f"{options.budget:g} min",
    }
    print_card(card)
    rows = Runner(60 * options.budget, options.rounds).measure(cases, lengths_left=1)
    # other programs can slow a product down, nothing can speed it up
    peak_flops = max(before, measured_peak(options))
    for row, case in zip(rows, cases, strict=True):
        add_utilisation(row, case, peak_flops)
    print_rows(rows, peak_flops)
    pipeline = input_pipeline(options) if options.pipeline_tokens else None
    if pipeline:
        print_pipeline(pipeline, rows)
    goals = step_standings(rows) if options.device == "cuda" else []
    if goals:
        print_goals(goals)
    record = {
        "benchmark": "pretraining",
        "card": card,
        "rows": rows,
        "matmul_flops_per_s": peak_flops,
        "pipeline": pipeline,
        "goals": [goal.as_row() for goal in goals],
    }
    print(f"\nwritten: {append_record(record, options.output)}\n")
    print(json.dumps(record))
    failed = any(row["status"] == FAILED and not row["compile"] for row in rows)
    if failed or (pipeline and pipeline["status"] == FAILED):
        sys.exit(1)


if __name__ == "__main__":
    main()
