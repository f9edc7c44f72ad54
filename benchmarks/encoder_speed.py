"""What leaving out two projections gains: the encoder beside its five-projection forms and SDPA.

Three forms of the same function with the same weights, whose outputs are compared before anything
is timed, and softmax attention take turns in one process:

    ours            projected mean, attention over hidden states (`ponet.mixers.pooling`)
    five            queries and keys of every token, otherwise the same operators
    eager           as published: five projections, rectangles, masks (`pooling_eager`)
    sdpa            a Transformer on PyTorch's fused attention, the same in everything else

for the mixing sub-layer alone and for the whole encoder, forward and forward + backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from model_goals import encoder_standings
from records import add_output_flags, append_record, machine_card, print_card
from standing import print_goals
from torch import Tensor, nn
from torch.nn import functional as F

from ponet.config import PoNetConfig
from ponet.encoder import Encoder
from ponet.mixers import MIXERS
from ponet.mixers.pooling import PoNetMixer
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet_kernels.testing import relative_error

CLS, SEP = 101, 102
# outputs of the forms may differ by float32 rounding, added up over the layers
TOLERANCE = 1e-4


class FiveProjectionMixer(PoNetMixer):
    """Projects queries and keys of every token; all sequences have one length."""

    def pool_sequences(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """g' of each sequence: `[B, C]`."""
        heads = self.config.num_attention_heads
        batch_size = len(layout.cu_seqlens) - 1
        queries = self.query(hidden).unflatten(0, (batch_size, -1))
        keys = self.key(hidden).unflatten(0, (batch_size, -1)).unflatten(2, (heads, -1))
        g = queries.mean(dim=1).unflatten(1, (heads, -1)).unsqueeze(2)
        keys = keys.transpose(1, 2)
        return F.scaled_dot_product_attention(g, keys, keys).flatten(1)


FORMS: dict[str, type[nn.Module]] = {
    "ours": PoNetMixer,
    "five": FiveProjectionMixer,
    "eager": MIXERS["ponet_eager"],
}
SDPA = "sdpa"


def text_like_layout(length: int, batch_size: int, generator: torch.Generator) -> BatchLayout:
    """Sequences of [CLS] A [SEP] B [SEP] with segments of 10 to 40 tokens."""
    ids = torch.full((batch_size, length), 7)
    ids[:, 0], ids[:, length // 2], ids[:, -1] = CLS, SEP, SEP
    starts = torch.zeros(batch_size, length, dtype=torch.long)
    for row in starts:
        lengths = torch.randint(10, 41, (length // 10,), generator=generator)
        places = lengths.cumsum(0)
        row[places[places < length]] = 1
    offsets = torch.arange(batch_size + 1, dtype=torch.int32) * length
    stream = stream_of_packed(ids.flatten(), offsets)
    special = (ids == CLS) | (ids == SEP)
    return layout_of(stream, special.flatten(), starts.cumsum(1).flatten())


@dataclass(frozen=True)
class Case:
    """One form of one part of the model, ready to be timed."""

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]


def build_cases(part: str, config: PoNetConfig, layout: BatchLayout) -> list[Case]:
    """The three forms of the sub-layer or the encoder with the same weights, then attention."""
    cases, weights = [], None
    for name, mixer in {**FORMS, SDPA: MIXERS["attention"]}.items():
        MIXERS[name] = mixer
        torch.manual_seed(0)
        module: nn.Module
        if part == "sub-layer":
            module = mixer(config)
            run = _runner(module, layout)
        else:
            module = Encoder(config.replace(mixer=name))
            run = _encoder_runner(module, layout)
        if name != SDPA:
            weights = weights or module.state_dict()
            module.load_state_dict(weights)
        cases.append(Case(name, module, run))
    return cases


def _runner(module: nn.Module, layout: BatchLayout) -> Callable[[Tensor], Tensor]:
    return lambda hidden: module(hidden, layout)


def _encoder_runner(module: nn.Module, layout: BatchLayout) -> Callable[[Tensor], Tensor]:
    return lambda hidden: module(hidden, layout)[-1]


def check_equal(cases: list[Case], hidden: Tensor) -> None:
    """Fail when the forms are not the same function.

    Raises:
        AssertionError: an output differs from ours by more than rounding.
    """
    with torch.no_grad():
        expected = cases[0].run(hidden)
        for case in cases[1:-1]:
            error = relative_error(case.run(hidden), expected)
            assert error < TOLERANCE, f"{case.name}: relative error {error:.2g}"


def timed(case: Case, hidden: Tensor, upstream: Tensor, backward: bool) -> float:
    """Seconds of one call."""
    # as in a training step: gradients are new, not added to those of the call before
    case.module.zero_grad(set_to_none=True)
    hidden.grad = None
    start = time.perf_counter()
    if backward:
        case.run(hidden).backward(upstream)
    else:
        with torch.no_grad():
            case.run(hidden)
    return time.perf_counter() - start


def measure(cases: list[Case], hidden: Tensor, repeats: int, backward: bool) -> dict[str, list]:
    """Seconds of every repeat by form; the forms take turns, so that drift hits all alike."""
    upstream = torch.randn_like(hidden)
    seconds: dict[str, list] = {case.name: [] for case in cases}
    for repeat in range(repeats + 1):
        for case in cases:
            elapsed = timed(case, hidden, upstream, backward)
            # the first turn warms up
            if repeat:
                seconds[case.name].append(elapsed)
    return seconds


def row(part: str, length: int, mode: str, seconds: dict[str, list]) -> dict:
    """One line of the table: medians in ms, and how much slower than ours the others are."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "part": part,
        "seq_len": length,
        "mode": mode,
        **{f"{name}_ms": medians[name] * 1e3 for name in medians},
        "ours_p20_ms": statistics.quantiles(seconds["ours"], n=5)[0] * 1e3,
        "ours_p80_ms": statistics.quantiles(seconds["ours"], n=5)[3] * 1e3,
        **{f"{name}_over_ours": medians[name] / medians["ours"] for name in medians},
    }


def card(config: PoNetConfig) -> dict:
    """What the figures depend on."""
    return {
        **machine_card("cpu", threads=None),
        "dtype": "float32",
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "segments": "10 to 40 tokens, uniform",
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description="the encoder beside its five-projection forms and SDPA"
    )
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--layers", type=int, default=12, help="layers of the encoder")
    parser.add_argument("--repeats", type=int, default=3)
    add_output_flags(parser)
    arguments = parser.parse_args()
    config = PoNetConfig(
        num_hidden_layers=arguments.layers,
        max_position_embeddings=max(arguments.seq_len),
        hidden_dropout_prob=0.0,
    )
    facts = card(config)
    print_card(facts)
    print(
        f"\n{'part':10} {'tokens':>6} {'mode':8} {'ours ms':>9} {'five ms':>9} {'eager ms':>9} "
        f"{'sdpa ms':>9} {'five/ours':>9} {'eager/ours':>10} {'sdpa/ours':>9}"
    )
    rows = []
    generator = torch.Generator().manual_seed(0)
    for part in ("sub-layer", "encoder"):
        for length in arguments.seq_len:
            layout = text_like_layout(length, 1, generator)
            hidden = torch.randn(length, config.hidden_size, requires_grad=True)
            cases = build_cases(part, config, layout)
            check_equal(cases, hidden)
            for mode, backward in (("forward", False), ("fwd+bwd", True)):
                seconds = measure(cases, hidden, arguments.repeats, backward)
                result = row(part, length, mode, seconds)
                rows.append(result)
                print(
                    f"{part:10} {length:6} {mode:8} {result['ours_ms']:9.1f} "
                    f"{result['five_ms']:9.1f} {result['eager_ms']:9.1f} "
                    f"{result['sdpa_ms']:9.1f} {result['five_over_ours']:9.2f} "
                    f"{result['eager_over_ours']:10.2f} {result['sdpa_over_ours']:9.2f}",
                    flush=True,
                )
    goals = encoder_standings(rows)
    print_goals(goals)
    record = {
        "benchmark": "encoder_speed",
        "card": facts,
        "rows": rows,
        "goals": [goal.as_row() for goal in goals],
    }
    print(f"\nwritten: {append_record(record, arguments.output)}\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
