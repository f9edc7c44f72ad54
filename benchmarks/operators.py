"""The operators of `ponet_kernels` beside the published form, and what each must compute.

An operator takes named tensors (`draw_inputs`). The published form is `ponet.mixers.published`
with its projections' results given; it says what outputs must be. Outputs and gradients of ours
are held against plain PyTorch operations in float64, which the tests hold against the formulas.
`mixer` is everything between the projections.

Bytes are what must cross the memory bus once if everything else is free, in units of one `[T, C]`
tensor; terms of one row per segment or sequence are left out.

    operator             forward                      backward
    segment-max          s; out                       dout; ds
    pooling              s, o, l; out                 dout, o, l; ds, do, dl
    global-aggregation   h                            h; dh
    mixer                h, s, o, l; out              dout, o, l, h; ds, do, dl, dh
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Row
from benchmarks.harness import text_segment_ids
from ponet.config import PoNetConfig
from ponet.mixers.published import PublishedPoNetMixer
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet_kernels import fused_pooling, global_aggregation, segment_max, use_backend
from ponet_kernels.layout import SPECIAL
from ponet_kernels.testing import relative_error

SHAPES = {
    "text": "10 to 40 tokens, uniform",
    "ones": "1 token",
    "chunks2": "2 tokens",
    "documents": "one per sequence",
}
"""Segment shapes by name; special tokens are segments of their own in each."""
OPERATORS = ("segment-max", "pooling", "global-aggregation", "mixer")
PER_SEGMENT = ("segment-max", "pooling", "mixer")
"""Operators whose time may depend on the shape of segments."""

# errors against float64 are about this large, relative to the largest value
_LIMIT = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
# beyond so many times that something is wrong: with outputs; with gradients, whose sums cancel
_OUTPUT_SLACK, _GRADIENT_SLACK = 3, 30
# the published form rounds more often; this tells only that it computes the same function
_PUBLISHED_LIMIT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


class CheckError(AssertionError):
    """Ours does not compute what the published form computes, or not twice the same."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one length without padding, and how their tokens are represented."""

    segments: str
    """A key of `SHAPES`."""
    batch_size: int
    seq_len: int
    width: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.batch_size * self.seq_len

    @property
    def facts(self) -> Row:
        """What a row says of its batch."""
        names = ("seq_len", "batch_size", "segments")
        dtype = str(self.dtype).removeprefix("torch.")
        return {name: getattr(self, name) for name in names} | {"dtype": dtype}

    @cached_property
    def config(self) -> PoNetConfig:
        """Of the token mixers that are compared."""
        return PoNetConfig(
            hidden_size=self.width,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.seq_len,
        )

    @cached_property
    def layout(self) -> BatchLayout:
        """Where segments lie; [CLS] and [SEP] are at the ends, in text one in the middle, too."""
        length, generator = self.seq_len, torch.Generator().manual_seed(self.seed)
        special = torch.zeros(length, dtype=torch.bool)
        special[[0, length - 1]] = True
        special[length // 2] |= self.segments == "text"
        if self.segments == "text":
            rows = [text_segment_ids(length, generator) for _ in range(self.batch_size)]
        else:
            size = {"ones": 1, "chunks2": 2, "documents": length}[self.segments]
            rows = [torch.arange(length) // size] * self.batch_size
        ids, offsets = torch.cat(rows), torch.arange(self.batch_size + 1).int() * length
        found = layout_of(stream_of_packed(ids, offsets), special.repeat(self.batch_size), ids)
        return found.with_tensors({k: x.to(self.device) for k, x in found.tensors().items()})

    def rows(self, x: Tensor) -> Tensor:
        """`[T, C]` -> `[B, N, C]`."""
        return x.unflatten(0, (self.batch_size, self.seq_len))


class _Given(nn.Module):
    """In place of a projection: what it would have computed; None: its input is that."""

    value: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return rows if self.value is None else self.value


class PublishedOperators(PublishedPoNetMixer):
    """The published form between its projections, whose results are given."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.config)
        self._batch = batch
        size = (batch.batch_size, batch.seq_len)
        self._real = torch.ones(size, dtype=torch.bool, device=batch.device)
        for name in ("query", "key", "output", "segment", "local", "dense"):
            setattr(self, name, _Given())

    def segment_max(self, v: Inputs) -> Tensor:
        """Maximum of each token's segment; as ours, of special tokens' segments, too."""
        layout = self._batch.layout
        layout = replace(layout, token_marks=layout.token_marks & ~SPECIAL)
        return self._segment(self._batch.rows(v["s"]), self._real, layout)

    def aggregation(self, v: Inputs) -> Tensor:
        """g' of each sequence: `[B, 1, C]`."""
        self.key.value = self._batch.rows(v["k"])
        return self._global(self._batch.rows(v["q"]), self._real)

    def pooling(self, v: Inputs) -> Tensor:
        """Segment maxima, local maxima and their fusion with g'."""
        s, o, local = (self._batch.rows(v[name]) for name in "sol")
        maxima = self._segment(s, self._real, self._batch.layout)
        windows = self._local(local, self._real, self._batch.layout)
        return (v["g_low"] + maxima) * o + windows

    def mixer(self, v: Inputs) -> Tensor:
        """Everything between the projections."""
        return self.pooling({**v, "g_low": self.aggregation(v)})


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator with its inputs."""

    name: str
    call: Call
    inputs: Inputs

    def forward(self) -> Tensor:
        """The output, without recording a graph."""
        with torch.no_grad():
            return self.call(self.inputs)

    def run(self, upstream: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients; None: of the sum of the output."""
        out = self.call(self.inputs)
        upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
        return out.detach(), torch.autograd.grad(out, list(self.inputs.values()), upstream)


@dataclass
class Comparison:
    """One operator on one batch."""

    batch: Batch
    ours: Implementation
    published: Implementation
    repeatable: Implementation
    """What must give equal bits twice."""
    units: tuple[int, int]
    """Bytes that must be moved forward and backward, in units of one `[T, C]` tensor."""


def draw_inputs(batch: Batch) -> Inputs:
    """Random inputs of all operators.

    h hidden states with a common mean, so that the mean query is not zero; q k o s l projections,
    osl three of them side by side; g global vectors (`g_low` `[B, 1, C]` in the dtype of the
    batch); wq bq wk bk parameters.
    """
    generator = torch.Generator(batch.device).manual_seed(batch.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=batch.device, generator=generator).to(batch.dtype)

    tokens, width = batch.num_tokens, batch.width
    values = {"h": normal(tokens, width).add_(normal(1, width))}
    for name in "qk":
        weight, bias = normal(width, width) / (3 * width) ** 0.5, normal(width) / 10
        values |= {f"w{name}": weight, f"b{name}": bias}
        values[name] = F.linear(values["h"], weight, bias)
    values |= {name: normal(tokens, width) for name in "osl"}
    values["osl"] = torch.cat([values[name] for name in "osl"], dim=1)
    values["g_low"] = normal(batch.batch_size, 1, width)
    half = batch.dtype in (torch.float16, torch.bfloat16)
    values["g"] = values["g_low"].squeeze(1).to(torch.float32 if half else batch.dtype)
    return values


def compare(name: str, batch: Batch) -> Comparison:
    """Draw the inputs of an operator, and set up ours and what it is compared with."""
    drawn, layout, form = draw_inputs(batch), batch.layout, PublishedOperators(batch)

    def leaves(names: str) -> Inputs:
        return {name: drawn[name].detach().requires_grad_() for name in names.split()}

    def maxima(v: Inputs) -> Tensor:
        return segment_max(v["s"], layout)

    def segments(v: Inputs) -> Tensor:
        # in the mixer the fusion reads a row per segment; here per token, as the published form
        return maxima(v).index_select(0, layout.token_segments)

    def pooling(v: Inputs) -> Tensor:
        return fused_pooling(v["g"], v["osl"], layout)

    def aggregation(v: Inputs) -> Tensor:
        weights = (v["wq"], v["bq"], v["wk"], v["bk"])
        return global_aggregation(v["h"], *weights, batch.num_heads, layout)

    def mixer(v: Inputs) -> Tensor:
        return pooling({**v, "g": aggregation(v)})

    ours, takes, published, published_takes, units = {
        "segment-max": (segments, "s", form.segment_max, "s", (2, 2)),
        "pooling": (pooling, "g osl", form.pooling, "g_low s o l", (4, 6)),
        "global-aggregation": (aggregation, "h wq bq wk bk", form.aggregation, "q k", (1, 2)),
        "mixer": (mixer, "h wq bq wk bk osl", form.mixer, "q k s o l", (5, 8)),
    }[name]
    first = Implementation("ours", ours, leaves(takes))
    second = Implementation("published", published, leaves(published_takes))
    # the gradient of spreading rows over tokens is PyTorch's, and on a GPU not repeatable
    repeatable = replace(first, call=maxima) if name == "segment-max" else first
    return Comparison(batch, first, second, repeatable, units)


def check(comparison: Comparison) -> Row:
    """Compare ours with float64, with the published form and with itself.

    Returns:
        Largest relative errors: `output`, `gradient`, `published_output`.

    Raises:
        CheckError: an error is beyond rounding, or two runs of ours differ.
    """
    dtype, ours = comparison.batch.dtype, comparison.ours
    upstream, theirs = torch.randn_like(ours.forward()), comparison.published.forward()
    doubled = {name: x.detach().double().requires_grad_() for name, x in ours.inputs.items()}
    with use_backend("torch"):
        expected, gradients = replace(ours, inputs=doubled).run(upstream)
    actual, actual_gradients = ours.run(upstream)
    found = {
        "output": relative_error(actual, expected),
        "gradient": max(map(relative_error, actual_gradients, gradients)),
        "published_output": relative_error(theirs.view_as(expected), expected),
    }
    limits = {
        "output": _OUTPUT_SLACK * _LIMIT[dtype],
        "gradient": _GRADIENT_SLACK * _LIMIT[dtype],
        "published_output": _PUBLISHED_LIMIT[dtype],
    }
    for name, error in found.items():
        # a NaN compares false, so it fails too
        if not error <= limits[name]:
            raise CheckError(f"{name}: relative error {error:.3g} exceeds {limits[name]:.3g}")
    first, second = comparison.repeatable.run(), comparison.repeatable.run()
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        if not torch.equal(a, b):
            raise CheckError("two runs of ours differ in bits")
    return found
