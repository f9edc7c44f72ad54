"""The project's goals for whole encoders, and how the figures of a run stand to them.

A goal is a ratio inside one run. P goals are for the published setting and B goals for the base
encoder on a CPU, B1 by `encoder_speed.py` and the others by `speed_memory.py`; M, E and T goals are
for a GPU, where the Transformer is that on the fastest fused kernel. Memory is that of a training
step beyond weights, gradients and the optimizer's moments.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from speed_table import against, fastest_sdpa
from standing import Standing
from workloads import SDPA

Row = dict[str, Any]
Pair = tuple[float, float]

_EAGER = "attention_naive"
# floor and target by the length of the text
_OVER_EAGER_GPU = {
    512: (1.4, 1.8),
    1024: (1.9, 2.5),
    2048: (2.9, 3.8),
    4096: (4.8, 6.3),
    8192: (9.0, 11.0),
}
_OVER_SDPA_GPU = {
    512: (1.0, 1.1),
    1024: (1.1, 1.22),
    4096: (1.6, 1.9),
    8192: (2.3, 2.8),
    16384: (3.9, 4.7),
    32768: (7.0, 8.5),
}
_OVER_SDPA_GPU_INFERENCE = {
    512: (0.98, 1.05),
    1024: (1.05, 1.15),
    4096: (1.5, 1.75),
    8192: (2.1, 2.5),
    16384: (3.4, 4.1),
    32768: (6.0, 7.3),
}


def standings(
    rows: list[Row], growth: Mapping[str, Row], model: str, device: str
) -> list[Standing]:
    """Goals that this run has figures for.

    Args:
        rows: of all mixers and lengths, as `speed_memory` writes them.
        growth: exponents of time over length, a mixer each, as `speed_table.exponents`.
        model: lra or base.
        device: cpu or cuda.
    """
    found: dict[tuple[str, str], Callable[[list[Row]], Iterator[Standing]]] = {
        ("lra", "cpu"): _published_setting,
        ("base", "cpu"): _base_encoder,
        ("lra", "cuda"): _published_setting_on_gpu,
        ("base", "cuda"): _base_encoder_on_gpu,
    }
    standing = list(found[model, device](rows))
    exponent = growth.get("ponet", {}).get("train")
    if exponent is not None and (model, device) == ("lra", "cpu"):
        what = "exponent of a training step over the length, 1024 to 4096"
        standing.append(Standing("P3", what, exponent, 1.1, 1.1, lower_is_better=True))
    return standing


def encoder_standings(rows: list[Row]) -> list[Standing]:
    """The goals for forward and backward of the base encoder, from rows of `encoder_speed`."""
    limits = {512: 1.08, 4096: 1.9}
    return [
        Standing(
            "B1",
            f"encoder fwd+bwd, sdpa / ours, N = {row['seq_len']}",
            row["sdpa_over_ours"],
            limits[row["seq_len"]],
            limits[row["seq_len"]],
        )
        for row in rows
        if (row["part"], row["mode"]) == ("encoder", "fwd+bwd") and row["seq_len"] in limits
    ]


def step_standings(rows: list[Row]) -> list[Standing]:
    """The goals for a pre-training step of the base encoder on a GPU, from `pretraining`."""
    found: list[Standing] = []
    for compiled in (False, True):
        alike = [row for row in rows if row["compile"] == compiled]
        lines = [*_ratios(alike, "M3", SDPA, "speed", _OVER_SDPA_GPU.get)]
        lines += _ratios(alike, "M5", "fnet", "speed", lambda length: (0.75, 0.85))
        for row in alike:
            if row["mixer"] == "ponet" and row["utilisation"]:
                what = f"training, share of the matrix-product rate, N = {row['seq_len']}"
                lines.append(Standing("T1", what, row["utilisation"], 0.45, 0.60))
        form = ", compiled" if compiled else ""
        found += [replace(line, quantity=line.quantity + form) for line in lines]
    return found


def _pairs(rows: list[Row], other: str, kind: str) -> Iterator[tuple[Row, Row]]:
    """PoNet and another mixer at each length that has both."""
    for row in rows:
        alike = [r for r in rows if r["seq_len"] == row["seq_len"]]
        baseline = next((r for r in alike if r["mixer"] == other), None)
        if other == SDPA:
            baseline = fastest_sdpa(alike, kind)
        if row["mixer"] == "ponet" and baseline is not None:
            yield row, baseline


def _ratios(
    rows: list[Row], goal: str, other: str, key: str, limits: Callable[[int], Pair | None]
) -> Iterator[Standing]:
    """Lines of one goal; `key` is one of `against`, `limits` gives floor and target of a length."""
    words = {
        "speed": "training, ponet / {} in steps per second",
        "infer_speed": "inference, ponet / {} in sequences per second",
        "memory": "memory of a training step, ponet / {}",
    }
    for row, baseline in _pairs(rows, other, "infer" if key == "infer_speed" else "train"):
        pair, ratios = limits(row["seq_len"]), against(row, baseline)
        if pair is not None and ratios[key] is not None:
            what = f"{words[key].format(baseline['mixer'])}, N = {row['seq_len']}"
            yield Standing(goal, what, ratios[key], *pair, lower_is_better=key == "memory")


def _published_setting(rows: list[Row]) -> Iterator[Standing]:
    yield from _ratios(rows, "P1", _EAGER, "speed", lambda length: (1.0, 1.0))
    yield from _ratios(rows, "P2", SDPA, "speed", lambda n: (1.0, 1.0) if n >= 1024 else None)


def _base_encoder(rows: list[Row]) -> Iterator[Standing]:
    yield from _ratios(rows, "B2", SDPA, "memory", {512: (1.2, 1.2), 4096: (1.2, 1.2)}.get)


def _published_setting_on_gpu(rows: list[Row]) -> Iterator[Standing]:
    yield from _ratios(rows, "M6", _EAGER, "speed", {4096: (9.0, 15.0)}.get)
    yield from _ratios(rows, "M6", "fnet", "speed", {4096: (0.8, 1.0)}.get)
    yield from _ratios(rows, "E1", _EAGER, "memory", {4096: (0.15, 0.10)}.get)


def _base_encoder_on_gpu(rows: list[Row]) -> Iterator[Standing]:
    yield from _ratios(rows, "M1", "ponet_eager", "speed", _up_to_4096)
    yield from _ratios(rows, "M2", _EAGER, "speed", _OVER_EAGER_GPU.get)
    yield from _ratios(rows, "M3", SDPA, "speed", _OVER_SDPA_GPU.get)
    yield from _ratios(rows, "M4", SDPA, "infer_speed", _OVER_SDPA_GPU_INFERENCE.get)
    yield from _ratios(rows, "M5", "fnet", "speed", lambda length: (0.75, 0.85))
    yield from _ratios(rows, "E1", SDPA, "memory", {4096: (1.1, 1.0)}.get)
    yield from _ratios(rows, "E1", "ponet_eager", "memory", {4096: (0.7, 0.5)}.get)
    yield from _ratios(rows, "E1", _EAGER, "memory", {4096: (0.15, 0.10)}.get)


def _up_to_4096(length: int) -> Pair | None:
    return (1.4, 1.7) if 512 <= length <= 4096 else None
