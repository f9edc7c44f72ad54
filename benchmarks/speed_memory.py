"""Training speed, inference speed and peak memory of token mixers over the length of the text.

    python benchmarks/speed_memory.py --quick                  # PoNet and a Transformer, a minute
    python benchmarks/speed_memory.py --seq-len 4096           # every mixer, minutes on a CPU
    python benchmarks/speed_memory.py                          # 512 to 16384 tokens
    python benchmarks/speed_memory.py --model base --tokens 65536    # the pre-training encoder
    python benchmarks/speed_memory.py --model pretraining      # a step of pretrain/run.py

The default is the setting of the published comparison (Table 2 of the paper): the text classifier
of Long Range Arena with 32 sequences per batch (8 on a CPU). Times are medians with 20th and 80th
percentile. A case that runs out of memory, takes too long or fails is a row; a failure makes the
exit status 1. `attention` is softmax attention by the fused kernel that PyTorch picks;
`attention:flash` and `attention:cudnn` force one, and the fastest of the three is the Transformer
that the others are held against. Mixers of your own are measured like the others.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import common, harness
from benchmarks.common import NUMBER, Row
from benchmarks.harness import FORCED, SDPA, Case
from benchmarks.plot import draw_record
from lra.published_mixers import PUBLISHED_FORMS
from ponet.mixers import MIXERS
from ponet.run.device import matmul_rate, training_flops

PONET, PUBLISHED_TRANSFORMER = "ponet", "attention_checkpointed"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a sequence in the published comparison."""
# training steps per second and GB of a GPU at the first four; there the Transformer computes
# attention in float32 with activation checkpointing, and all models hold about 1 GB before they
# hold a token, which keeps the ratios of short lengths near 1
_PUBLISHED = {
    "transformer": (45.1, 19.4, 6.3, 1.8, 1.4, 2.5, 6.7, 23.8),
    "performer": (39.4, 25.0, 14.3, 7.8, 1.5, 2.1, 3.1, 5.4),
    "nystromformer": (39.1, 30.3, 20.0, 11.5, 1.2, 1.5, 1.9, 2.8),
    "fnet": (83.4, 61.3, 38.1, 21.4, 1.1, 1.2, 1.4, 1.7),
    "ponet": (50.4, 40.1, 27.8, 16.2, 1.1, 1.3, 1.7, 2.4),
}

# on a CPU nothing waits for launches, so ratios do not depend on the batch, but 32 sequences of
# 4096 tokens would need over 20 GB in the published Transformer
_LRA_BATCH = {"cuda": 32, "cpu": 8}
_TOKENS = {"cuda": 65536, "cpu": 1024}


def parse_options() -> argparse.Namespace:
    """The command line, with defaults that depend on the machine filled in."""
    parser = argparse.ArgumentParser(description="speed and peak memory of token mixers")
    add = parser.add_argument
    add("--quick", action="store_true", help="PoNet and the Transformer, in less than a minute")
    add("--model", choices=harness.MODELS, default="lra", help="see benchmarks/harness.py")
    add("--mixers", nargs="+", metavar="NAME", help="[all; pretraining: ponet attention fnet]")
    add("--seq-len", nargs="+", **NUMBER, help="tokens [512 to 16384; pretraining 512]")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch-size", **NUMBER, help="sequences [lra 32, on a CPU 8]")
    size.add_argument("--tokens", **NUMBER, help="of a batch [1024, on a GPU 65536]")
    add("--layers", **NUMBER, help="instead of the model's own number")
    add("--dtype", choices=("float32", "bfloat16"), help="[float32, on a GPU bfloat16]")
    add("--compile", action="store_true", help="run the models through torch.compile")
    add("--rounds", default=3, **NUMBER, help="times that each case is measured [3]")
    add("--budget", type=float, metavar="MINUTES", help="of the run [4 per length, 20 at most]")
    add("--memory-limit", type=float, metavar="MIB", help="of a case [what the machine has]")
    options = common.parse_flags(parser)
    quick, pretraining = options.quick, options.model == "pretraining"
    options.inference = not (quick or pretraining)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    # the Transformers last
    known = sorted(MIXERS, key=lambda name: name.startswith(SDPA))
    own = [name for name in known if name not in PUBLISHED_FORMS.values()]
    mixers = [PONET, SDPA] if quick else [PONET, SDPA, "fnet"] if pretraining else own
    options.mixers = list(dict.fromkeys(options.mixers or mixers))
    lengths = [256, 1024, 2048, 4096] if quick else [512] if pretraining else LENGTHS
    options.seq_len = sorted(set(options.seq_len or lengths))
    if options.budget is None:
        options.budget = 0.5 if quick else min(4.0 * len(options.seq_len), 20.0)
    if options.tokens is None and options.batch_size is None:
        if options.model == "lra":
            options.batch_size = 1 if quick else _LRA_BATCH[options.device]
        else:
            options.tokens = _TOKENS[options.device]
    for mixer in options.mixers:
        if mixer not in (*known, *FORCED):
            names = ", ".join((*known, *FORCED))
            parser.error(f"--mixers: unknown mixer {mixer!r}; known are {names}")
    if not options.budget > 0:
        parser.error(f"--budget: expected a number above 0, found {options.budget}")
    return options


def case_of(options: argparse.Namespace, mixer: str, length: int) -> Case:
    """What one process measures."""
    names = ("model", "device", "dtype", "layers", "compile", "inference", "memory_limit", "seed")
    shared = {name: getattr(options, name) for name in names}
    size = options.batch_size or max(1, options.tokens // length)
    return Case(mixer=mixer, seq_len=length, batch_size=size, **shared)


def card_of(options: argparse.Namespace) -> Row:
    """What the figures depend on."""
    lra, size = options.model == "lra", options.batch_size
    return {
        **common.machine_card(options.device),
        **{name: getattr(options, name) for name in ("model", "compile", "seed")},
        "dtype": options.dtype if options.dtype == "float32" else f"{options.dtype} autocast",
        "batch": f"{size} sequences" if size else f"{options.tokens} tokens",
        "segments": "2 tokens" if lra else "10 to 40 tokens, uniform",
        "dropout": "0.1, of attention 0.1 but 0 for SDPA" if lra else "0.1",
        "budget": f"{options.budget:g} min",
    }


def _speed(row: Row | None, kind: str) -> float | None:
    return row[kind]["steps_per_s"] if row and row[kind] else None


def _activation_mib(row: Row | None) -> float | None:
    """Memory of a training step beyond weights, gradients and moments."""
    return max(row["train"]["peak_mib"] - row["state_mib"], 0.0) if row and row["train"] else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _against(row: Row, trained: Row | None, inferred: Row | None) -> Row:
    """Speed and memory over those of baselines of the same length; None where unknown."""
    return {
        "speed": _ratio(_speed(row, "train"), _speed(trained, "train")),
        "infer_speed": _ratio(_speed(row, "infer"), _speed(inferred, "infer")),
        "memory": _ratio(_activation_mib(row), _activation_mib(trained)),
    }


def _published(row: Row) -> Row:
    """The published ratios to the Transformer; None where there are none."""
    mixer, length = row["mixer"].split("_")[0], row["seq_len"]
    if row["model"] != "lra" or mixer not in _PUBLISHED or length not in LENGTHS[:4]:
        return {"speed": None, "memory": None}
    pairs = zip(_PUBLISHED[mixer], _PUBLISHED["transformer"], strict=True)
    ratios, place = [ours / theirs for ours, theirs in pairs], LENGTHS.index(length)
    return {"speed": ratios[place], "memory": ratios[place + 4]}


def add_ratios(rows: list[Row]) -> None:
    """Give the rows of one length their ratios to both Transformers, and the published ones."""
    by_mixer = {row["mixer"]: row for row in rows}
    fused = [by_mixer[mixer] for mixer in (SDPA, *FORCED) if mixer in by_mixer]
    infer, train = (
        max(fused, key=lambda row: _speed(row, kind) or 0.0, default=None) for kind in harness.KINDS
    )
    transformer = by_mixer.get(PUBLISHED_TRANSFORMER)
    for row in rows:
        row["over_transformer"] = _against(row, transformer, transformer)
        row["over_sdpa"] = _against(row, train, infer)
        row["published"] = _published(row)


def add_utilisation(row: Row, case: Case, peak_flops: float) -> None:
    """Give a row the operations of its step, and their rate as a share of `peak_flops` per s."""
    labelled = case.batch_size * case.masked
    row["flops"] = training_flops(case.config(), case.tokens, labelled, case.seq_len)
    rate = _speed(row, "train")
    row["utilisation"] = row["flops"] * rate / peak_flops if row["flops"] and rate else None


def exponents(rows: Sequence[Row]) -> dict[str, float]:
    """Power of the length that training time per sequence grows with, 1024 to 4096 tokens."""
    found = {}
    timed = [row for row in rows if row["train"] and 1024 <= row["seq_len"] <= 4096]
    for mixer in dict.fromkeys(row["mixer"] for row in timed):
        ours = [row for row in timed if row["mixer"] == mixer]
        points = [(row["seq_len"], row["train"]["ms"] / row["batch_size"]) for row in ours]
        if len(ours) > 1:
            lengths, times = np.log(points).T
            found[mixer] = float(np.polyfit(lengths, times, 1)[0])
    return found


# head, width, keys of the figure, pattern and scale of the columns behind length and mixer
_COLUMNS: list[tuple[str, int, str, str, float]] = [
    ("steps", 5, "train steps", ".0f", 1),
    ("ms", 9, "train ms", ",.1f", 1),
    ("p20", 9, "train p20_ms", ",.1f", 1),
    ("p80", 9, "train p80_ms", ",.1f", 1),
    ("k tok/s", 8, "train tokens_per_s", ",.1f", 1e-3),
    ("MiB", 7, "train peak_mib", ",.0f", 1),
    ("x SDPA", 7, "over_sdpa speed", ".2f", 1),
    ("MiB x", 6, "over_sdpa memory", ".2f", 1),
    ("inf k tok/s", 11, "infer tokens_per_s", ",.1f", 1e-3),
    ("inf MiB", 7, "infer peak_mib", ",.0f", 1),
    ("x SDPA", 7, "over_sdpa infer_speed", ".2f", 1),
    ("% matmul", 8, "utilisation", ".1f", 100),
    ("x Transf.", 9, "over_transformer speed", ".2f", 1),
    ("paper", 6, "published speed", ".2f", 1),
    ("MiB x", 6, "over_transformer memory", ".2f", 1),
    ("paper", 6, "published memory", ".2f", 1),
]


def print_table(rows: Sequence[Row], unwanted: Sequence[str], head: bool) -> None:
    """A line per row, below the names of the columns where these are wanted."""
    columns = [c for c in _COLUMNS if not any(word in c[2] for word in unwanted)]
    mixers = max(len(row["mixer"]) for row in rows)
    if head:
        heads = " ".join(f"{title:>{width}}" for title, width, *_ in columns)
        print(f"\n{'tokens':>6} {'mixer':{mixers}} {heads}")
    for row in rows:
        timed = row["train"] or row["infer"]
        cells = " ".join(_cell(row, *column[1:]) for column in columns) if timed else ""
        if row["train"] and row["train"]["warm_up_only"]:
            cells += "  ~ a single step"
        if row["reason"]:
            cells += f"  {row['status']}: {row['reason']}"[:120]
        print(f"{row['seq_len']:6} {row['mixer']:{mixers}} {cells}", flush=True)


def _cell(row: Row, width: int, keys: str, pattern: str, scale: float) -> str:
    value: Any = row
    for key in keys.split():
        value = value[key] if value else None
    return f"{'-' if value is None else format(value * scale, pattern):>{width}}"


def _break_even(ratios: Sequence[tuple[int, float]]) -> float | None:
    """The length from which on the ratio is above 1, between two that were measured."""
    for (short, below), (long, above) in pairwise(ratios):
        if below < 1 <= above:
            share = -math.log(below) / (math.log(above) - math.log(below))
            return short * (long / short) ** share
    return None


def summary(rows: Sequence[Row]) -> str:
    """PoNet beside the Transformer in one sentence that a person can act on."""
    ratios = [
        (row["seq_len"], row["over_sdpa"]["speed"])
        for row in rows
        if row["mixer"] == PONET and row["over_sdpa"]["speed"]
    ]
    if not ratios:
        return "PoNet and the Transformer were not both measured: there is nothing to compare."
    (length, ratio), *longest = ratios[-2:]
    words = f"On this machine PoNet trains {ratio:.1f} times as fast as a Transformer at {length}"
    words += f" tokens and {longest[0][1]:.1f} times at {longest[0][0]}" if longest else " tokens"
    even, (shortest, least) = _break_even(ratios), ratios[0]
    if even:
        words += f"; below about {float(f'{even:.1g}'):.0f} tokens the Transformer is faster"
    elif len(ratios) > 2:
        words += f"; at {shortest} tokens "
        words += "they are equal" if 0.9 <= least <= 1.1 else f"it is {least:.1f} times as fast"
    return words + "."


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    card = card_of(options)
    common.print_card(card)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    peak_flops = None if options.model == "lra" else matmul_rate(device, dtype)
    unwanted = [] if peak_flops else ["utilisation"]
    unwanted += [] if options.inference else ["infer"]
    if PUBLISHED_TRANSFORMER not in options.mixers:
        unwanted += ["over_transformer", "published"]
    # PoNet and the Transformer before anything else
    order = (PONET, SDPA, *FORCED, PUBLISHED_TRANSFORMER, *options.mixers)
    mixers = sorted(options.mixers, key=order.index)
    lengths = [[case_of(options, mixer, n) for mixer in mixers] for n in options.seq_len]
    rows: list[Row] = []
    for found in harness.measure_lengths(lengths, 60 * options.budget, options.rounds):
        add_ratios(found)
        if peak_flops:
            for row in found:
                add_utilisation(row, case_of(options, row["mixer"], row["seq_len"]), peak_flops)
        found.sort(key=lambda row: options.mixers.index(row["mixer"]))
        print_table(found, unwanted, head=not rows)
        rows += found
    growth = exponents(rows)
    print("\ncolumns: docs/benchmarks.md, How to read it")
    if growth:
        powers = ", ".join(f"{mixer} {power:.2f}" for mixer, power in growth.items())
        print(f"time per sequence over length, 1024 to 4096, grows with the power: {powers}")
    record = {"benchmark": "speed_memory", "card": card, "rows": rows, "exponents": growth}
    record |= {"matmul_flops_per_s": peak_flops}
    file, line = common.save_record(record, options.output)
    draw_record(record, file, line, options.output)
    print(f"\n{summary(rows)}")
    if any(row["status"] == harness.FAILED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
