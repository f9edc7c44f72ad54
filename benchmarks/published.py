"""Speed and memory as published: PoNet, ICLR 2022, arXiv 2110.02442, Table 2.

Training on the text task of Long Range Arena: 2 layers of width 64, batch 32, mixed precision. The
Transformer there computes attention in float32 with activation checkpointing, and all models hold
about a GB before they hold a token, which keeps the memory ratios of short lengths near 1.
"""

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a sequence."""

STEPS_PER_S: dict[str, tuple[float | None, ...]] = {
    "Transformer": (45.1, 19.4, 6.3, 1.8, None, None),
    "Performer": (39.4, 25.0, 14.3, 7.8, 4.0, 2.0),
    "Nystromformer": (39.1, 30.3, 20.0, 11.5, 6.1, 3.1),
    "FNet": (83.4, 61.3, 38.1, 21.4, 11.0, 5.4),
    "PoNet": (50.4, 40.1, 27.8, 16.2, 8.7, 4.5),
}
"""Training steps a second by model, one a length; None: out of memory."""

MEMORY_GB: dict[str, tuple[float | None, ...]] = {
    "Transformer": (1.4, 2.5, 6.7, 23.8, None, None),
    "Performer": (1.5, 2.1, 3.1, 5.4, 9.8, 18.7),
    "Nystromformer": (1.2, 1.5, 1.9, 2.8, 4.5, 8.2),
    "FNet": (1.1, 1.2, 1.4, 1.7, 2.3, 3.8),
    "PoNet": (1.1, 1.3, 1.7, 2.4, 3.6, 6.5),
}
"""Peak memory of the GPU in GB by model, one a length; None: out of memory."""

MODELS = {
    "ponet": "PoNet",
    "ponet_eager": "PoNet",
    "fnet": "FNet",
    "performer": "Performer",
    "nystromformer": "Nystromformer",
}
"""The published model that a token mixer is compared with."""


def _figure(table: dict[str, tuple[float | None, ...]], model: str, length: int) -> float | None:
    return table[model][LENGTHS.index(length)] if length in LENGTHS else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def published_speed_up(mixer: str, length: int) -> float | None:
    """Steps per second over those of the Transformer; None where the table has no such figure."""
    if mixer not in MODELS:
        return None
    ours = _figure(STEPS_PER_S, MODELS[mixer], length)
    return _ratio(ours, _figure(STEPS_PER_S, "Transformer", length))


def published_memory_ratio(mixer: str, length: int) -> float | None:
    """Peak memory over that of the Transformer; None where the table has no such figure."""
    if mixer not in MODELS:
        return None
    ours = _figure(MEMORY_GB, MODELS[mixer], length)
    return _ratio(ours, _figure(MEMORY_GB, "Transformer", length))
