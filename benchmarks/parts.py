"""The timed parts of the mixing sub-layer: ours, the published form, and what each must compute.

A part takes named tensors (`draw_values`); ours works on streams `[T, C]`, the published form on
rows `[B, N, C]`, both on the same numbers. `reference` is the published form applied to the inputs
of ours in float64, so that outputs and gradients of ours can be held against it.

Bytes are what must cross the memory bus once if everything else is free, in units u of one
`[T, C]` tensor; terms of one row a segment or sequence are left out.

    part                 forward                      backward
    segment-max          s; out                       dout; ds
    pooling              s, o, l; out                 dout, o, l; ds, do, dl
    global-aggregation   h                            h; dh
    mixer                h, s, o, l; out              dout, o, l, h; ds, do, dl, dh
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import public_block
import torch
from layouts import Batch, without_ties
from torch import Tensor
from torch.nn import functional as F

from ponet_kernels import fused_pooling, global_aggregation, segment_max

Values = dict[str, Tensor]
Call = Callable[[Batch, Values], Tensor]

_WEIGHTS = ("wq", "bq", "wk", "bk")


@dataclass(frozen=True)
class Part:
    """One operation in two forms."""

    ours: Call
    ours_takes: tuple[str, ...]
    public: Call
    public_takes: tuple[str, ...]
    reference: Call
    forward_units: int
    backward_units: int
    per_segment: bool
    """Its time may depend on the shape of the segments."""
    repeatable: Call | None = None
    """What must give equal bits twice; None: `ours`."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of a part, with input sets to take in turn."""

    name: str
    call: Callable[[Values], Tensor]
    sets: list[Values]
    parameters: list[Tensor] = field(default_factory=list)
    copies: bool = False
    """It has no backward pass."""

    def leaves(self, values: Values) -> list[Tensor]:
        """Tensors that gradients are computed for."""
        return [value for value in values.values() if value.requires_grad] + self.parameters


def _normal(batch: Batch, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, device=batch.device, generator=generator).to(batch.dtype)


def draw_hidden(batch: Batch, generator: torch.Generator) -> Tensor:
    """Hidden states `[T, C]` with a common mean, so that the mean query is not zero."""
    spread = _normal(batch, generator, batch.num_tokens, batch.width)
    return spread.add_(_normal(batch, generator, 1, batch.width))


def draw_values(batch: Batch, generator: torch.Generator) -> Values:
    """Random inputs of all parts.

    h hidden states; q k o s l projections, osl three of them side by side; g global vectors
    (`g_low` in the dtype of the batch); wq bq wk bk parameters. s and l have no tied maxima.
    """
    tokens, width, layout = batch.num_tokens, batch.width, batch.layout

    def normal(*shape: int) -> Tensor:
        return _normal(batch, generator, *shape)

    values = {"h": draw_hidden(batch, generator)}
    for weight, bias in (("wq", "bq"), ("wk", "bk")):
        values[weight] = normal(width, width) / (3 * width) ** 0.5
        values[bias] = normal(width) / 10
    values["q"] = F.linear(values["h"], values["wq"], values["bq"])
    values["k"] = F.linear(values["h"], values["wk"], values["bk"])
    values["o"] = normal(tokens, width)
    values["s"] = without_ties(normal(tokens, width), layout)
    values["l"] = without_ties(normal(tokens, width), layout)
    values["g_low"] = normal(batch.batch_size, width)
    half = batch.dtype in (torch.float16, torch.bfloat16)
    values["g"] = values["g_low"].float() if half else values["g_low"]
    values["osl"] = torch.cat([values["o"], values["s"], values["l"]], dim=1)
    return values


def chosen(values: Values, names: tuple[str, ...], dtype: torch.dtype | None = None) -> Values:
    """Leaves that share the memory of some values, or copies of another dtype."""
    return {
        name: values[name].detach().to(dtype or values[name].dtype).requires_grad_()
        for name in names
    }


def _heads(batch: Batch, g: Tensor) -> Tensor:
    return g.unflatten(1, (batch.num_heads, -1))


def _apart(v: Values) -> Values:
    """Projections side by side as the published form wants them."""
    o, s, l_ = v["osl"].chunk(3, dim=1)
    return {**v, "o": o, "s": s, "l": l_, "g_low": v["g"].to(o.dtype) if "g" in v else o}


def _projected(batch: Batch, v: Values) -> Values:
    """Queries and keys of hidden states, as the published form wants them."""
    return {**v, "q": F.linear(v["h"], v["wq"], v["bq"]), "k": F.linear(v["h"], v["wk"], v["bk"])}


def _bare_segment_max(batch: Batch, v: Values) -> Tensor:
    return segment_max(v["s"], batch.layout)


def _segment_max(batch: Batch, v: Values) -> Tensor:
    # in the mixer the fusion reads a row a segment; here one a token, as the published call gives
    return _bare_segment_max(batch, v).index_select(0, batch.layout.token_segments)


def _public_segment_max(batch: Batch, v: Values) -> Tensor:
    return public_block.segment_max(batch.as_rows(v["s"]), batch.rows.segment_ids)


def _pooling(batch: Batch, v: Values) -> Tensor:
    return fused_pooling(v["g"], v["osl"], batch.layout)


def _public_pooling(batch: Batch, v: Values) -> Tensor:
    segment, output, local = (batch.as_rows(v[name]) for name in ("s", "o", "l"))
    return public_block.pooling(_heads(batch, v["g_low"]), segment, output, local, batch.rows)


def _global_aggregation(batch: Batch, v: Values) -> Tensor:
    weights = v["wq"], v["bq"], v["wk"], v["bk"]
    return global_aggregation(v["h"], *weights, batch.num_heads, batch.layout)


def _public_global_aggregation(batch: Batch, v: Values) -> Tensor:
    queries, keys = batch.as_rows(v["q"]), batch.as_rows(v["k"])
    g = public_block.global_aggregation(queries, keys, batch.rows.padding, batch.num_heads)
    return g.flatten(1)


def _mixer(batch: Batch, v: Values) -> Tensor:
    return _pooling(batch, {**v, "g": _global_aggregation(batch, v)})


def _public_mixer(batch: Batch, v: Values) -> Tensor:
    q, k, o, s, l_ = (batch.as_rows(v[name]) for name in ("q", "k", "o", "s", "l"))
    return public_block.mixer(q, k, o, s, l_, batch.rows, batch.num_heads)


PARTS: dict[str, Part] = {
    "segment-max": Part(
        ours=_segment_max,
        ours_takes=("s",),
        public=_public_segment_max,
        public_takes=("s",),
        reference=_public_segment_max,
        forward_units=2,
        backward_units=2,
        per_segment=True,
        # the gradient of spreading rows over tokens is PyTorch's, and on a GPU not repeatable
        repeatable=_bare_segment_max,
    ),
    "pooling": Part(
        ours=_pooling,
        ours_takes=("g", "osl"),
        public=_public_pooling,
        public_takes=("g_low", "s", "o", "l"),
        reference=lambda batch, v: _public_pooling(batch, _apart(v)),
        forward_units=4,
        backward_units=6,
        per_segment=True,
    ),
    "global-aggregation": Part(
        ours=_global_aggregation,
        ours_takes=("h", *_WEIGHTS),
        public=_public_global_aggregation,
        public_takes=("q", "k"),
        reference=lambda batch, v: _public_global_aggregation(batch, _projected(batch, v)),
        forward_units=1,
        backward_units=2,
        per_segment=False,
    ),
    "mixer": Part(
        ours=_mixer,
        ours_takes=("h", *_WEIGHTS, "osl"),
        public=_public_mixer,
        public_takes=("q", "k", "o", "s", "l"),
        reference=lambda batch, v: _public_mixer(batch, _apart(_projected(batch, v))),
        forward_units=5,
        backward_units=8,
        per_segment=True,
    ),
}
"""The parts without projections; `sublayers` adds the whole sub-layer."""
