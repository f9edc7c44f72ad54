"""Training speed, inference speed and peak memory of token mixers over the length of the text.

    python benchmarks/speed_memory.py --seq-len 4096                 # minutes on a CPU
    python benchmarks/speed_memory.py                                # 512 to 16384 tokens
    python benchmarks/speed_memory.py --model base --tokens 65536    # the pre-training encoder
    python benchmarks/speed_memory.py --mixers ponet attention:flash attention:cudnn

The default is the setting of the published comparison (Table 2 of the paper): the text classifier
of Long Range Arena with 32 sequences a batch (8 on a CPU). Each mixer and length runs in a process
of its own; the processes of one length take turns (see `rounds.py`), so that what else the machine
does hits all of them. Times are medians with 20th and 80th percentile. A case that runs out of
memory, takes too long or fails is a row; a failure makes the exit status 1. `attention` is softmax
attention by the fused kernel that PyTorch picks; `attention:flash` and `attention:cudnn` force one,
and the fastest of the three is what PoNet is held against.
"""

import argparse
import json
import sys
from typing import Any

import torch
from case_client import FAILED
from model_goals import standings
from records import add_output_flags, append_record, machine_card, print_card
from rounds import Runner
from speed_plot import draw
from speed_table import (
    TRANSFORMER,
    Table,
    add_ratios,
    exponents,
    print_exponents,
    print_notes,
)
from standing import print_goals
from workloads import FORCED, SDPA, Case, known_mixers

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
"""Tokens of a sequence in the published comparison."""
# they come first, so that there are ratios where time is short
_FIRST = ("ponet", TRANSFORMER, SDPA, *FORCED)
# on a CPU nothing waits for launches, so ratios do not depend on the batch, but 32 sequences of
# 4096 tokens would need over 20 GB in the published Transformer
_LRA_BATCH = {"cuda": 32, "cpu": 8}
_BASE_TOKENS_GPU = 65536
_MINUTES_A_LENGTH, _MOST_MINUTES = 4.0, 20.0


def parse_options() -> argparse.Namespace:
    """The command line, with defaults that depend on the machine filled in."""
    parser = argparse.ArgumentParser(
        description="speed and peak memory of token mixers over the length of the text"
    )
    number: Any = {"type": int, "metavar": "N"}
    add = parser.add_argument
    add("--mixers", nargs="+", metavar="NAME", help="default: all that are registered")
    add("--seq-len", nargs="+", default=LENGTHS, **number, help="tokens of a sequence")
    add("--model", choices=("lra", "base"), default="lra", help="see workloads.py")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch-size", **number, help="sequences [lra 32, on a CPU 8; base 1]")
    size.add_argument("--tokens", **number, help="in a batch [base on a GPU 65536]")
    add("--layers", **number, help="instead of the model's own number")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    add("--compile", action="store_true", help="run the models through torch.compile")
    add("--rounds", default=5, **number, help="turns of each case [5]")
    add("--budget", type=float, metavar="MINUTES", help="of the run [4 a length, 20 at most]")
    add("--memory-limit", type=float, metavar="MIB", help="of a case [what the machine has]")
    add("--threads", **number, help="of the CPU")
    add("--seed", default=0, **number)
    add_output_flags(parser)
    options = parser.parse_args()
    _check(parser, options)
    _fill_in(options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = known_mixers()
    options.mixers = list(dict.fromkeys(options.mixers or known))
    known += FORCED
    for mixer in options.mixers:
        if mixer not in known:
            parser.error(f"--mixers: unknown mixer {mixer!r}; known are {', '.join(known)}")
    for name in ("seq_len", "batch_size", "tokens", "layers", "rounds", "threads", "budget"):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value <= 0:
                flag = name.replace("_", "-")
                parser.error(f"--{flag}: expected a number above 0, found {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    options.seq_len = sorted(set(options.seq_len))


def _fill_in(options: argparse.Namespace) -> None:
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    if options.budget is None:
        options.budget = min(_MINUTES_A_LENGTH * len(options.seq_len), _MOST_MINUTES)
    if options.tokens is None and options.batch_size is None:
        if options.model == "lra":
            options.batch_size = _LRA_BATCH[options.device]
        elif on_gpu:
            options.tokens = _BASE_TOKENS_GPU
        else:
            options.batch_size = 1


def case_of(options: argparse.Namespace, mixer: str, length: int) -> Case:
    """What one process measures."""
    return Case(
        model=options.model,
        mixer=mixer,
        seq_len=length,
        batch_size=options.batch_size or max(1, options.tokens // length),
        device=options.device,
        dtype=options.dtype,
        layers=options.layers,
        compile=options.compile,
        threads=options.threads,
        memory_limit_mib=options.memory_limit,
        seed=options.seed,
    )


def card_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    batch = f"{options.batch_size} sequences" if options.batch_size else f"{options.tokens} tokens"
    segments = "2 tokens" if options.model == "lra" else "10 to 40 tokens, uniform"
    dropout = "0.1, of attention 0.1 but 0 for SDPA" if options.model == "lra" else "0.1"
    return {
        **machine_card(options.device, options.threads),
        "dtype": options.dtype if options.dtype == "float32" else f"{options.dtype} autocast",
        "model": options.model,
        "batch": batch,
        "segments": segments,
        "dropout": dropout,
        "compile": options.compile,
        "seed": options.seed,
        "budget": f"{options.budget:g} min",
    }


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    card = card_of(options)
    print_card(card)
    table = Table(options.mixers, published=options.model == "lra")
    table.print_head()
    runner = Runner(60 * options.budget, options.rounds)
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(options.seq_len):
        order = sorted(options.mixers, key=lambda mixer: mixer not in _FIRST)
        cases = [case_of(options, mixer, length) for mixer in order]
        found = runner.measure(cases, len(options.seq_len) - number)
        found.sort(key=lambda row: options.mixers.index(row["mixer"]))
        add_ratios(found)
        table.print_rows(found)
        rows += found
    print_notes(rows)
    growth = exponents(rows, options.mixers)
    print_exponents(growth, options.seq_len)
    goals = standings(rows, growth, options.model, options.device)
    print_goals(goals)
    record = {
        "benchmark": "speed_memory",
        "card": card,
        "rows": rows,
        "exponents": growth,
        "goals": [standing.as_row() for standing in goals],
    }
    path = append_record(record, options.output)
    print(f"\nwritten: {path}")
    name = f"{path.stem}_speed_memory_{options.model}.png"
    image = draw(record, path.with_name(name))
    print(f"written: {image}\n" if image else "no plot: install matplotlib\n")
    print(json.dumps(record))
    if any(row["status"] == FAILED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
