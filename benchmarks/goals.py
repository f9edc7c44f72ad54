"""The project's goals for the operators, and how the figures of a run stand to them.

A goal is a ratio inside one run: below its floor something is broken, at its target it is met.
C goals are for a CPU in float32, K goals for a GPU in half precision, both at base size (width
768, 12 heads). K7 (registers and spills) is checked by compiling, elsewhere.

Two goals are beyond the design as it is: K4 counts one reading of the hidden states, global
aggregation reads them three times, so a third is its bound; in K5 segments of one token move 1.8
times the bytes of text (a row of maxima, of its gradient and of places per token).
"""

from collections.abc import Collection, Iterator
from typing import Any

from standing import Standing

Row = dict[str, Any]

OUTPUT_LIMIT = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
"""K8: error of our outputs against float64, relative to the largest value."""


def standings(
    rows: list[Row],
    memory: list[Row],
    padding: list[Row],
    on_gpu: bool,
    wrong: Collection[str] = (),
) -> list[Standing]:
    """Goals that this run has figures for.

    Args:
        rows: timings, as `op_speed` writes them.
        memory: peak memory of the sub-layer, a row a length and dtype.
        padding: packed against padded batches, a row a length and dtype.
        on_gpu: K goals, else C goals.
        wrong: dtypes of which a part failed, so that the errors of the others say little.
    """
    if on_gpu:
        errors = _errors([row for row in rows if row["dtype"] not in wrong])
        return [*_kernel_goals(rows), *_shape_goals(rows), *_padding_goals(padding), *errors]
    return [*_cpu_goals(rows), *_memory_goals(memory)]


def _size(row: Row) -> str:
    return f"N = {row['seq_len']}, {row['dtype']}"


def _find(rows: list[Row], part: str, mode: str, **wanted: Any) -> Iterator[Row]:
    for row in rows:
        if (row["part"], row["mode"]) == (part, mode) and all(
            row[key] == value for key, value in wanted.items()
        ):
            yield row


def _ratio(goal: str, row: Row, other: str, limits: tuple[float, float]) -> Iterator[Standing]:
    if other in row["over_ours"]:
        what = f"{row['part']} {row['mode']}, {other} / ours, {_size(row)}"
        yield Standing(goal, what, row["over_ours"][other], *limits)


def _cpu_goals(rows: list[Row]) -> Iterator[Standing]:
    plain = {"dtype": "float32", "segments": "text", "batch_size": 1}
    limits = {
        ("C1", "segment-max", "forward", 4096, "public"): (8, 20),
        ("C1", "segment-max", "fwd+bwd", 4096, "public"): (4, 8),
        ("C2", "mixer", "forward", 4096, "public"): (2.5, 4.5),
        ("C2", "mixer", "fwd+bwd", 4096, "public"): (1.7, 2.7),
        ("C3", "sub-layer", "fwd+bwd", 512, "public"): (1.3, 1.5),
        ("C3", "sub-layer", "fwd+bwd", 4096, "public"): (1.3, 1.5),
        ("C4", "sub-layer", "fwd+bwd", 512, "sdpa"): (1.1, 1.25),
        ("C4", "sub-layer", "fwd+bwd", 4096, "sdpa"): (3.2, 4),
        ("C4", "sub-layer", "fwd+bwd", 4096, "eager attention"): (6, 8),
    }
    for (goal, part, mode, length, other), pair in limits.items():
        for row in _find(rows, part, mode, seq_len=length, **plain):
            yield from _ratio(goal, row, other, pair)


def _memory_goals(memory: list[Row]) -> Iterator[Standing]:
    for row in memory:
        if row["seq_len"] == 4096 and row["dtype"] == "float32":
            for other, limits in (("public", (0.6, 0.45)), ("sdpa", (1.4, 1.2))):
                what = f"sub-layer peak memory fwd+bwd, ours / {other}, {_size(row)}"
                share = row["mib"]["ours"] / row["mib"][other]
                yield Standing("C5", what, share, *limits, lower_is_better=True)


def _throughput(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row["latency"] and row["dtype"] != "float32"]


def _kernel_goals(rows: list[Row]) -> Iterator[Standing]:
    rows = [row for row in _throughput(rows) if row["segments"] == "text"]
    for row in _find(rows, "mixer", "fwd+bwd"):
        yield from _ratio("K1", row, "public", (5, 8))
    for row in _find(rows, "mixer", "fwd+bwd"):
        yield from _ratio("K2", row, "compiled", (1.5, 2.5))
    shares = (
        ("K3", "pooling", "forward", "copy_share", (0.65, 0.80)),
        ("K3", "pooling", "fwd+bwd", "backward_copy_share", (0.60, 0.75)),
        ("K4", "global-aggregation", "forward", "copy_share", (0.50, 0.70)),
    )
    for goal, part, mode, key, limits in shares:
        for row in _find(rows, part, mode):
            which = "backward" if key.startswith("backward") else "forward"
            what = f"{part} {which}, share of copy rate, {_size(row)}"
            yield Standing(goal, what, row[key], *limits)


def _shape_goals(rows: list[Row]) -> Iterator[Standing]:
    rows = list(_find(_throughput(rows), "pooling", "fwd+bwd"))
    for length, dtype in sorted({(row["seq_len"], row["dtype"]) for row in rows}):
        alike = [row for row in rows if (row["seq_len"], row["dtype"]) == (length, dtype)]
        times = [row["ms"]["ours"] for row in alike]
        if len(times) > 1:
            shapes = " ".join(row["segments"] for row in alike)
            what = f"pooling fwd+bwd, worst / best of {shapes}, N = {length}, {dtype}"
            yield Standing("K5", what, max(times) / min(times), 1.6, 1.25, lower_is_better=True)


def _padding_goals(padding: list[Row]) -> Iterator[Standing]:
    for row in padding:
        what = f"mixer fwd+bwd, padded / packed with half the tokens, {_size(row)}"
        yield Standing("K6", what, row["padded_ms"] / row["packed_ms"], 1.6, 1.85)


def _errors(rows: list[Row]) -> Iterator[Standing]:
    for dtype, limit in OUTPUT_LIMIT.items():
        errors = [
            row["errors"]["output"]
            for row in rows
            if row["dtype"] == dtype and row["part"] != "sub-layer"
        ]
        if errors:
            what = f"largest error against float64, bits equal twice, {dtype}"
            yield Standing("K8", what, max(errors), limit, limit, lower_is_better=True)
